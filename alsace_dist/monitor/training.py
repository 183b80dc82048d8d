"""Watches a training: the three points at which the loop says where it is (a step, a checkpoint, the end)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from alsace_dist.config import TrainConfig
from alsace_dist.monitor.health import LeadCheck, check_loss
from alsace_dist.monitor.progress import progress
from alsace_dist.monitor.scalars import ScalarWriter
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.job import note_position

if TYPE_CHECKING:
    from torch import Tensor


class TrainingMonitor:
    """Scalars, progress and warnings of one training; entered for as long as it runs.

    Rates are means over the steps since the last reading. The sums of a loss are read of the last step alone: a mean
    over several steps would depend on where a run was interrupted.
    """

    def __init__(
        self, kind: str, directory: Path, tensorboard: Path, section: TrainConfig, steps: range, ranks: Ranks
    ) -> None:
        """``kind``: name of the stage. ``steps``: those that are left to do; the first is 0 or a checkpoint's."""
        self.kind, self.directory, self.tensorboard = kind, directory, tensorboard
        self.section, self.steps, self.ranks = section, steps, ranks
        self._lead = LeadCheck()
        self._last_step, self._step_seconds = time.monotonic(), 0.0
        self._stack = ExitStack()
        self._reset()

    def __enter__(self) -> Self:
        first, last, is_main = self.steps.start, self.steps.stop, self.ranks.is_main
        if is_main:
            note_position(f"step {first}")
        self._writer = ScalarWriter(self.directory, self.tensorboard, first, is_main)
        self._stack.callback(self._writer.close)
        self._last_step = time.monotonic()
        self._advance = self._stack.enter_context(progress(self.kind, self.directory, last, first, is_main))
        self._reset()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, this rank waits for its data."""
        begin = time.monotonic()
        yield
        self._wait_seconds += time.monotonic() - begin

    def step(
        self,
        num_done: int,
        sums: "Mapping[str, Tensor]",
        num_tokens: tuple[int, int],
        learning_rate: float,
        gradient_norm: Callable[[], float],
    ) -> None:
        """A step is done; every ``log_every_steps`` the scalars are read, which is collective.

        ``sums``: this rank's sums over the step's examples, by the name of their scalar. ``num_tokens``: encoder tokens
        of this rank, without and with padding. Raises ``UserError`` if the loss is not a number.
        """
        self._step_seconds, self._last_step = time.monotonic() - self._last_step, time.monotonic()
        self._num_steps += 1
        self._num_tokens += num_tokens[0]
        self._num_padded += num_tokens[1]
        note = ""
        if num_done % self.section.log_every_steps == 0 or num_done == self.steps.stop:
            values = self._read(sums, gradient_norm()) | {"learning_rate": learning_rate}
            self._writer.write(num_done, values)
            check_loss(values["loss"], num_done, self.kind, self.directory)
            note = f"loss {values['loss']:.4f}"
        self._advance(1, note)

    def checkpoint(self, num_done: int, save_seconds: float) -> None:
        """The checkpoint after so many steps is written, and that took so long."""
        if self.ranks.is_main:
            note_position(f"step {num_done}")
            what = f"{self.kind}: a step ({self._step_seconds:.1f} s) and a checkpoint ({save_seconds:.1f} s)"
            self._lead(self._step_seconds + save_seconds, what)

    def _reset(self) -> None:
        self._start = time.monotonic()
        self._wait_seconds = 0.0
        self._num_steps = self._num_tokens = self._num_padded = 0

    def _read(self, sums: "Mapping[str, Tensor]", gradient_norm: float) -> dict[str, float]:
        own = [self._num_tokens, self._num_padded, self._wait_seconds]
        *totals, tokens, padded, waited = self.ranks.sum(*(float(value) for value in sums.values()), *own)
        seconds = time.monotonic() - self._start
        values = {name: total / self.section.global_batch_size for name, total in zip(sums, totals, strict=True)}
        values |= {
            "gradient_norm": gradient_norm,
            "sequences_per_second": self._num_steps * self.section.global_batch_size / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1.0, padded),
            "data_wait_share": waited / self.ranks.world_size / seconds,
        }
        self._reset()
        return {key: value for key, value in values.items() if math.isfinite(value) or key == "loss"}
