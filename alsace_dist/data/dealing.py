"""How scoring is dealt to ranks: whole shards, and parts of them where few shards would leave ranks without work."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from alsace_dist.config import Config
from alsace_dist.data.rows import EncodedRow
from alsace_dist.files.scores import PART, Scores
from alsace_dist.files.shards import ShardInfo

Item = TypeVar("Item")
PARTS_PER_RANK = 4  # in the end, so that a slow rank, or one with a large part, keeps the others waiting little


class Part(NamedTuple):
    """Of the batches that a shard is cut into, in their order, part ``number`` (from 0) of ``num_parts`` equal ones."""

    shard: ShardInfo
    number: int = 0
    num_parts: int = 1

    def of(self, batches: Sequence[Item]) -> Sequence[Item]:
        """Its batches; none if there are fewer than parts."""
        first, last = (len(batches) * (self.number + more) // self.num_parts for more in (0, 1))
        return batches[first:last]

    @property
    def name(self) -> str:
        """Name of the file of its results, without suffix; a whole shard's is the shard's own."""
        return self.shard.stem + (f".{PART}{self.number + 1}-of-{self.num_parts}" if self.num_parts > 1 else "")


@dataclass
class Work:
    """A part of a shard being scored: the shard's rows, the part's batches (indices of rows), and the results so far.

    ``number``: how many parts have been drawn, this one included.
    """

    part: Part
    number: int
    rows: list[EncodedRow]
    cut: Sequence[list[int]]
    results: dict[int, np.ndarray] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def scores(self) -> Scores:
        """The results as they are written: rows in shard order."""
        rows = [self.rows[index] for index in sorted(self.results)]
        values = [self.results[index] for index in sorted(self.results)]
        keys, languages, labels = ([getattr(row, name) for row in rows] for name in ("key", "language", "label"))
        apart, categories = [row.is_apart for row in rows], [row.category for row in rows]
        return Scores(keys, languages, values, labels, apart, categories)


def most_batches(config: Config, shard: ShardInfo) -> int:
    """More batches than this a shard is not cut into, for no prompt is longer than the longest."""
    longest = sum(shard.num_examples.values()) * config.task.max_tokens
    return longest // config.score.tokens_per_batch + 1


def deal(shards: Sequence[ShardInfo], num_ranks: int, most_parts: Callable[[ShardInfo], int]) -> list[Part]:
    """What ranks may draw, in order. ``most_parts``: of a shard, for it has no more batches.

    Each rank that draws of a shard reads and tokenises all of it, so only the last shards are divided.
    """
    tail = shards[-PARTS_PER_RANK * num_ranks :]
    count = math.ceil(PARTS_PER_RANK * num_ranks / max(1, len(tail))) if num_ranks > 1 else 1
    parts = [Part(shard) for shard in shards[: len(shards) - len(tail)]]
    for shard in tail:
        own = max(1, min(count, most_parts(shard)))
        parts += [Part(shard, number, own) for number in range(own)]
    return parts
