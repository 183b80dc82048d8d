"""Accuracy on held-out labels while a model is trained: off the step, of a bounded number of groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch

from alsace_dist.data.rows import EncodedRow
from alsace_dist.data.stream import score_batches
from alsace_dist.files.shards import golds
from alsace_dist.models.batches import to_host
from alsace_dist.models.family import Family
from alsace_dist.ranks.group import Ranks


@dataclass(frozen=True)
class Evaluator:
    """Measures a model on the same rows again and again. ``rows``: with labels, the same on all ranks; ``every``:
    steps between two measurements; ``patience``: measurements without a rise after which training stops, if any."""

    rows: Sequence[EncodedRow]
    model: Family
    source_language: str
    tokens_per_batch: int
    every: int
    patience: int | None
    ranks: Ranks

    def measure(self, module: Any) -> dict[str, float]:
        """Scalars: the accuracy of each language, their average, gap, standard deviation and least. Collective.

        ``module``: an engine's; it is in training mode afterwards, as before.
        """
        ranks, languages = self.ranks, sorted({row.language for row in self.rows})
        batches = score_batches([self.model.num_tokens(row) for row in self.rows], self.tokens_per_batch)
        own = batches[ranks.rank :: ranks.world_size]
        counts = np.zeros((len(languages), 2))
        module.eval()
        with torch.no_grad():
            # Under ZeRO-3 a pass is collective: a rank that has fewer batches runs some for nothing.
            for number in range(round(ranks.max(len(own)))):
                batch = own[number] if number < len(own) else batches[-1][-1:]
                inputs = self.model.collate([self.rows[index] for index in batch])
                answers = to_host(module(*inputs.to(ranks.device)))().argmax(axis=-1)
                for index, answer in zip(batch, answers.tolist(), strict=True) if number < len(own) else ():
                    row = self.rows[index]
                    counts[languages.index(row.language)] += (1, answer in golds(row.label))
        module.train()
        totals = np.array(ranks.sum(*counts.flat)).reshape(counts.shape)
        rates = {language: float(right / total) for language, (total, right) in zip(languages, totals, strict=True)}
        values = list(rates.values())
        found = {f"accuracy_of/{language}": rate for language, rate in rates.items()}
        found |= {"accuracy": mean(values), "accuracy_sd": pstdev(values), "accuracy_worst": min(values)}
        others = [rate for language, rate in rates.items() if language != self.source_language]
        if others and self.source_language in rates:
            found["accuracy_gap"] = rates[self.source_language] - mean(others)
        return found


@dataclass
class Best:
    """The best measurement so far: after which step, how good, and how many have come since then."""

    step: int = 0
    accuracy: float = -1.0
    num_since: int = 0

    def see(self, step: int, accuracy: float) -> bool:
        """Take in a measurement; whether it is the best one."""
        if accuracy > self.accuracy:
            self.step, self.accuracy, self.num_since = step, accuracy, 0
            return True
        self.num_since += 1
        return False
