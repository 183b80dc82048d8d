"""The examples of finetuning and distillation: encoded rows of a dataset with the targets that they learn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from alsace_dist.config import TaskConfig
from alsace_dist.data.rows import EncodedRow, Example, rows_of
from alsace_dist.files.shards import Dataset, read_shard
from alsace_dist.models.family import Family
from alsace_dist.training.losses import FrozenTargetLoss, MicroBatch


@dataclass(frozen=True)
class TargetExamples:
    """``loop.Examples`` over the rows of some languages of a dataset.

    ``counts``: examples of each shard. ``targets(shard, rows)``: the rows that count with what they learn from.
    """

    dataset: Dataset
    task: TaskConfig
    languages: Sequence[str]
    counts: Sequence[int]
    targets: Callable[[int, list[EncodedRow]], list[Example]]
    model: Family
    device: torch.device

    def load(self, shard: int) -> list[Example]:
        """Read, encode and give targets to a shard."""
        groups = read_shard(self.dataset, self.dataset.shards[shard])
        return self.targets(shard, self.model.encode(rows_of(self.task, groups, self.languages)))

    def build(self, row: Example, pass_index: int) -> Example:
        """The same in every pass."""
        return row

    def length(self, example: Example) -> int:
        """Encoder tokens."""
        return len(example.row.input_ids)

    def collate(self, examples: list[Example]) -> MicroBatch:
        """A micro-batch with its loss."""
        inputs = self.model.collate([example.row for example in examples])
        return MicroBatch(FrozenTargetLoss(inputs, examples, self.device), *inputs.num_tokens)
