"""Stage 2 of the method: every language is trained towards the distributions of the selected teachers.

Those of frozen teachers come from the scores before the round, joined to their shard by file name and key; those of
live teachers from the weights as they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alsace_dist.config import Config, DistillConfig, EngineConfig, Split
from alsace_dist.data.held_out import watched_languages
from alsace_dist.data.rows import EncodedRow, Example, one_hot_example
from alsace_dist.data.stream import Lazily
from alsace_dist.data.tokens import TokenRows
from alsace_dist.errors import UserError, warn
from alsace_dist.files import scores as score_files
from alsace_dist.files.layout import DISTILL, data_url
from alsace_dist.files.manifest import load_manifest
from alsace_dist.files.selection import KIND as SELECTION
from alsace_dist.files.selection import Selection, read_selection
from alsace_dist.files.shards import Dataset, golds, open_dataset, open_split
from alsace_dist.method.calibration import calibrate
from alsace_dist.method.targets import Target, learners, targets
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import (
    Output,
    Stage,
    data_inputs,
    model_identity,
    model_inputs,
    open_model,
)
from alsace_dist.stages.train import train, training_fingerprint

if TYPE_CHECKING:
    from alsace_dist.models.family import Family

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

    assert ranks is not None
    config, mode = stage.config, str(stage.config.distill.targets)
    dataset = open_split(config, "unlabeled")
    selection = read_selection(_selection(stage).directory)
    languages = learning(learners(dataset.languages, selection.ranked_weights, mode), dataset, config)
    if selection.num_groups > dataset.num_groups:
        raise UserError(
            f"{_selection(stage).directory}: made of {selection.num_groups:,} groups, and {dataset.url} has "
            f"{dataset.num_groups:,}; delete it and select again"
        )
    if not languages or selection.num_pairs[mode] == 0:
        teachers = ", ".join(selection.weights)
        raise UserError(
            f"{_selection(stage).directory}: {teachers} teaches, and there is no other language to learn from it"
            + (", by distill.languages" if config.distill.languages else "")
        )
    is_live = config.distill.teachers == "live"
    answered = sorted({*(dataset.languages if is_live else languages), *watched_languages(config, config.distill)})
    model = open_model(stage, stage.round - 1, answered, ranks)
    if is_live:
        _train_live(stage, dataset, selection, model, ranks)
    else:
        _train_frozen(stage, dataset, selection, languages, model, ranks)


def _train_frozen(
    stage: Stage, dataset: Dataset, selection: Selection, languages: list[str], model: "Family", ranks: Ranks
) -> None:
    """Every row learns from the distribution that its teachers had in the scoring pass."""
    from alsace_dist.training.examples import TargetExamples
    from alsace_dist.training.tokens import Tokens

    config, section, mode = stage.config, stage.config.distill, str(stage.config.distill.targets)
    scores, biases = _scores(stage).directory, selection.bias_rows()
    listed = load_manifest(scores, score_files.KIND)
    counts = example_counts(dataset, languages, selection.num_groups)
    # The mean over all pairs, not over a batch's pairs: so a batch needs to know nothing of other batches. And over all
    # languages that have teachers, whichever of them learn: so leaving one out changes no other's weight.
    taught = learners(dataset.languages, selection.ranked_weights, mode)
    num_pairs = selection.num_pairs[mode]
    if mode == "labels":
        found: list[int] = []
        ranks.main_first(lambda: found.append(_num_labels(config, scores, dataset, selection)))
        num_pairs = ranks.from_main(found[0] if found else 0)
    mean_weight = num_pairs / max(1, sum(example_counts(dataset, taught, selection.num_groups)))
    log_pool_mass = (section.pool_mass or 1.0) if section.pool == "logarithmic" else None

    def give_targets(shard: int, rows: TokenRows) -> Sequence[Example]:
        name = f"{dataset.shards[shard].stem}.parquet"
        groups = score_files.read_verified(scores, listed, name).groups()
        check_scores(rows.places(), groups, biases, scores / name)
        if mode == "labels":
            return Lazily(len(rows), lambda index: labelled_example(rows[index], dataset.url, mean_weight))

        @cache
        def of_group(key: str) -> dict[str, Target]:
            by_presence = section.group_weight == "presence"
            return targets(calibrate(groups[key], biases), selection.ranked_weights, mode, log_pool_mass, by_presence)

        def example(index: int) -> Example:
            row = rows[index]
            return example_of(row, {} if row.is_apart else of_group(row.key), mean_weight)

        return Lazily(len(rows), example)

    tokens = Tokens(dataset, config.task, languages, model)
    examples = TargetExamples(tokens, counts, give_targets, model, ranks.device)
    train(stage, config.distill, model, examples, ranks)


def _num_labels(config: Config, scores: Path, dataset: Dataset, selection: Selection) -> int:
    """Rows that learn their label: they have one, and their candidates correspond to those of other languages.

    Raises ``UserError`` if there is none.
    """
    num_labels = num_groups = 0
    for rows in score_files.read_batches(scores, selection.num_groups, config.task.num_candidates):
        has_label = rows.golds[~rows.apart, 0] >= 0 if rows.golds.shape[1] else np.zeros(int((~rows.apart).sum()), bool)
        num_labels += int(has_label.sum())
        num_groups += len(np.unique(rows.group[~rows.apart][~has_label]))
    if not num_labels:
        raise UserError(
            f"{dataset.url}: no group has a label, and distill.targets: labels learns nothing else; prepare the data "
            "again with labels in this split (data.withhold_labels)"
        )
    if num_groups:
        warn(f"distill: {num_groups:,} groups without a label are not learnt from (targets: labels)")
    return num_labels


def _train_live(stage: Stage, dataset: Dataset, selection: Selection, model: "Family", ranks: Ranks) -> None:
    """Every row learns from what the current weights say of the same group in its teachers' languages."""
    from alsace_dist.training.examples import GroupExamples
    from alsace_dist.training.losses import Divergence
    from alsace_dist.training.tokens import Tokens

    config, section, mode = stage.config, stage.config.distill, str(stage.config.distill.targets)
    counts = group_counts(dataset, selection.num_groups)
    examples = GroupExamples(
        tokens=Tokens(dataset, config.task, dataset.languages, model),
        counts=counts,
        weights=selection.ranked_weights,
        biases=selection.bias_rows(),
        mode=mode,
        mean_pairs=selection.num_pairs[mode] / sum(counts),
        divergence=Divergence(str(section.divergence), bool(section.teacher_gradient), section.temperature),
        model=model,
        device=ranks.device,
    )
    if section.micro_batch_size is not None:  # rows, as people count them
        num_groups = max(1, section.micro_batch_size // len(dataset.languages))
        section = section.model_copy(update={"micro_batch_size": num_groups})
    train(stage, section, model, examples, ranks)


def section_of(config: Config) -> DistillConfig:
    """``distill``."""
    return config.distill


def engine_of(config: Config) -> EngineConfig:
    """``engine``."""
    return config.engine


def most_examples(dataset: Dataset, config: Config) -> list[int]:
    """Examples of all languages: only the selection will tell which have a teacher. With live teachers groups."""
    if config.distill.teachers == "live":
        return group_counts(dataset, config.select.num_groups)
    return example_counts(dataset, learning(dataset.languages, dataset, config), config.select.num_groups)


def learning(languages: Sequence[str], dataset: Dataset, config: Config) -> list[str]:
    """Those of the languages that are to learn. Raises ``UserError`` if the dataset lacks one that the config names."""
    wanted = config.distill.languages
    if wanted is None:
        return list(languages)
    if wanted == "source":
        wanted = [config.data.source_language]
    if unknown := sorted(set(wanted) - set(dataset.languages)):
        raise UserError(
            f"distill.languages: {', '.join(unknown)} not among {', '.join(dataset.languages)} of {dataset.url}; "
            "correct it"
        )
    return [language for language in languages if language in wanted]


def example_counts(dataset: Dataset, languages: Sequence[str], num_groups: int | None) -> list[int]:
    """Examples of each shard. ``num_groups``: of the first so many groups, rounded up to whole shards; None: of all."""
    return [
        sum(shard.num_examples.get(language, 0) for language in languages) if number else 0
        for shard, number in zip(dataset.shards, group_counts(dataset, num_groups), strict=True)
    ]


def group_counts(dataset: Dataset, num_groups: int | None) -> list[int]:
    """Groups of each shard, as ``example_counts`` counts examples."""
    num_before = np.cumsum([0, *(shard.num_groups for shard in dataset.shards)])
    return [
        shard.num_groups if num_groups is None or before < num_groups else 0
        for shard, before in zip(dataset.shards, num_before, strict=False)
    ]


def check_scores(
    places: Iterable[tuple[str, str, int]],
    groups: dict[str, dict[str, np.ndarray]],
    biases: dict[str, np.ndarray],
    file: Path,
) -> None:
    """Hold a shard's scores (key -> language -> log-probabilities) against its rows and the biases of the selection.

    ``places``: key, language and number of candidates of each row whose candidates correspond. Raises ``UserError`` if
    a row has no scores, or not as many as candidates or biases, or some that are no numbers.
    """
    for key, language, num_candidates in places:
        own = groups.get(key, {}).get(language)
        where = f"{file}: group {key!r}, language {language!r}"
        if own is None:
            raise UserError(f"{where}: has no scores; delete {file.parent} and score this dataset again")
        for what, size in (("candidates", num_candidates), ("biases", len(biases.get(language, own)))):
            if size != len(own):
                raise UserError(f"{where}: {len(own)} scores and {size} {what}; score and select again")
    for key, group in groups.items():
        if not all(np.isfinite(own).all() for own in group.values()):
            raise UserError(
                f"{file}: group {key!r}: scores that are no numbers; the model has diverged: lower its learning rate, "
                "train and score again"
            )
        if len({len(own) for own in group.values()}) > 1:
            raise UserError(f"{file}: group {key!r}: languages have different numbers of candidates; score again")


def labelled_example(row: EncodedRow, place: str, mean_weight: float) -> Example:
    """A row that learns its label; one that has none, or stands apart, stays and counts nothing."""
    if row.is_apart or not golds(row.label):
        return _unlearnt(row)
    return replace(one_hot_example(row, place), weight=1 / mean_weight)


def _unlearnt(row: EncodedRow) -> Example:
    """An example that stays, so that positions are known, and counts nothing."""
    return Example(row, np.zeros(1, dtype=np.float32), 0.0, 0.0)


def example_of(row: EncodedRow, found: dict[str, Target], mean_weight: float) -> Example:
    """A row with its target; ``found``: of its group, language -> target."""
    target = found.get(row.language)
    if target is None:  # no teacher has this group
        return _unlearnt(row)
    return Example(row, target.probabilities.astype(np.float32), target.weight / mean_weight, target.entropy)
