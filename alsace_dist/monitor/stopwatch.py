"""Where the time of a step goes, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Stopwatch:
    """Seconds by phase: of the host, or where there is a GPU of the device, whose work the host only launches.

    On a GPU a phase is two events in its stream; only ``read`` waits for them.
    """

    def __init__(self, device: "torch.device") -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, time is that of this phase; several add up."""
        if not self._on_gpu:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin
            return
        import torch

        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; waits for the device to have done them."""
        if self._events:
            self._events[-1][-1].synchronize()
        for name, first, last in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        found, self._seconds, self._events = self._seconds, {}, []
        return found
