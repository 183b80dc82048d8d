"""Stage 0 of the method: the model learns the task from labels in the source language."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from alsace_dist.config import Config, EngineConfig, FinetuneConfig, Split
from alsace_dist.data.held_out import watched_languages
from alsace_dist.data.rows import EncodedRow, Example, one_hot_example
from alsace_dist.data.texts import check_texts
from alsace_dist.errors import UserError
from alsace_dist.files.layout import FINETUNE, data_url
from alsace_dist.files.manifest import digest_bytes
from alsace_dist.files.shards import Dataset, Label, open_dataset, open_split, read_shards
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

KIND = FINETUNE
ON_RANKS = True
SPLIT: Split = "labeled"
START = -1  # the round of the model that finetuning starts from


def inputs(stage: Stage) -> list[Output]:
    """The labeled split, and the nano model if there is one."""
    return data_inputs(stage) + model_inputs(stage, START)


def outputs(stage: Stage) -> list[Output]:
    """The finetuned model."""
    return [Output(stage.layout.finetune, KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything that the finetuned model depends on."""
    common = training_fingerprint(stage, section_of(stage.config), model_identity(stage, START))
    return common | {"data": open_dataset(data_url(stage.config, "labeled")).digest}


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Train on the labels of the source language. Raises ``UserError`` if there are too few."""
    from alsace_dist.training.examples import TargetExamples
    from alsace_dist.training.tokens import Tokens

    assert ranks is not None
    config, section = stage.config, section_of(stage.config)
    dataset = open_split(config, "labeled")
    languages = [config.data.source_language]
    counts, chosen = example_counts(dataset, config), None
    if section.shots is not None:
        chosen = ranks.from_main(shots_of(dataset, config, section.shots) if ranks.is_main else None)
        counts = [len(keys) for keys in chosen]

    def targets(shard: int, rows: Sequence[EncodedRow]) -> list[Example]:
        kept = learnt(rows, counts[shard], chosen and set(chosen[shard]))
        return [one_hot_example(row, dataset.url) for row in kept]

    answered = sorted({*languages, *watched_languages(config, section)})
    model = open_model(stage, START, answered, ranks)
    ranks.main_first(lambda: check_texts(model.encode, dataset, languages, config))
    examples = TargetExamples(Tokens(dataset, config.task, languages, model), counts, targets, model, ranks.device)
    train(stage, section, model, examples, ranks)


def engine_of(config: Config) -> EngineConfig:
    """``engine``."""
    return config.engine


def most_examples(dataset: Dataset, config: Config) -> list[int]:
    """As ``example_counts``."""
    return example_counts(dataset, config)


def example_counts(dataset: Dataset, config: Config) -> list[int]:
    """Labeled groups of each shard that are learnt from: how many in all, if not yet of which shards (``shots``).

    Raises ``UserError`` if there are too few.
    """
    language, section = config.data.source_language, section_of(config)
    limit = section.num_examples or (section.shots or 0) * len(config.task.labels) or None
    counts = [shard.num_examples.get(language, 0) for shard in dataset.shards]
    if sum(counts) == 0:
        raise UserError(f"{dataset.url}: no groups in {language!r}; check data.source_language")
    if limit is None:
        return counts
    if limit > sum(counts):
        name = "shots" if section.shots else "num_examples"
        raise UserError(f"finetune.{name}: {limit} labeled groups asked for, {dataset.url} has {sum(counts)}; lower it")
    first: list[int] = np.diff(np.minimum(np.cumsum([0, *counts]), limit)).tolist()
    return first


def learnt(rows: Sequence[EncodedRow], count: int, keys: Collection[str] | None) -> Sequence[EncodedRow]:
    """The rows of a shard that are learnt from: the first so many, or those of these groups."""
    return rows[:count] if keys is None else [row for row in rows if row.key in keys]


def shots_of(dataset: Dataset, config: Config, shots: int) -> list[list[str]]:
    """Ids of each shard's labeled groups that are learnt from, equally many of each label. Raises ``UserError`` if a
    label has too few."""
    language = config.data.source_language
    groups = [[group for group in part if language in group.texts] for part in read_shards(dataset)]
    by_label: dict[Label, list[str]] = {}
    for group in (group for part in groups for group in part):
        by_label.setdefault(group.label, []).append(group.key)
    kept: set[str] = set()
    for label, name in enumerate(config.task.labels):
        keys = sorted(by_label.get(label, []), key=lambda key: digest_bytes(f"{config.seed}:{key}".encode()))
        if len(keys) < shots:
            raise UserError(
                f"finetune.shots: {shots} of label {name!r} asked for, {dataset.url} has {len(keys)} in {language!r}; "
                "lower it, or add labeled groups"
            )
        kept.update(keys[:shots])
    return [[group.key for group in part if group.key in kept] for part in groups]


def section_of(config: Config) -> FinetuneConfig:
    """``finetune``."""
    assert config.finetune is not None, "the stage is only there with its section"
    return config.finetune
