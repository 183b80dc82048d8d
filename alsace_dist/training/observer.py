"""What a loss observes beside what it minimises: how near the model is to its targets, language by language."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alsace_dist.monitor.observed import ANSWERS, BY_LANGUAGE, TARGET_ANSWERS, VOTES


@dataclass(frozen=True)
class Observer:
    """Makes the sums of ``monitor.observed``. ``num_answers``: candidates of every row; 0: rows have their own, which
    are no answers that could be counted over rows."""

    languages: Sequence[str]
    num_answers: int

    def places(self, languages: Iterable[str]) -> Tensor:
        """int64 [rows]: the place of each row's language among all."""
        place = {language: number for number, language in enumerate(self.languages)}
        return torch.tensor([place[language] for language in languages], dtype=torch.int64)

    @torch.no_grad()
    def sums(self, places: Tensor, counts: Tensor, log_probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``places``: int64 [rows]; ``counts``: float32 [rows], how much each row counts; ``log_probs``: float32
        [rows, K], -inf for what a row lacks; ``targets``: probabilities, of the same shape."""
        agrees = log_probs.argmax(dim=-1) == targets.argmax(dim=-1)
        entropy, target_entropy = _entropy(log_probs.exp(), log_probs), _entropy(targets, targets.log())
        divergence = -torch.where(targets > 0, targets * log_probs, 0.0).sum(dim=-1) - target_entropy
        columns = [torch.ones_like(counts), divergence, target_entropy, entropy, agrees.to(counts.dtype)]
        rows = self._of_language(places, counts)
        found = {BY_LANGUAGE: rows @ torch.stack(columns, dim=-1)}
        if self.num_answers == log_probs.shape[-1]:
            found[ANSWERS] = rows @ _best(log_probs)
            found[TARGET_ANSWERS] = rows @ _best(targets)
        return found

    @torch.no_grad()
    def votes(
        self, places: Tensor, groups: Tensor, num_groups: int, counts: Tensor, log_probs: Tensor
    ) -> dict[str, Tensor]:
        """``groups``: int64 [rows], the place of each row's group among ``num_groups``."""
        members = _one_hot(groups, num_groups).T * counts
        # As in method.selection, ties are broken by summed probability, here as less than a vote, and then by index.
        summed = members @ log_probs.exp() / (len(self.languages) + 1)
        vote = (members @ _best(log_probs) + summed).argmax(dim=-1)[groups]
        agrees = (log_probs.argmax(dim=-1) == vote).to(counts.dtype)
        return {VOTES: self._of_language(places, counts) @ torch.stack([torch.ones_like(counts), agrees], dim=-1)}

    def _of_language(self, places: Tensor, counts: Tensor) -> Tensor:
        """float32 [languages, rows]. A product with it adds up in a fixed order, which index_add on a GPU does not."""
        return _one_hot(places, len(self.languages)).T * counts


def _one_hot(indices: Tensor, size: int) -> Tensor:
    """float32 [rows, size]. torch's own looks at all indices first, for which the host would wait."""
    return (indices.unsqueeze(-1) == torch.arange(size, device=indices.device)).to(torch.float32)


def _best(values: Tensor) -> Tensor:
    return _one_hot(values.argmax(dim=-1), values.shape[-1])


def _entropy(probabilities: Tensor, logs: Tensor) -> Tensor:
    return -torch.where(probabilities > 0, probabilities * logs, 0.0).sum(dim=-1)
