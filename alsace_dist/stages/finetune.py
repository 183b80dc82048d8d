"""Stage 0 of the method: the model learns the task from labels in the source language."""

from typing import Any

import numpy as np

from alsace_dist.config import Config, EngineConfig, FinetuneConfig, Split
from alsace_dist.data.rows import EncodedRow, Example, answers_of
from alsace_dist.errors import UserError
from alsace_dist.files.layout import FINETUNE, data_url
from alsace_dist.files.shards import Dataset, open_dataset
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
    from alsace_dist.models.family import open_model
    from alsace_dist.training.examples import TargetExamples

    assert ranks is not None
    config, section = stage.config, section_of(stage.config)
    dataset = open_dataset(data_url(config, "labeled"))
    languages = [config.data.source_language]
    counts = example_counts(dataset, config)
    one_hot = np.eye(len(config.task.labels), dtype=np.float32)

    def targets(shard: int, rows: list[EncodedRow]) -> list[Example]:
        return [_example(row, one_hot, dataset.url) for row in rows[: counts[shard]]]

    model = open_model(checked_model(stage, START, ranks), answers_of(config.task, languages))
    model.check_weights()
    examples = TargetExamples(dataset, config.task, languages, counts, targets, model, ranks.device)
    train(stage, section, model, examples, ranks)


def engine_of(config: Config) -> EngineConfig:
    """``engine``."""
    return config.engine


def most_examples(dataset: Dataset, config: Config) -> list[int]:
    """As ``example_counts``."""
    return example_counts(dataset, config)


def example_counts(dataset: Dataset, config: Config) -> list[int]:
    """Labeled groups of each shard that are learnt from. Raises ``UserError`` if there are too few."""
    language, limit = config.data.source_language, section_of(config).num_examples
    counts = [shard.num_examples.get(language, 0) for shard in dataset.shards]
    if sum(counts) == 0:
        raise UserError(f"{dataset.url}: no groups in {language!r}; check data.source_language")
    if limit is None:
        return counts
    if limit > sum(counts):
        raise UserError(f"finetune.num_examples: {limit} asked for, {dataset.url} has {sum(counts)}; lower it")
    first: list[int] = np.diff(np.minimum(np.cumsum([0, *counts]), limit)).tolist()
    return first


def section_of(config: Config) -> FinetuneConfig:
    """``finetune``."""
    assert config.finetune is not None, "the stage is only there with its section"
    return config.finetune


def _example(row: EncodedRow, one_hot: np.ndarray, url: str) -> Example:
    if row.label is None or not 0 <= row.label < len(one_hot):
        raise UserError(f"{url}: group {row.key!r} has the label {row.label}; prepare the data again")
    return Example(row, one_hot[row.label], 1.0, 0.0)
