"""The examples of finetuning and distillation: encoded rows with the targets that they learn from, or whole groups."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alsace_dist.data.rows import EncodedRow, Example
from alsace_dist.data.tokens import TokenRows
from alsace_dist.method.targets import lessons
from alsace_dist.models.family import Family
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training.losses import Divergence, FrozenTargetLoss, LiveTeacherLoss, MicroBatch, Pairs, Watched
from alsace_dist.training.observer import Observer
from alsace_dist.training.tokens import Tokens


class Examples(Protocol):
    """The training examples of a stage."""

    @property
    def counts(self) -> Sequence[int]:
        """Number of examples of each shard."""

    @property
    def observer(self) -> Observer | None:
        """What observes how near the model is to its targets; None: there are no answers to look at."""

    def make_ready(
        self, directory: Path, fingerprint: dict[str, Any], shards: Collection[int], watchdog: Watchdog
    ) -> None:
        """Before any of these shards is loaded: do what loading them needs once. Collective.

        ``directory``: a place for it; ``fingerprint``: everything that the examples depend on; ``watchdog``: entered,
        it hears of progress.
        """

    def expect(self, shards: Iterable[int]) -> None:
        """Hear which shards will be loaded from now on, in their order."""

    def load(self, shard: int) -> Sequence[Any]:
        """All examples of a shard, in a fixed order: rows that ``build`` makes the examples of."""

    def build(self, row: Any, pass_index: int) -> Any:
        """The example that a row is in one pass over the data: a function of the two."""

    def rows(self, example: Any) -> Sequence[EncodedRow]:
        """The rows that an example is made of."""

    def length(self, example: Any) -> int:
        """Encoder tokens of an example."""

    def stretched(self, example: Any) -> Any:
        """An example like this one, as long as the longest may be."""

    def collate(self, examples: list[Any]) -> MicroBatch:
        """A micro-batch."""

    def flops(self, num_rows: int, num_tokens: int) -> float:
        """Of a forward pass over rows of so many encoder tokens in all; 0 where nobody knows them."""


ANSWER_TOKENS = 2  # positions at which a decoder answers, for counting FLOPs: few beside those of a prompt


def forward_flops(model: Family, num_rows: int, num_tokens: int) -> float:
    """Of a forward pass over so many rows, as if all were equally long."""
    return num_rows * model.forward_flops(model.config, [round(num_tokens / num_rows)], ANSWER_TOKENS)


@dataclass(frozen=True)
class TargetExamples:
    """``Examples`` over encoded rows.

    ``counts``: examples of each shard. ``targets(shard, rows)``: the rows that count with what they learn from.
    """

    tokens: Tokens
    counts: Sequence[int]
    targets: Callable[[int, TokenRows], Sequence[Example]]
    model: Family
    device: torch.device

    @cached_property
    def observer(self) -> Observer:
        """By the languages of the rows."""
        return Observer(sorted(self.tokens.languages), self.model.answers.num_candidates)

    def make_ready(
        self, directory: Path, fingerprint: dict[str, Any], shards: Collection[int], watchdog: Watchdog
    ) -> None:
        """Tokenise the shards."""
        self.tokens.make(directory, fingerprint, shards, watchdog)

    def expect(self, shards: Iterable[int]) -> None:
        """Their tokens are on the disk."""

    def load(self, shard: int) -> Sequence[Example]:
        """Give targets to the rows of a shard."""
        return self.targets(shard, self.tokens.open(shard))

    def build(self, row: Example, pass_index: int) -> Example:
        """The same in every pass."""
        return row

    def rows(self, example: Example) -> Sequence[EncodedRow]:
        """Its own."""
        return [example.row]

    def length(self, example: Example) -> int:
        """Encoder tokens."""
        return self.model.num_tokens(example.row)

    def stretched(self, example: Example) -> Example:
        """With a prompt of ``task.max_tokens``."""
        return replace(example, row=self.model.stretched(example.row))

    def collate(self, examples: list[Example]) -> MicroBatch:
        """A micro-batch with its loss."""
        inputs = self.model.collate([example.row for example in examples]).pinned(self.device)
        loss = FrozenTargetLoss(inputs, examples, self.device, self.observer)
        return MicroBatch(loss, *inputs.num_tokens, len(examples))

    def flops(self, num_rows: int, num_tokens: int) -> float:
        """As the family counts them."""
        return forward_flops(self.model, num_rows, num_tokens)


@dataclass(frozen=True)
class GroupExamples:
    """``Examples`` for live teachers: an example is a parallel group, all of whose languages run together.

    ``counts``: groups of each shard that are learnt from. ``weights``: teacher -> weight, the best first; ``biases``:
    language -> bias per candidate, of teachers; ``mode``: ``distill.targets``. ``mean_pairs``: pairs of a group on
    average, by which the loss is divided, so that it is the mean over pairs whatever groups a batch holds.
    """

    tokens: Tokens
    counts: Sequence[int]
    weights: Mapping[str, float]
    biases: Mapping[str, np.ndarray]
    mode: str
    mean_pairs: float
    divergence: Divergence
    model: Family
    device: torch.device

    @cached_property
    def observer(self) -> Observer:
        """By the languages of the rows."""
        return Observer(sorted(self.tokens.languages), self.model.answers.num_candidates)

    def make_ready(
        self, directory: Path, fingerprint: dict[str, Any], shards: Collection[int], watchdog: Watchdog
    ) -> None:
        """Tokenise the shards."""
        self.tokens.make(directory, fingerprint, shards, watchdog)

    def expect(self, shards: Iterable[int]) -> None:
        """Their tokens are on the disk."""

    def load(self, shard: int) -> list[tuple[TokenRows, slice]]:
        """The groups of a shard: where the rows of each are, one a language."""
        rows = self.tokens.open(shard)
        return [(rows, group) for group in rows.groups()]

    def build(self, row: tuple[TokenRows, slice], pass_index: int) -> list[EncodedRow]:
        """The rows of a group, the same in every pass."""
        rows, group = row
        return rows[group]

    def rows(self, example: list[EncodedRow]) -> Sequence[EncodedRow]:
        """One a language."""
        return example

    def length(self, example: list[EncodedRow]) -> int:
        """Encoder tokens, padding within the group included."""
        return len(example) * max(map(self.model.num_tokens, example))

    def stretched(self, example: list[EncodedRow]) -> list[EncodedRow]:
        """In every language, with prompts of ``task.max_tokens``."""
        rows = [replace(example[0], language=language) for language in self.tokens.languages]
        return [self.model.stretched(row) for row in rows]

    def collate(self, examples: list[list[EncodedRow]]) -> MicroBatch:
        """A micro-batch of whole groups with its loss."""
        rows = [row for group in examples for row in group]
        inputs = self.model.collate(rows).pinned(self.device)
        biases = np.zeros((len(rows), inputs.num_candidates), dtype=np.float32)
        for index, row in enumerate(rows):
            if row.language in self.biases:
                biases[index] = self.biases[row.language]
        pairs, watched = self._pairs(examples), self._watched(examples)
        loss = LiveTeacherLoss(inputs, pairs, torch.from_numpy(biases), self.divergence, self.device, watched)
        return MicroBatch(loss, *inputs.num_tokens, len(rows))

    def flops(self, num_rows: int, num_tokens: int) -> float:
        """As the family counts them."""
        return forward_flops(self.model, num_rows, num_tokens)

    def _watched(self, examples: list[list[EncodedRow]]) -> Watched:
        rows = [row for group in examples for row in group]
        return Watched(
            self.observer,
            self.observer.places(row.language for row in rows),
            torch.repeat_interleave(torch.arange(len(examples)), torch.tensor([len(group) for group in examples])),
            len(examples),
            torch.tensor([0.0 if row.is_apart else 1.0 for row in rows]),
        )

    def _pairs(self, examples: list[list[EncodedRow]]) -> Pairs:
        found: list[tuple[int, int, float]] = []
        start = 0
        for group in examples:
            place = {row.language: start + index for index, row in enumerate(group) if not row.is_apart}
            for learner, lesson in lessons(place, self.weights, self.mode).items():
                for teacher, share in zip(lesson.teachers, lesson.shares, strict=True):
                    found.append((place[teacher], place[learner], lesson.weight * share / self.mean_pairs))
            start += len(group)
        teachers, learners, weights = zip(*found, strict=True) if found else ((), (), ())
        return Pairs(
            torch.tensor(teachers, dtype=torch.int64),
            torch.tensor(learners, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
        )
