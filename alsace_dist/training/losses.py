"""Losses: what is minimised over a micro-batch, and what else is counted on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alsace_dist.data.rows import Example
from alsace_dist.models.batches import Inputs, to_device


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch. ``sums(module)``: float32 sums over its examples by the name of their scalar, "loss" among them;
    encoder tokens without and with padding."""

    sums: Callable[[nn.Module], dict[str, Tensor]]
    num_tokens: int
    num_padded_tokens: int

    def without_effect(self) -> "MicroBatch":
        """The same forward and backward pass with zero loss, and nothing of it counted but the padding."""

        def zero(module: nn.Module) -> dict[str, Tensor]:
            return {name: value * 0.0 for name, value in self.sums(module).items()}

        return MicroBatch(zero, 0, self.num_padded_tokens)


class FrozenTargetLoss:
    """Sum over a micro-batch of ``weight * (CE(target, model) - entropy)``, in float32.

    With the targets of ``method.targets`` this is the sum of KL(teacher || model) over the pairs they stand for; with
    one-hot targets the cross-entropy.
    """

    def __init__(self, inputs: Inputs, examples: Sequence[Example], device: torch.device) -> None:
        self._inputs, self._device = inputs, device
        self._targets = torch.from_numpy(_stacked([example.target for example in examples], inputs.num_candidates))
        self._weights = torch.tensor([example.weight for example in examples])
        self._entropies = torch.tensor([example.entropy for example in examples])

    def __call__(self, module: Any) -> dict[str, Tensor]:
        targets, weights, entropies = to_device(self._device, self._targets, self._weights, self._entropies)
        log_probs = module(*self._inputs.to(self._device))
        # A candidate that a row lacks has probability 0: 0 * -inf must not count.
        cross_entropy = -torch.where(targets > 0, targets * log_probs, 0.0).sum(dim=-1)
        return {"loss": (weights * (cross_entropy - entropies)).sum()}


def _stacked(rows: Sequence[np.ndarray], num_candidates: int) -> np.ndarray:
    """Targets as float32 [rows, K], filled up with zeros."""
    stacked = np.zeros((len(rows), num_candidates), dtype=np.float32)
    for row, target in zip(stacked, rows, strict=True):
        row[: len(target)] = target
    return stacked
