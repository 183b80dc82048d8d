"""Finetuning and distillation: the training loop over (prompt, target distribution) pairs.

Finetuning has one-hot targets from the source language's labels; distillation has the frozen teachers' distributions
from the scores, joined to their shard by file name and key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import NOT_IN_FINGERPRINT, Config, DistillConfig, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files import scores as score_files
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.shards import Dataset, open_dataset, read_shard
from alsace_dist.method import languages
from alsace_dist.ranks.group import Runtime
from alsace_dist.tasks.base import EncodedText, encode_answers, encode_groups


@dataclass(frozen=True)
class Example:
    """A prompt and its target distribution [K]; ``weight`` and ``entropy`` as in ``languages.Target``."""

    input_ids: list[int]
    language: str
    target: np.ndarray
    weight: float
    entropy: float


@dataclass(frozen=True)
class Source:
    """Where training examples come from: a dataset, the languages of it that learn, how many examples each shard has,
    and ``make(shard, rows)``, which gives its prompts their targets."""

    dataset: Dataset
    languages: list[str]
    counts: list[int]
    make: Callable[[int, list[EncodedText]], list[Example]]


def finetune_fingerprint(config: Config, model: dict[str, Any]) -> dict[str, Any]:
    """Everything the finetuned model depends on; ``model``: identity of the model that it starts from."""
    assert config.finetune is not None
    return _fingerprint(config, config.finetune, model) | {"data": open_dataset(data_url(config, "labeled")).digest}


def distill_fingerprint(config: Config, model: dict[str, Any], scores: Path, selection: Path) -> dict[str, Any]:
    """Everything a distilled model depends on."""
    return _fingerprint(config, config.distill, model) | {
        "data": open_dataset(data_url(config, "unlabeled")).digest,
        "scores": artifacts.load_manifest(scores, score_files.KIND).digest,
        "selection": artifacts.load_manifest(selection, "selection").digest,
    }


def _fingerprint(config: Config, section: TrainConfig, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "section": section.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT),
        "task": config.task.model_dump(mode="json"),
        "source_language": config.data.source_language,
        "dtype": config.engine.dtype,
        "deepspeed": config.engine.deepspeed,
        "seed": config.seed,
        "model": model,
        "code": artifacts.__version__,
    }


def finetune(config: Config, model: Path, directory: Path, fingerprint: dict[str, Any], runtime: Runtime) -> None:
    """Train on the labels of the source language. Raises ``UserError`` if there are none."""
    assert config.finetune is not None
    dataset = open_dataset(data_url(config, "labeled"))
    source = config.data.source_language
    counts = [shard.num_examples.get(source, 0) for shard in dataset.shards]
    if sum(counts) == 0:
        raise UserError(f"{dataset.url}: no groups in {source!r}; check data.source_language")
    if (limit := config.finetune.num_examples) is not None:
        if limit > sum(counts):
            raise UserError(f"finetune.num_examples: {limit} asked for, {dataset.url} has {sum(counts)}; lower it")
        counts = np.diff(np.minimum(np.cumsum([0, *counts]), limit)).tolist()
    one_hot = np.eye(len(config.task.labels), dtype=np.float32)

    def make(row: EncodedText) -> Example:
        if row.label is None or not 0 <= row.label < len(one_hot):
            raise UserError(f"{dataset.url}: group {row.key!r} has the label {row.label}; prepare the data again")
        return Example(row.input_ids, row.language, one_hot[row.label], 1.0, 0.0)

    examples = Source(dataset, [source], counts, lambda shard, rows: [make(row) for row in rows[: counts[shard]]])
    _train("finetune", config, config.finetune, model, directory, fingerprint, examples, runtime)


def distill(
    config: Config,
    model: Path,
    scores: Path,
    selection: Path,
    directory: Path,
    fingerprint: dict[str, Any],
    runtime: Runtime,
) -> None:
    """Train every language towards the frozen distributions of the selected teachers."""
    section: DistillConfig = config.distill
    dataset = open_dataset(data_url(config, "unlabeled"))
    artifacts.verify_files(selection, artifacts.load_manifest(selection, "selection"))
    teachers = artifacts.read_json(selection / "teachers.json")
    listed = artifacts.load_manifest(scores, score_files.KIND)
    weights: dict[str, float] = teachers["weights"]
    biases = {language: np.array(row) for language, row in teachers["biases"].items()}
    taught = list(dataset.languages)
    if section.targets == "others" and len(weights) == 1:
        taught = [language for language in taught if language not in weights]  # nobody teaches the only teacher
    num_before = np.cumsum([0, *(shard.num_groups for shard in dataset.shards)])
    counts = [
        sum(shard.num_examples.get(language, 0) for language in taught) if before < teachers["num_groups"] else 0
        for shard, before in zip(dataset.shards, num_before, strict=False)
    ]
    if sum(counts) == 0:
        raise UserError(f"{selection}: {', '.join(weights)} teaches, and there is no other language to learn from it")
    # The mean over all pairs, not over a batch's pairs: a batch needs to know nothing of the others.
    mean_weight = teachers["num_pairs"][section.targets] / max(1, sum(counts))

    def make(shard: int, rows: list[EncodedText]) -> list[Example]:
        groups = score_files.read_verified(scores, listed, f"{dataset.shards[shard].stem}.parquet").groups()
        found = {
            key: languages.targets(languages.calibrate(group, biases), weights, str(section.targets))
            for key, group in groups.items()
        }
        return [_distill_example(row, found, mean_weight, scores) for row in rows]

    _train("distill", config, section, model, directory, fingerprint, Source(dataset, taught, counts, make), runtime)


def _distill_example(
    row: EncodedText, found: dict[str, dict[str, languages.Target]], mean_weight: float, scores: Path
) -> Example:
    if row.key not in found:
        raise UserError(f"{scores}: has no scores of group {row.key!r}; delete it and score this dataset again")
    target = found[row.key].get(row.language)
    if target is None:  # no teacher has this group: the example stays, so that positions are known, and counts nothing
        return Example(row.input_ids, row.language, np.zeros(1, dtype=np.float32), 0.0, 0.0)
    return Example(
        row.input_ids,
        row.language,
        target.probabilities.astype(np.float32),
        target.weight / mean_weight,
        target.entropy,
    )


def _train(
    kind: str,
    config: Config,
    section: TrainConfig,
    model: Path,
    directory: Path,
    fingerprint: dict[str, Any],
    examples: Source,
    runtime: Runtime,
) -> None:
    from alsace_dist.models import collate
    from alsace_dist.models import mt5 as modeling
    from alsace_dist.training import engine, loop

    tokenizer = modeling.load_tokenizer(model)
    start = modeling.load_model_config(model).decoder_start_token_id
    answers = encode_answers(config.task, tokenizer, examples.languages, start)
    module, value = engine.load_scorer(model, answers, config.engine, section.dropout, runtime)
    if section.freeze_vocabulary:
        module.body.shared.weight.requires_grad_(False)
    collator = collate.AnswerCollator(answers, tokenizer.pad_token_id)

    def load(shard: int) -> list[Example]:
        groups = read_shard(examples.dataset, examples.dataset.shards[shard])
        return examples.make(shard, encode_groups(config.task, tokenizer, groups, examples.languages))

    def collate_examples(batch: list[Example]) -> loop.MicroBatch:
        inputs = collator([example.input_ids for example in batch], [example.language for example in batch])
        loss = AnswerLoss(inputs, batch, answers.num_candidates, runtime.device)
        return loop.MicroBatch(loss, *inputs.num_tokens)

    runtime.main_first(lambda: artifacts.begin(directory, kind, fingerprint))
    loop.run(
        loop.Job(
            kind=kind,
            directory=directory,
            tensorboard=Layout(Path(config.run_dir)).tensorboard(directory),
            section=section,
            engine=config.engine,
            seed=config.seed,
            fingerprint=fingerprint,
            module=module,
            value=value,
            counts=examples.counts,
            load=load,
            build=lambda example, pass_index: example,
            length=lambda example: len(example.input_ids),
            collate=collate_examples,
            source=model,
            head_rows=answers.vocabulary if answers.single_token else list(range(module.body.config.vocab_size)),
        ),
        runtime,
    )


class AnswerLoss:
    """Sum over a micro-batch of ``weight * (CE(target, model) - entropy)``, in float32.

    With the targets of ``languages.targets`` this is the sum of KL(teacher || model) over the pairs they stand for.
    """

    def __init__(self, inputs: Any, examples: list[Example], num_candidates: int, device: Any) -> None:
        import torch

        rows = np.stack([np.broadcast_to(example.target, num_candidates) for example in examples])
        self._inputs, self._device = inputs, device
        self._targets = torch.from_numpy(rows.astype(np.float32))
        self._weights = torch.tensor([example.weight for example in examples])
        self._entropies = torch.tensor([example.entropy for example in examples])

    def __call__(self, module: Any) -> Any:
        from alsace_dist.models.collate import to_device

        targets, weights, entropies = to_device(self._device, self._targets, self._weights, self._entropies)
        log_probs = module(*self._inputs.to(self._device))
        cross_entropy = -(targets * log_probs).sum(dim=-1)
        return (weights * (cross_entropy - entropies)).sum()
