"""Watches a training: the points at which the loop says where it is (a step, a checkpoint, the end)."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from alsace_dist.config import TrainConfig
from alsace_dist.errors import heard_by, warn
from alsace_dist.monitor import observed
from alsace_dist.monitor.hardware import GIGABYTE, memory_of, peak_of
from alsace_dist.monitor.health import Health, LeadCheck, check_loss
from alsace_dist.monitor.progress import progress
from alsace_dist.monitor.sinks import Places, ScalarWriter
from alsace_dist.monitor.stopwatch import COMMUNICATION, Stopwatch
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.job import note_position

if TYPE_CHECKING:
    from torch import Tensor

MOST_SKIPPED = 10  # steps in a row
PHASES = ("data", "forward", "backward", "optimizer", COMMUNICATION)


class Engine(Protocol):
    """What is looked at of a training's engine, after a step."""

    stopwatch: Stopwatch
    num_skipped: int

    @property
    def is_applied(self) -> bool:
        """Whether the last step changed the weights."""

    @property
    def gradient_norm(self) -> "float | Tensor":
        """Of the last step, before clipping; NaN: it is not known."""


class TrainingMonitor:
    """Scalars, progress and warnings of one training; entered for as long as it runs.

    Rates, and what the loss observes, are means over the steps since the last reading. The loss is of the last step
    alone: a mean over several steps would depend on where a run was interrupted.
    """

    def __init__(
        self,
        kind: str,
        places: Places,
        section: TrainConfig,
        steps: range,
        ranks: Ranks,
        engine: Engine,
        languages: Sequence[str] = (),
    ) -> None:
        """``kind``: name of the stage. ``steps``: those that are left to do; the first is 0 or a checkpoint's.
        ``languages``: of the rows of what the loss observes."""
        self.kind, self.places, self.section, self.steps = kind, places, section, steps
        self.ranks, self.engine, self.languages = ranks, engine, languages
        self._lead, self._health = LeadCheck(), Health(kind, ranks, steps.stop, section.warmup_ratio)
        self._last_step, self._step_seconds = time.monotonic(), 0.0
        self._last_saved = time.monotonic()
        self._saved: dict[str, float] = {}
        self._last_skipped = self._num_in_a_row = 0
        self._num_done = steps.start
        self._stack = ExitStack()
        self._num_clipped: Any = 0  # what is counted on the device is a tensor
        self._observed: dict[str, Any] = {}
        self._reset()

    def __enter__(self) -> Self:
        first, last, is_main = self.steps.start, self.steps.stop, self.ranks.is_main
        if is_main:
            note_position(f"step {first}")
        self._writer = ScalarWriter(self.places, first, is_main)
        self._stack.callback(self._writer.close)
        self._stack.enter_context(heard_by(lambda text: self._writer.text(self._num_done, "warnings", text)))
        self._last_step = self._last_saved = time.monotonic()
        self._advance = self._stack.enter_context(progress(self.kind, self.places.directory, last, first, is_main))
        self.engine.stopwatch.read()
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

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, something is done whose time is not that of steps."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    def step(
        self,
        num_done: int,
        sums: "Mapping[str, Tensor]",
        num_tokens: tuple[int, int],
        learning_rate: float,
        flops: float = 0.0,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """A step is done; every ``log_every_steps`` the scalars are read, which is collective.

        ``sums``: this rank's sums over the step's examples: the loss, and what it observes. ``num_tokens``: encoder
        tokens of this rank, without and with padding; ``flops``: of this rank's passes, 0 if unknown; ``more``: scalars
        that were measured after this step, and are logged with it. Raises ``UserError`` if the loss is not a number.
        """
        self._step_seconds, self._last_step = time.monotonic() - self._last_step, time.monotonic()
        self._num_done = num_done
        self._num_steps += 1
        self._num_tokens += num_tokens[0]
        self._num_padded += num_tokens[1]
        self._flops += flops
        norm = self.engine.gradient_norm
        if self.section.max_gradient_norm:
            self._num_clipped = self._num_clipped + (norm > self.section.max_gradient_norm)
        is_applied = self.engine.is_applied  # what a step that was skipped observed may be no number
        for name, value in sums.items():
            if name != "loss" and is_applied:
                self._observed[name] = self._observed[name] + value if name in self._observed else value
        note = ""
        if num_done % self.section.log_every_steps == 0 or num_done == self.steps.stop or more:
            values = self._read(sums["loss"], float(norm), num_done) | {"learning_rate": learning_rate}
            self._writer.write(num_done, values | dict(more or {}))
            if is_applied:
                check_loss(values["loss"], num_done, self.kind, self.places.directory)
                note = f"loss {values['loss']:.4f}"
        self._advance(1, note)

    def end_early(self, num_done: int) -> None:
        """No further step is taken."""
        self._advance(self.steps.stop - num_done, "ended early")

    def skipped(self, num_done: int) -> bool:
        """A step has changed nothing, for its gradient was not finite. Whether that has happened so often in a row that
        the model has diverged."""
        self._num_in_a_row = self._num_in_a_row + 1 if self._last_skipped == num_done - 1 else 1
        self._last_skipped = num_done
        if self.engine.num_skipped == 1 and self.ranks.is_main and self.section.on_nonfinite == "skip":
            warn(f"{self.kind}: step {num_done} is skipped, for its gradient is not finite; skipped_steps counts them")
        return self._num_in_a_row >= MOST_SKIPPED

    def checkpoint(self, num_done: int, num_bytes: int, blocking_seconds: float, seconds: float) -> None:
        """The checkpoint after so many steps is complete: its size, how long a step waited, and how long it took."""
        self._last_saved = time.monotonic()
        self._saved = {
            "checkpoint_gb": num_bytes / GIGABYTE,
            "checkpoint_blocking_seconds": blocking_seconds,
            "checkpoint_seconds": seconds,
            "checkpoint_gb_per_second": num_bytes / GIGABYTE / max(seconds, 1e-9),
        }
        if self.ranks.is_main:
            note_position(f"step {num_done}")
            # A signal that comes in the middle of a step is heard of after the next.
            what = f"{self.kind}: two steps ({self._step_seconds:.1f} s each) and a checkpoint ({seconds:.1f} s)"
            self._lead(2 * self._step_seconds + seconds, what)

    def _reset(self) -> None:
        self._start = time.monotonic()
        self._wait_seconds = self._flops = 0.0
        self._num_steps = self._num_tokens = self._num_padded = 0
        self._num_clipped = 0
        self._observed = {}

    def _read(self, loss: "Tensor", gradient_norm: float, num_done: int) -> dict[str, float]:
        phases = self.engine.stopwatch.read() | {"data": self._wait_seconds}
        sums = {name: value.double().cpu().numpy() for name, value in self._observed.items()}
        own = [float(loss), self._num_tokens, self._num_padded, self._flops]
        own += [phases.get(name, 0.0) for name in PHASES]
        memory, forward = memory_of(self.ranks.device), phases.get("forward", 0.0)
        totals = self.ranks.sum(*own, *(one for value in sums.values() for one in value.flat))
        most = self.ranks.most(forward, -forward, *memory.values())
        seconds, num_ranks = time.monotonic() - self._start, self.ranks.world_size
        total_loss, tokens, padded, flops = totals[:4]
        rest = 4 + len(PHASES)
        by_phase = dict(zip(PHASES, totals[4:rest], strict=True))
        found = _like(sums, totals[rest:])
        per_step = 1 / self._num_steps
        values = {
            "loss": total_loss / self.section.global_batch_size,
            "gradient_norm": gradient_norm,
            "clipped_share": math.nan if math.isnan(gradient_norm) else float(self._num_clipped) * per_step,
            "skipped_steps": float(self.engine.num_skipped),
            **observed.scalars(found, self.languages),
            "sequences_per_second": self._num_steps * self.section.global_batch_size / seconds,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds * per_step,
            **{f"{name}_seconds": value * per_step / num_ranks for name, value in by_phase.items()},
            "forward_seconds_most": most[0] * per_step,
            "forward_seconds_least": -most[1] * per_step,
            "padding_share": 1 - tokens / max(1.0, padded),
            "data_wait_share": by_phase["data"] / num_ranks / seconds,
            **dict(zip(memory, most[2:], strict=True)),
            **self._saved,
            "checkpoint_age_seconds": time.monotonic() - self._last_saved,
        }
        if (peak := peak_of(self.ranks.device)) and flops:
            values["mfu"] = flops / seconds / (peak * num_ranks)
        keeps_loss = self.engine.is_applied  # of a step that was skipped, a loss that is no number is left out
        values = {key: value for key, value in values.items() if math.isfinite(value) or (key == "loss" and keeps_loss)}
        self._health(num_done, values, found, self.languages, forward * per_step)
        self._saved = {}
        self._reset()
        return values


def _like(sums: Mapping[str, np.ndarray], totals: list[float]) -> dict[str, np.ndarray]:
    """Numbers one after the other, in the shapes of ``sums``."""
    found, position = {}, 0
    for name, value in sums.items():
        found[name] = np.array(totals[position : position + value.size]).reshape(value.shape)
        position += value.size
    return found
