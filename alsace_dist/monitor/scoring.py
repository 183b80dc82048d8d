"""Watches a scoring pass: how far and how fast it is, and what each language answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alsace_dist.method.block import Block
from alsace_dist.method.selection import Yardstick, score_values
from alsace_dist.monitor.sinks import Places, ScalarWriter
from alsace_dist.ranks.group import Ranks

EVERY_SECONDS = 10.0
# Columns of what is summed by language: rows, their best candidates' probabilities; rows of whole groups, and those of
# them whose answer is the vote.
NUM_COLUMNS = 4


@dataclass
class Counts:
    """What a rank has scored: rows, encoder tokens without and with padding, and by language the columns above."""

    num_rows: int = 0
    num_tokens: int = 0
    num_padded: int = 0
    by_language: dict[str, np.ndarray] = field(default_factory=dict)

    def see(self, block: Block, is_whole: np.ndarray) -> None:
        """Take in scores. ``is_whole``: bool [G], which groups are there in all their languages."""
        whole = is_whole[block.group]
        agreement = score_values(block, Yardstick(agreement=True))
        best = np.exp(block.log_probs.max(axis=1, initial=-np.inf).astype(np.float64))
        columns = np.stack([np.ones(len(whole)), best, whole, np.where(whole, agreement, 0.0)], axis=1)
        for number, language in enumerate(block.languages):
            seen = columns[block.language == number].sum(axis=0)
            self.by_language[language] = self.by_language.get(language, np.zeros(NUM_COLUMNS)) + seen

    def __add__(self, other: "Counts") -> "Counts":
        by_language = {
            language: sum(
                (one.by_language.get(language, np.zeros(NUM_COLUMNS)) for one in (self, other)), np.zeros(NUM_COLUMNS)
            )
            for language in {**self.by_language, **other.by_language}
        }
        numbers = (self.num_rows + other.num_rows, self.num_tokens + other.num_tokens)
        return Counts(*numbers, self.num_padded + other.num_padded, by_language)

    def rates(self, since: "Counts", seconds: float, num_ranks: int) -> dict[str, float]:
        """As scalars. ``since``: what was counted before these seconds; ``num_ranks``: that work like the one, or ones,
        that has counted."""
        tokens = self.num_tokens - since.num_tokens
        return {
            "sequences_per_second": (self.num_rows - since.num_rows) / seconds * num_ranks,
            "tokens_per_second": tokens / seconds * num_ranks,
            "padding_share": 1 - tokens / max(1, self.num_padded - since.num_padded),
        }

    def answers(self) -> dict[str, float]:
        """What languages answer, as scalars."""
        found = {}
        for language, (rows, confidence, whole, agreeing) in sorted(self.by_language.items()):
            if rows:
                found[f"confidence_of/{language}"] = confidence / rows
            if whole:
                found[f"vote_agreement_of/{language}"] = agreeing / whole
        return found


class ScoringMonitor:
    """Scalars of one scoring pass: now and then what rank 0 has seen, as if all were like it, in the end all of it.

    Rates are since the last reading, and in the end over this whole start; what languages answer is always of all that
    this start has scored.
    """

    def __init__(self, places: Places, ranks: Ranks, num_done: int, total: int) -> None:
        """``num_done``: of ``total`` parts, those that an earlier start has done."""
        self.ranks, self.num_done, self.total = ranks, num_done, total
        self.counts, self._seen = Counts(), Counts()
        self._start = self._last = time.monotonic()
        self._last_step = num_done
        self._writer = ScalarWriter(places, num_done, ranks.is_main)

    def part(self, num_drawn: int) -> None:
        """A part is done; ``num_drawn``: how many this start's ranks have begun."""
        now, step = time.monotonic(), self.num_done + num_drawn
        if self.ranks.is_main and now - self._last >= EVERY_SECONDS and self._last_step < step < self.total:
            rates = self.counts.rates(self._seen, now - self._last, self.ranks.world_size)
            self._last, self._last_step, self._seen = now, step, replace(self.counts)
            self._writer.write(step, rates | self.counts.answers() | {"done_share": step / self.total})

    def finish(self, of_ranks: Sequence[Counts]) -> None:
        """All parts are done; what each rank has counted."""
        whole = sum(of_ranks, Counts())
        if whole.num_rows:  # else this start had nothing to score
            rates = whole.rates(Counts(), time.monotonic() - self._start, 1)
            self._writer.write(self.total, rates | whole.answers() | {"done_share": 1.0})

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
