"""Stage 2 of the method: every language is trained towards the frozen distributions of the selected teachers.

The targets come from the scores before the round, joined to their shard by file name and key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import Config, DistillConfig, EngineConfig, Split
from alsace_dist.data.rows import EncodedRow, Example, answers_of
from alsace_dist.errors import UserError
from alsace_dist.files import scores as score_files
from alsace_dist.files.layout import DISTILL, data_url
from alsace_dist.files.manifest import load_manifest
from alsace_dist.files.selection import KIND as SELECTION
from alsace_dist.files.selection import read_selection
from alsace_dist.files.shards import Dataset, open_dataset
from alsace_dist.method.calibration import calibrate
from alsace_dist.method.targets import Target, learners, targets
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import (
    Output,
    Stage,
    checked_model,
    data_inputs,
    model_identity,
    model_inputs,
    train,
    training_fingerprint,
)

KIND = DISTILL
ON_RANKS = True
SPLIT: Split = "unlabeled"


def _scores(stage: Stage) -> Output:
    return Output(stage.layout.scores(stage.round - 1, "unlabeled"), score_files.KIND)


def _selection(stage: Stage) -> Output:
    return Output(stage.layout.selection(stage.round), SELECTION)


def inputs(stage: Stage) -> list[Output]:
    """The unlabeled split, the model before the round, its scores, and the selection on them."""
    return [*data_inputs(stage), *model_inputs(stage, stage.round - 1), _scores(stage), _selection(stage)]


def outputs(stage: Stage) -> list[Output]:
    """The distilled model."""
    return [Output(stage.layout.distill(stage.round), KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything that a distilled model depends on."""
    return training_fingerprint(stage, stage.config.distill, model_identity(stage, stage.round - 1)) | {
        "data": open_dataset(data_url(stage.config, "unlabeled")).digest,
        "scores": _scores(stage).manifest().digest,
        "selection": _selection(stage).manifest().digest,
    }


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Train every language that has a teacher. Raises ``UserError`` if none has."""
    from alsace_dist.models.family import open_model
    from alsace_dist.training.examples import TargetExamples

    assert ranks is not None
    config, mode = stage.config, str(stage.config.distill.targets)
    dataset = open_dataset(data_url(config, "unlabeled"))
    scores, selection = _scores(stage).directory, read_selection(_selection(stage).directory)
    languages = learners(dataset.languages, selection.weights, mode)
    counts = example_counts(dataset, languages, selection.num_groups)
    if sum(counts) == 0:
        teachers = ", ".join(selection.weights)
        raise UserError(
            f"{_selection(stage).directory}: {teachers} teaches, and there is no other language to learn from it"
        )
    listed, biases = load_manifest(scores, score_files.KIND), selection.bias_rows()
    # The mean over all pairs, not over a batch's pairs: so a batch needs to know nothing of other batches.
    mean_weight = selection.num_pairs[mode] / max(1, sum(counts))

    def give_targets(shard: int, rows: list[EncodedRow]) -> list[Example]:
        groups = score_files.read_verified(scores, listed, f"{dataset.shards[shard].stem}.parquet").groups()
        found = {key: targets(calibrate(group, biases), selection.weights, mode) for key, group in groups.items()}
        return [example_of(row, found, mean_weight, scores) for row in rows]

    model = open_model(checked_model(stage, stage.round - 1, ranks), answers_of(config.task, languages))
    model.check_weights()
    examples = TargetExamples(dataset, config.task, languages, counts, give_targets, model, ranks.device)
    train(stage, config.distill, model, examples, ranks)


def section_of(config: Config) -> DistillConfig:
    """``distill``."""
    return config.distill


def engine_of(config: Config) -> EngineConfig:
    """``engine``."""
    return config.engine


def most_examples(dataset: Dataset, config: Config) -> list[int]:
    """Examples of all languages: only the selection will tell which languages have a teacher."""
    return example_counts(dataset, dataset.languages, config.select.num_groups)


def example_counts(dataset: Dataset, languages: Sequence[str], num_groups: int | None) -> list[int]:
    """Examples of each shard. ``num_groups``: of the first so many groups, rounded up to whole shards; None: of all."""
    num_before = np.cumsum([0, *(shard.num_groups for shard in dataset.shards)])
    return [
        sum(shard.num_examples.get(language, 0) for language in languages)
        if num_groups is None or before < num_groups
        else 0
        for shard, before in zip(dataset.shards, num_before, strict=False)
    ]


def example_of(row: EncodedRow, found: dict[str, dict[str, Target]], mean_weight: float, scores: Path) -> Example:
    """A row with its target; ``found``: key -> language -> target. Raises ``UserError`` if its group has no scores."""
    if row.key not in found:
        raise UserError(f"{scores}: has no scores of group {row.key!r}; delete it and score this dataset again")
    target = found[row.key].get(row.language)
    if target is None:  # no teacher has this group: the example stays, so that positions are known, and counts nothing
        return Example(row, np.zeros(1, dtype=np.float32), 0.0, 0.0)
    return Example(row, target.probabilities.astype(np.float32), target.weight / mean_weight, target.entropy)
