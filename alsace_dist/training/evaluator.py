"""A model on held-out groups while it is trained, and the best so far: off the step, of a bounded number of groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch

from alsace_dist.config import Config, TaskTrainConfig
from alsace_dist.data.held_out import voting_groups, watched_rows
from alsace_dist.data.rows import EncodedRow
from alsace_dist.data.stream import score_batches
from alsace_dist.files.shards import golds
from alsace_dist.method.block import block_of
from alsace_dist.method.selection import Yardstick, score_values
from alsace_dist.models.batches import to_host
from alsace_dist.models.family import Family, TrainableModel
from alsace_dist.ranks.group import Ranks

MEASUREMENTS = 10  # in a training
ONE_ANSWER = 0.98  # share of the answers that are one candidate, from which on there is no vote
BEST_BY = {"accuracy": "accuracy", "vote_agreement": "dev_vote_agreement"}  # of a section -> the scalar


@dataclass(frozen=True)
class Evaluator:
    """Measures a model on the same rows again and again. ``rows``: the same on all ranks; ``every``: steps between two
    measurements; ``patience``: measurements without a rise after which training stops, if any; ``best_by``: the scalar
    that is to rise."""

    rows: Sequence[EncodedRow]
    model: Family
    source_language: str
    tokens_per_batch: int
    every: int
    patience: int | None
    best_by: str
    ranks: Ranks

    def measure(self, module: Any) -> dict[str, float]:
        """Scalars: how often answers are their group's vote; of rows with labels the accuracy of each language, their
        average, gap, standard deviation and least. Collective.

        ``module``: an engine's; it is in training mode afterwards, as before.
        """
        log_probs = self._log_probs(module)
        return self._agreement(log_probs) | self._accuracies(log_probs)

    def _log_probs(self, module: Any) -> list[np.ndarray]:
        """Of the candidates of each row, [K]. Collective."""
        ranks, width = self.ranks, max(len(row.candidates) for row in self.rows)
        batches = score_batches([self.model.num_tokens(row) for row in self.rows], self.tokens_per_batch)
        own = batches[ranks.rank :: ranks.world_size]
        found = np.zeros((len(self.rows), width))
        module.eval()
        with torch.no_grad():
            # Under ZeRO-3 a pass is collective: a rank that has fewer batches runs some for nothing.
            for number in range(round(ranks.max(len(own)))):
                batch = own[number] if number < len(own) else batches[-1][-1:]
                inputs = self.model.collate([self.rows[index] for index in batch])
                scores = to_host(module(*inputs.to(ranks.device)))()
                if number < len(own):
                    found[batch, : scores.shape[1]] = scores
        module.train()
        totals = ranks.total(found)  # each row is one rank's
        return [row[: len(one.candidates)] for one, row in zip(self.rows, totals, strict=True)]

    def _agreement(self, log_probs: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing where no two languages have the same candidates, or where all but all answers are one of them, as a
        new head's are at first: then every answer is the vote, and nothing is known."""
        groups = voting_groups(self.rows)
        if not groups:
            return {}
        block = block_of({name: log_probs[at] for name, at in group.items()} for group in groups)
        if np.bincount(block.answers()).max() >= ONE_ANSWER * len(block.group):
            return {}
        return {"dev_vote_agreement": float(score_values(block, Yardstick(agreement=True)).mean())}

    def _accuracies(self, log_probs: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing without labels."""
        right: dict[str, list[bool]] = {}
        for row, scores in zip(self.rows, log_probs, strict=True):
            if row.label is not None:
                right.setdefault(row.language, []).append(int(scores.argmax()) in golds(row.label))
        rates = {language: float(np.mean(right[language])) for language in sorted(right)}
        if not rates:
            return {}
        values = list(rates.values())
        found = {f"accuracy_of/{language}": rate for language, rate in rates.items()}
        found |= {"accuracy": mean(values), "accuracy_sd": pstdev(values), "accuracy_worst": min(values)}
        others = [rate for language, rate in rates.items() if language != self.source_language]
        if others and self.source_language in rates:
            found["accuracy_gap"] = rates[self.source_language] - mean(others)
        return found


def make_evaluator(
    config: Config, section: TaskTrainConfig, model: TrainableModel, num_steps: int, ranks: Ranks
) -> Evaluator | None:
    """What measures a model while it is trained for ``num_steps`` steps, if there is anything to measure it on.

    Raises ``UserError`` if training is to stop by what cannot be measured.
    """
    if not (rows := watched_rows(config, section)):
        return None
    assert isinstance(model, Family), "what is trained on a task answers it"
    every = section.evaluate_every_steps or max(1, num_steps // MEASUREMENTS)
    source, tokens = config.data.source_language, config.score.tokens_per_batch
    best_by = BEST_BY[section.best_by]
    return Evaluator(model.encode(rows), model, source, tokens, every, section.patience, best_by, ranks)


@dataclass
class Best:
    """The best measurement so far: after which step, how good, and how many have come since then."""

    step: int = 0
    value: float = -1.0
    num_since: int = 0

    def see(self, step: int, value: float) -> bool:
        """Take in a measurement; whether it is the best one."""
        if value > self.value:
            self.step, self.value, self.num_since = step, value, 0
            return True
        self.num_since += 1
        return False
