"""Checks behind some of the warnings; every warning goes through ``warn``."""

import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from alsace_dist.errors import UserError, warn
from alsace_dist.monitor.observed import ANSWERS, TARGET_ANSWERS
from alsace_dist.ranks import job
from alsace_dist.ranks.group import Ranks

MOST_BF16_SLOWDOWN = 3.0  # where bf16 is at home it is faster than float32, and this is noise


class LeadCheck:
    """In a job: warns, once, if stopping takes longer than the time between the signal and the end of the job."""

    def __init__(self) -> None:
        self.lead_seconds = job.lead_seconds()

    def __call__(self, seconds: float, what: str) -> None:
        """``seconds``: the most that passes between a signal and what is kept of ``what``, as measured."""
        if seconds > self.lead_seconds:
            warn(
                f"{what} took {seconds:.0f} s, but the signal to stop comes {self.lead_seconds:.0f} s before "
                f"a job's end: set lead_seconds in the site profile to {2 * seconds:.0f}, or work is lost"
            )
            self.lead_seconds = float("inf")


def check_bf16() -> None:
    """Warns where the CPU computes bf16 far slower than float32."""
    if (slowdown := bf16_slowdown()) > MOST_BF16_SLOWDOWN:
        warn(f"this CPU has no bf16 of its own: a product takes {slowdown:.0f} times float32's; set engine.dtype: fp32")


def bf16_slowdown() -> float:
    """CPU time of a matrix product in bf16 on this CPU over that in float32, the best of some of each, in turns.

    Measured (in milliseconds) and not read off the CPU's name: without AVX-512 or its like torch falls back on loops
    that take 50 times as long. CPU time of one thread, for other work on the machine may hold up either, and several
    threads spin while they wait for each other.
    """
    import torch

    def one(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        start = time.process_time()
        a @ b
        return time.process_time() - start

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [(one(torch.bfloat16), *(one(torch.float32) for _ in range(5))) for _ in range(5)]
    finally:
        torch.set_num_threads(num_threads)
    slow, *fast = map(min, zip(*rounds, strict=True))
    return slow / max(min(fast), 1e-9)


def check_loss(loss: float, step: int, kind: str, directory: object) -> None:
    """Raises ``UserError`` if a training has diverged. ``kind``: its stage; ``directory``: of its checkpoints."""
    if not math.isfinite(loss):
        raise UserError(
            f"{kind}: the loss is {loss} at step {step}; lower {kind}.learning_rate, and delete {directory}"
        )


# --- a training, reading by reading --------------------------------------------------------------------------------

USUAL_READINGS = 5  # that many are needed to know what is usual
SPIKE, SPIKE_NATS = 3.0, 0.1  # times the usual loss; and above it, for of small losses batches have any multiple
SLOWDOWN = 0.5  # of the usual speed
STRAGGLING, STRAGGLING_SECONDS = 1.5, 0.02  # times the time of the fastest rank; and above it, or it is noise
LONG_WAIT = 0.3  # share of the time
NUM_IN_A_ROW = 3  # readings that must agree, of what may be chance
COLLAPSED, NOT_COLLAPSED = 0.98, 0.8  # shares of one answer: of the model's, and of its targets'
ENOUGH_ANSWERS = 100  # of a language, to speak of its answers
SETTLED = 0.2  # share of the steps after which answers count: before, a new head gives one to everything
DRIFT = 0.1  # by which agreement with the vote may fall below its best


class Health:
    """Looks at every reading of a training, and warns, once of each thing, with the remedy."""

    def __init__(self, kind: str, ranks: Ranks, num_steps: int, warmup_ratio: float) -> None:
        """``kind``: name of the stage, which is that of its section, too; ``num_steps``: of the whole training;
        ``warmup_ratio``: the share of them in which the learning rate rises."""
        self.kind, self.ranks = kind, ranks
        self._settled = max(SETTLED, warmup_ratio) * num_steps
        self._said: set[str] = set()
        self._losses: deque[float] = deque(maxlen=20)
        self._speeds: deque[float] = deque(maxlen=20)
        self._in_a_row: dict[str, int] = {}
        self._answers: dict[str, np.ndarray] = {}
        self._first_targets: dict[str, np.ndarray] = {}
        self._best_agreement = 0.0

    def __call__(
        self,
        step: int,
        values: Mapping[str, float],
        sums: Mapping[str, np.ndarray],
        languages: Sequence[str],
        forward_seconds: float,
    ) -> None:
        """``values``: the scalars of the reading; ``sums``: what the loss has observed (``monitor.observed``), of these
        languages; ``forward_seconds``: of this rank. The same is said on all ranks, so it is collective."""
        self._look_at_loss(step, values)
        self._look_at_speed(step, values)
        self._look_at_ranks(step, values, forward_seconds)
        self._look_at_answers(step, sums, languages)
        self._look_at_votes(step, values)

    def _look_at_loss(self, step: int, values: Mapping[str, float]) -> None:
        if (loss := values.get("loss")) is None:  # the step was skipped
            return
        if len(self._losses) >= USUAL_READINGS:
            usual = median(self._losses)
            if loss > max(SPIKE * usual, usual + SPIKE_NATS):
                self._warn(
                    "spike",
                    f"step {step}: the loss is {loss:.4g}, and was {usual:.4g}; if it stays there lower "
                    f"{self.kind}.learning_rate, and look at the step's examples with `alsace replay`",
                )
        if math.isfinite(loss):
            self._losses.append(loss)

    def _look_at_speed(self, step: int, values: Mapping[str, float]) -> None:
        speed = values["tokens_per_second"]
        if len(self._speeds) >= USUAL_READINGS:
            usual = median(self._speeds)
            if self._is_in_a_row("slow", speed < SLOWDOWN * usual):
                self._warn(
                    "slow",
                    f"step {step}: {speed:,.0f} tokens a second, and before {usual:,.0f}: look for other work on the "
                    "nodes, for slow reads (data_wait_share) and for a GPU that has lowered its clock",
                )
        self._speeds.append(speed)
        if self._is_in_a_row("wait", values["data_wait_share"] > LONG_WAIT):
            self._warn(
                "wait",
                f"step {step}: ranks wait for data {values['data_wait_share']:.0%} of the time; put the data on a "
                "local disk (data.cache for a store), or give each rank more CPU cores",
            )

    def _look_at_ranks(self, step: int, values: Mapping[str, float], forward_seconds: float) -> None:
        least, most = values["forward_seconds_least"], values["forward_seconds_most"]
        is_far = least > 0 and most > max(STRAGGLING * least, least + STRAGGLING_SECONDS)
        if not self._is_in_a_row("straggler", is_far) or "straggler" in self._said:
            return
        found = self.ranks.gather((forward_seconds, os.uname().nodename))
        slowest = max(range(len(found)), key=lambda rank: found[rank][0])
        self._warn(
            "straggler",
            f"step {step}: rank {slowest} on {found[slowest][1]} takes {most:.3g} s for its forward passes, the "
            f"fastest rank {least:.3g} s, and all wait for it: look at that node's load and at its GPU's clock",
        )

    def _look_at_answers(self, step: int, sums: Mapping[str, np.ndarray], languages: Sequence[str]) -> None:
        """Live teachers may collapse with those who learn: so answers are held against the first targets, too; they are
        the first of this start, so that a collapse before a restart is not seen after it."""
        if ANSWERS not in sums:
            return
        for number, language in enumerate(languages):
            seen = np.stack([sums[ANSWERS][number], sums[TARGET_ANSWERS][number]])
            self._answers[language] = seen = self._answers.get(language, 0) + seen
            if seen[0].sum() < ENOUGH_ANSWERS or seen.shape[1] < 2:
                continue
            del self._answers[language]  # the next look is at newer answers
            own, wanted = seen[0] / seen[0].sum(), seen[1] / max(1.0, seen[1].sum())
            first, answer = self._first_targets.setdefault(language, wanted), int(own.argmax())
            usual = first[answer] if wanted[answer] >= COLLAPSED else wanted[answer]
            is_collapsed = own[answer] >= COLLAPSED and usual <= NOT_COLLAPSED
            if self._is_in_a_row(f"collapse in {language}", is_collapsed and step > self._settled):
                targets = f"{wanted[answer]:.0%} of the targets"
                if wanted[answer] >= COLLAPSED:
                    targets += f" ({first[answer]:.0%} at first)"
                self._warn(
                    "collapse",
                    f"step {step}: in {language!r} {own[answer]:.0%} of the answers are candidate {answer + 1}, and "
                    f"{targets}; lower {self.kind}.learning_rate",
                )

    def _look_at_votes(self, step: int, values: Mapping[str, float]) -> None:
        if (agreement := values.get("vote_agreement")) is None:
            return
        self._best_agreement = max(self._best_agreement, agreement)
        if self._is_in_a_row("drift", agreement < self._best_agreement - DRIFT):
            self._warn(
                "drift",
                f"step {step}: {agreement:.0%} of the answers are their group's vote, and {self._best_agreement:.0%} "
                "were: the teachers drift; take distill.teachers: frozen, or lower distill.learning_rate",
            )

    def _is_in_a_row(self, what: str, holds: bool) -> bool:
        """Whether it has held in so many readings one after the other that it is no chance."""
        self._in_a_row[what] = self._in_a_row.get(what, 0) + 1 if holds else 0
        return self._in_a_row[what] >= NUM_IN_A_ROW

    def _warn(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            if self.ranks.is_main:
                warn(f"{self.kind}: {text}")
