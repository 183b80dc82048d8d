"""Losses: what is minimised over a micro-batch, and what else is counted on the way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alsace_dist.data.rows import Example
from alsace_dist.models.batches import Inputs, to_device
from alsace_dist.training.observer import Observer


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch. ``sums(module)``: float32 sums over its examples by name, "loss" among them, and what the loss has
    observed (``monitor.observed``); encoder tokens without and with padding; rows."""

    sums: Callable[[nn.Module], dict[str, Tensor]]
    num_tokens: int
    num_padded_tokens: int
    num_rows: int

    def without_effect(self) -> "MicroBatch":
        """The same forward and backward pass with zero loss, and nothing of it counted but the padding."""

        def zero(module: nn.Module) -> dict[str, Tensor]:
            return {name: value * 0.0 for name, value in self.sums(module).items()}

        return MicroBatch(zero, 0, self.num_padded_tokens, 0)


class FrozenTargetLoss:
    """Sum over a micro-batch of ``weight * (CE(target, model) - entropy)``, in float32.

    With the targets of ``method.targets`` this is the sum of KL(teacher || model) over the pairs they stand for; with
    one-hot targets the cross-entropy.
    """

    def __init__(
        self, inputs: Inputs, examples: Sequence[Example], device: torch.device, observer: Observer | None = None
    ) -> None:
        self._inputs, self._device, self._observer = inputs, device, observer
        if observer is not None:
            self._places = observer.places(example.row.language for example in examples)
        self._targets = torch.from_numpy(_stacked([example.target for example in examples], inputs.num_candidates))
        self._weights = torch.tensor([example.weight for example in examples])
        self._entropies = torch.tensor([example.entropy for example in examples])

    def __call__(self, module: Any) -> dict[str, Tensor]:
        targets, weights, entropies = to_device(self._device, self._targets, self._weights, self._entropies)
        log_probs = module(*self._inputs.to(self._device))
        # A candidate that a row lacks has probability 0: 0 * -inf must not count.
        cross_entropy = -torch.where(targets > 0, targets * log_probs, 0.0).sum(dim=-1)
        sums = {"loss": (weights * (cross_entropy - entropies)).sum()}
        if self._observer is not None:
            (places,) = to_device(self._device, self._places)
            sums |= self._observer.sums(places, (weights > 0).float(), log_probs, targets)
        return sums


@dataclass(frozen=True)
class Pairs:
    """Who teaches whom in a micro-batch of whole groups: rows of teachers and of learners, int64 [pairs], and the
    weight of each pair, float32 [pairs]."""

    teachers: Tensor
    learners: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Divergence:
    """How live teachers are compared with their learners, as the config's ``distill`` section says it."""

    kind: str
    teacher_gradient: bool
    temperature: float


class LiveTeacherLoss:
    """Sum over the pairs of a micro-batch of ``weight * D(teacher, learner)``, in float32, both from the same forward
    pass. Every row runs once, however many pairs it is part of.

    D is KL(P || Q) (ALSACE, section 3), KL(Q || P) (its authors' code) or the Jensen-Shannon divergence, of the
    teacher's distribution P and the learner's Q at the temperature T, times T squared (Hinton et al. 2015, section 2).
    ``biases``: float32 [rows, K], added to a row's log-probabilities where it teaches.
    """

    def __init__(
        self,
        inputs: Inputs,
        pairs: Pairs,
        biases: Tensor,
        divergence: Divergence,
        device: torch.device,
        watched: "Watched | None" = None,
    ) -> None:
        self._inputs, self._pairs, self._biases = inputs, pairs, biases
        self._divergence, self._device, self._watched = divergence, device, watched

    def __call__(self, module: Any) -> dict[str, Tensor]:
        teachers, learners, weights, biases = to_device(
            self._device, self._pairs.teachers, self._pairs.learners, self._pairs.weights, self._biases
        )
        rows = module(*self._inputs.to(self._device))
        temperature = self._divergence.temperature
        log_q = torch.log_softmax(rows / temperature, dim=-1)[learners]
        log_p = torch.log_softmax((rows + biases) / temperature, dim=-1)[teachers]
        if not self._divergence.teacher_gradient:
            log_p = log_p.detach()
        # A candidate that a row lacks is -inf on both sides, and counts for nothing.
        lacks = torch.isinf(log_p) | torch.isinf(log_q)
        log_p, log_q = log_p.masked_fill(lacks, 0.0), log_q.masked_fill(lacks, 0.0)
        p, q = log_p.exp().masked_fill(lacks, 0.0), log_q.exp().masked_fill(lacks, 0.0)
        if self._divergence.kind == "forward":
            values = p * (log_p - log_q)
        elif self._divergence.kind == "reverse":
            values = q * (log_q - log_p)
        else:
            log_middle = torch.logaddexp(log_p, log_q) - math.log(2)
            values = (p * (log_p - log_middle) + q * (log_q - log_middle)) / 2
        sums = {"loss": temperature**2 * (weights * values.sum(dim=-1)).sum()}
        return sums | (self._watched.sums(rows, log_p, log_q, lacks, learners, weights) if self._watched else {})


@dataclass(frozen=True)
class Watched:
    """What is observed of a micro-batch of whole groups. ``places``: int64 [rows], of each row's language; ``groups``:
    int64 [rows], of its group; ``counts``: float32 [rows], 0 for a row that has no part in the vote."""

    observer: Observer
    places: Tensor
    groups: Tensor
    num_groups: int
    counts: Tensor

    @torch.no_grad()
    def sums(
        self, rows: Tensor, log_p: Tensor, log_q: Tensor, lacks: Tensor, learners: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """``rows``: float32 [rows, K]; ``log_p``, ``log_q``: of the teacher and the learner of each pair, [pairs, K],
        0 where ``lacks`` says that there is no such candidate."""
        places, groups, counts = to_device(rows.device, self.places, self.groups, self.counts)
        found = self.observer.votes(places, groups, self.num_groups, counts, rows)
        log_q, p = log_q.masked_fill(lacks, -torch.inf), log_p.exp().masked_fill(lacks, 0.0)
        return found | self.observer.sums(places[learners], weights, log_q, p)


def _stacked(rows: Sequence[np.ndarray], num_candidates: int) -> np.ndarray:
    """Targets as float32 [rows, K], filled up with zeros."""
    stacked = np.zeros((len(rows), num_candidates), dtype=np.float32)
    for row, target in zip(stacked, rows, strict=True):
        row[: len(target)] = target
    return stacked
