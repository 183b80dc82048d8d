"""Pretraining of a nano mT5: its own Unigram tokenizer, then span corruption with the one training loop.

Examples are single texts and pairs of translations one after the other (as in TLM and mT6), which is what makes a
small model carry what it learns in one language over to others.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alsace_dist import __version__
from alsace_dist.config import NOT_IN_FINGERPRINT, Config, EngineConfig, PretrainConfig, Split
from alsace_dist.errors import UserError
from alsace_dist.files import manifest
from alsace_dist.files.layout import PRETRAIN, data_url
from alsace_dist.files.shards import Dataset, ParallelGroup, open_dataset, open_split, read_shard, read_shards
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.stages.base import Output, Stage, data_inputs, only
from alsace_dist.stages.train import run_training

if TYPE_CHECKING:
    import torch

    from alsace_dist.data.rows import EncodedRow
    from alsace_dist.models.nano import NanoModel
    from alsace_dist.training.losses import MicroBatch

KIND = PRETRAIN
ON_RANKS = True
SPLIT: Split = "pretrain"


def inputs(stage: Stage) -> list[Output]:
    """The pretrain split."""
    return data_inputs(stage)


def outputs(stage: Stage) -> list[Output]:
    """The nano model."""
    return [Output(stage.layout.pretrain, KIND)]


def fingerprint(stage: Stage, output: Output) -> dict[str, Any]:
    """Everything the pretrained model depends on."""
    config = stage.config
    assert config.model.nano is not None
    return {
        "section": config.pretrain.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT),
        "nano": config.model.nano.model_dump(mode="json"),
        "answers": config.task.answers(),
        "dtype": config.engine.dtype,
        "seed": config.seed,
        "data": open_dataset(data_url(config, "pretrain")).digest,
        "code": __version__,
    }


def section_of(config: Config) -> PretrainConfig:
    """``pretrain``."""
    return config.pretrain


def engine_of(config: Config) -> EngineConfig:
    """The nano model is small: sharding would only cost time, and Adafactor's factored state cannot be sharded."""
    return config.engine.model_copy(update={"zero_stage": 0, "offload_optimizer": False, "deepspeed": {}})


def run(stage: Stage, ranks: Ranks | None) -> None:
    """Train tokenizer and model from nothing. The result is an ordinary mT5 directory in ``pretrain/model``."""
    from alsace_dist.models import nano

    assert ranks is not None
    config, output = stage.config, only(stage.outputs)
    wanted = stage.fingerprint(output)
    dataset = open_split(config, "pretrain")
    start = output.directory / "start"

    def make_start() -> None:
        manifest.begin(output.directory, KIND, wanted)
        if not (start / "config.json").exists():
            texts = (text for groups in read_shards(dataset) for text in texts_of(groups))
            assert config.model.nano is not None
            nano.write_start(start, config.model.nano, texts, config.task.answers().values())

    ranks.main_first(make_start)
    model = nano.NanoModel(start, config.pretrain.dropout, config.seed)
    examples = SpanExamples(dataset, config.pretrain, config.seed, model, ranks.device)
    run_training(stage, config.pretrain, engine_of(config), wanted, model, examples, ranks)


def texts_of(groups: Iterable[ParallelGroup]) -> Iterator[str]:
    """All texts, group by group."""
    for group in groups:
        for fields in group.texts.values():
            yield from fields.values()


# --- examples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRow:
    """One (group, language) to learn from: token ids per field, and those of its translations."""

    key: str
    language: str
    fields: list[list[int]]
    translations: list[list[list[int]]]


@dataclass(frozen=True)
class SpanExample:
    """A corrupted text: spans replaced by sentinels in the input, and spelled out after them in the target."""

    input_ids: list[int]
    target_ids: list[int]


@dataclass(frozen=True)
class SpanExamples:
    """``Examples`` of span corruption: other spans, and other pairs of translations, in every pass."""

    dataset: Dataset
    section: PretrainConfig
    seed: int
    model: "NanoModel"
    device: "torch.device"

    @property
    def observer(self) -> None:
        """Nothing is asked that could be answered right."""
        return

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each shard."""
        return most_examples(self.dataset)

    def make_ready(
        self, directory: Path, fingerprint: dict[str, Any], shards: Collection[int], watchdog: Watchdog
    ) -> None:
        """Nothing: a nano model's texts are tokenised as they come."""

    def expect(self, shards: Iterable[int]) -> None:
        """Those of a store are fetched ahead."""
        self.dataset.expect(shards)

    def load(self, shard: int) -> list[TextRow]:
        """All rows of a shard."""
        return make_rows(read_shard(self.dataset, self.dataset.shards[shard]), self.model.tokenizer)

    def build(self, row: TextRow, pass_index: int) -> SpanExample:
        """Draw a text and corrupt it: a function of seed, row and pass."""
        rng = np.random.default_rng([self.seed, pass_index, zlib.crc32(f"{row.language}/{row.key}".encode())])
        end = self.model.tokenizer.eos_token_id
        return corrupt(_choose_text(row, self.section, rng), self.section, self.model.sentinels, end, rng)

    def rows(self, example: SpanExample) -> "Sequence[EncodedRow]":
        """None: spans of a text are no row of a task."""
        return []

    def length(self, example: SpanExample) -> int:
        """Encoder tokens."""
        return len(example.input_ids)

    def stretched(self, example: SpanExample) -> SpanExample:
        """As a text of ``pretrain.max_tokens`` would be corrupted."""
        text = [example.input_ids[0]] * self.section.max_tokens
        return corrupt(text, self.section, self.model.sentinels, example.input_ids[-1], np.random.default_rng(0))

    def collate(self, examples: list[SpanExample]) -> "MicroBatch":
        """A micro-batch; its loss is the mean cross-entropy of each example's target tokens."""
        from alsace_dist.training.losses import MicroBatch

        batch = self.model.collate(examples)
        count = len(examples)
        return MicroBatch(lambda module: {"loss": module(*batch.to(self.device)).sum()}, *batch.num_tokens, count)

    def flops(self, num_rows: int, num_tokens: int) -> float:
        """Not counted: a nano model is for seeing how it works."""
        return 0.0


def most_examples(dataset: Dataset, config: Config | None = None) -> list[int]:
    """Rows of each shard: all of them."""
    return [sum(shard.num_examples.values()) for shard in dataset.shards]


def make_rows(groups: Iterable[ParallelGroup], tokenizer: Any) -> list[TextRow]:
    """One row per (group, language), in the groups' order, languages sorted.

    Raises ``UserError`` if the languages of a group have different fields, which could not be paired.
    """
    groups = list(groups)
    for group in groups:
        if len({tuple(sorted(fields)) for fields in group.texts.values()}) > 1:
            raise UserError(f"group {group.key!r} has other fields in other languages; prepare the data with one task")
    members = [
        (group.key, language, group.texts[language][field])
        for group in groups
        for language in sorted(group.texts)
        for field in sorted(group.texts[language])
    ]
    if not members:
        return []
    encoded = tokenizer([text for _, _, text in members], add_special_tokens=False)["input_ids"]
    by_group: dict[str, dict[str, list[list[int]]]] = {}
    for (key, language, _), ids in zip(members, encoded, strict=True):
        by_group.setdefault(key, {}).setdefault(language, []).append(ids)
    return [
        TextRow(key, language, fields, [other for name, other in texts.items() if name != language])
        for key, texts in by_group.items()
        for language, fields in texts.items()
    ]


def _choose_text(row: TextRow, section: PretrainConfig, rng: np.random.Generator) -> list[int]:
    """The whole text, or one of its fields with a translation of it before or after."""
    if not row.translations or rng.random() >= section.concatenate:
        return [token for field in row.fields for token in field]
    field = int(rng.integers(len(row.fields)))
    other = row.translations[int(rng.integers(len(row.translations)))][field]
    # Cut both texts to half the room, or a long text would leave nothing of its translation.
    half = section.max_tokens // 2
    pair = [row.fields[field][:half], other[:half]]
    if rng.random() < 0.5:
        pair.reverse()
    return pair[0] + pair[1]


def corrupt(
    tokens: list[int], section: PretrainConfig, sentinels: list[int], end: int, rng: np.random.Generator
) -> SpanExample:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4): random spans become sentinels.

    ``mask_ratio`` of the tokens are masked, in spans whose mean length is ``mean_span_length``.
    """
    tokens = tokens[: section.max_tokens - 1]
    num_masked = min(max(1, round(len(tokens) * section.mask_ratio)), max(1, len(tokens) - 1))
    num_spans = min(max(1, round(num_masked / section.mean_span_length)), len(sentinels), num_masked)
    num_spans = min(num_spans, len(tokens) - num_masked + 1)
    lengths = _random_parts(num_masked, num_spans, 1, rng)
    # Spans do not touch: at least one token stands between two spans, and any number before the first and after the
    # last.
    gaps = _random_parts(len(tokens) - num_masked - (num_spans - 1), num_spans + 1, 0, rng)
    gaps[1:-1] += 1
    inputs: list[int] = []
    target: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        inputs += [*tokens[position : position + gaps[index]], sentinels[index]]
        position += int(gaps[index])
        target += [sentinels[index], *tokens[position : position + length]]
        position += int(length)
    return SpanExample([*inputs, *tokens[position:], end], [*target, end])


def _random_parts(total: int, num_parts: int, least: int, rng: np.random.Generator) -> np.ndarray:
    """``num_parts`` random whole numbers of at least ``least`` that add up to ``total``, all splits equally likely."""
    free = total - least * num_parts
    cuts = np.sort(rng.choice(free + num_parts - 1, num_parts - 1, replace=False)) if num_parts > 1 else np.array([])
    edges = np.concatenate([[-1], cuts, [free + num_parts - 1]])
    return (np.diff(edges) - 1 + least).astype(int)
