"""Where the time of a step goes, without waiting for the device."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COMMUNICATION = "communication"
COLLECTIVES = (  # of torch.distributed.ProcessGroup, as any version calls them
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
)
MOST_SPANS = 10_000  # between two looks at what is over


class Stopwatch:
    """Seconds by phase, and apart from them those of communication: of the host, or where there is a GPU of the device,
    whose work the host only launches.

    Communication is what a phase spends in collectives and waiting for them: for the numbers, and for ranks that come
    late. What goes on behind the computing costs nothing, and counts as nothing. On a GPU a span of time is two events
    in the stream that computes; only ``read`` waits for them. DeepSpeed's other streams communicate, so that to wait
    for one of them is to wait for a collective.
    """

    def __init__(self, device: "torch.device") -> None:
        self._on_gpu = device.type == "cuda"
        self._stream: Any = None  # the GPU's stream that computes
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, str, Any, Any]] = []  # name, what it is no part of, begin, end

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, time is that of this phase, but for communication; several of one name add up."""
        if len(self._spans) > MOST_SPANS:
            self._add_up(lambda end: not self._on_gpu or end.query())
        self._stream = self._current_stream()
        begin = self._now()
        with self._communication_apart(name):
            yield
        self._spans.append((name, "", begin, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; waits for the device to have done them."""
        if self._spans and self._on_gpu:
            self._spans[-1][-1].synchronize()
        self._add_up(lambda end: True)
        found = dict(self._seconds)
        self._seconds.clear()
        return found

    def _add_up(self, is_over: Callable[[Any], bool]) -> None:
        """Spans up to the first that is not over become seconds."""
        num_over = 0
        for name, apart_from, begin, end in self._spans:
            if not is_over(end):
                break
            seconds = begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
            self._seconds[name] += seconds
            if apart_from:
                self._seconds[apart_from] -= seconds
            num_over += 1
        del self._spans[:num_over]

    def _now(self) -> Any:
        """A moment: on the host a number of seconds, on a GPU an event in the current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _current_stream(self) -> Any:
        if not self._on_gpu:
            return None
        import torch

        return torch.cuda.current_stream()

    @contextmanager
    def _communication_apart(self, phase: str) -> Iterator[None]:
        """Within it, collectives are timed, whoever calls them: all start in a method of torch's process group, and all
        results are waited for in one of its handles, or on a GPU by its stream, too."""
        import torch
        import torch.distributed as dist

        methods: list[tuple[type, str]] = [(dist.Work, "wait")]
        methods += [(dist.ProcessGroup, name) for name in COLLECTIVES if name in vars(dist.ProcessGroup)]
        if self._on_gpu:
            methods += [(torch.cuda.Stream, "synchronize"), (torch.cuda.Stream, "wait_event")]
        original = [vars(owner)[name] for owner, name in methods]  # what getattr gives would no longer bind
        for (owner, name), method in zip(methods, original, strict=True):
            setattr(owner, name, self._timed(method, phase, is_of_stream=name == "wait_event"))
        try:
            yield
        finally:
            for (owner, name), method in zip(methods, original, strict=True):
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any], phase: str, is_of_stream: bool) -> Callable[..., Any]:
        """``is_of_stream``: whether it makes a stream wait, which may be another than the one that computes."""

        def timed(this: Any, *args: Any, **kwargs: Any) -> Any:
            if self._current_stream() != self._stream or (is_of_stream and this != self._stream):
                return method(this, *args, **kwargs)  # a collective of another stream is hidden behind what is computed
            begin = self._now()
            found = method(this, *args, **kwargs)
            self._spans.append((COMMUNICATION, phase, begin, self._now()))
            return found

        return timed
