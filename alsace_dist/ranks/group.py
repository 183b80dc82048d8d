"""A rank's place in its process group: joining it, collectives on the control plane, agreed stops."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist.config import EngineConfig
from alsace_dist.errors import STOPPED, PeerFailed, RankFailed, Stopped, UserError
from alsace_dist.ranks import job
from alsace_dist.ranks.failures import error_directory, is_secondary
from alsace_dist.reading import shorten

if TYPE_CHECKING:
    import numpy as np
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
MAX_PORT = 65_535
NOTICE_SECONDS = 10.0
JOIN_SECONDS = 300.0  # time for all ranks to load the program and to meet, from a slow shared disk
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h


class StopFlag:
    """Remembers that a signal asked this process to stop; the handler does nothing else."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Catch the stop signals from now on."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup lets SIGHUP be ignored
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


@dataclass
class Ranks:
    """This rank among all ranks. ``control``: a gloo group, so that flags never wait for the accelerator; ``data``: a
    group for tensors of the device, None: the default one.

    Of the collectives every rank must make the same calls in the same order.
    """

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"
    control: Any
    stop: StopFlag = field(default_factory=StopFlag)
    data: Any = None
    _num_names: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one rank writes."""
        return self.rank == 0

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank has it set. Collective."""
        return [value > 0 for value in self.sum(*(float(flag) for flag in flags))]

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in float64. Collective."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        result: list[float] = tensor.tolist()
        return result

    def total(self, values: "np.ndarray") -> "np.ndarray":
        """float64, of any shape: the sum of every rank's array. Collective."""
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(values.astype("float64"))
        dist.all_reduce(tensor, group=self.control)
        found: np.ndarray = tensor.numpy()
        return found

    def union(self, flags: "np.ndarray") -> "np.ndarray":
        """bool [n]: of these flags, those that any rank has set. Collective."""
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(flags.astype("uint8"))
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        found: np.ndarray = tensor.numpy().astype("bool")
        return found

    def max(self, value: float) -> float:
        """Largest value of any rank. Collective."""
        return self.most(value)[0]

    def most(self, *values: float) -> list[float]:
        """The largest of any rank, of each of some values. Collective."""
        return self.most_later(*values)()

    def most_later(self, *values: float) -> Callable[[], list[float]]:
        """The same, under way while this rank does something else: a function that waits for the result. Collective."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def wait() -> list[float]:
            work.wait()
            result: list[float] = tensor.tolist()
            return result

        return wait

    def gather(self, value: Any) -> list[Any]:
        """A small JSON-like value of every rank, in rank order. Collective."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (JSON-like), on every rank; what the other ranks give is not looked at. Collective."""
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def to_main(self, value: Any) -> list[Any] | None:
        """A JSON-like value of every rank, in rank order, on rank 0; None on the others. Collective."""
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        import torch.distributed as dist

        dist.barrier(group=self.control)

    def main_first(self, action: Callable[[], Any]) -> None:
        """Run ``action`` on rank 0 only, while the other ranks wait; if it fails there, every rank raises. Collective.

        Rank 0 raises the error itself; the other ranks ``PeerFailed``, which names rank 0.
        """
        self._agreed(action if self.is_main else None, "rank 0 failed")

    def each(self, action: Callable[[], Any]) -> None:
        """Run ``action`` on every rank; if it fails on any, every rank raises. Collective.

        Ranks on which it failed raise their own error; the other ranks ``PeerFailed``.
        """
        self._agreed(action, "another rank failed")

    def _agreed(self, action: Callable[[], Any] | None, otherwise: str) -> None:
        error: Exception | None = None
        if action is not None:
            try:
                action()
            except Exception as caught:
                error = caught
        (failed,) = self.any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerFailed(otherwise)

    def among(self, parts: Sequence[Sequence[int]]) -> "Ranks":
        """This rank among those of its part; each rank is in one of ``parts``. For ``any_rank`` and DeepSpeed only: the
        other collectives, which name a source, are for all ranks. Collective."""
        import torch.distributed as dist

        found = None
        for part in parts:  # of every group all ranks must know
            groups = {"data": dist.new_group(list(part)), "control": dist.new_group(list(part), backend="gloo")}
            if self.rank in part:
                found = replace(self, rank=list(part).index(self.rank), world_size=len(part), **groups)
        assert found is not None
        return found

    def own_name(self, text: str) -> str:
        """A name for the process group's store that no earlier call has given out. Collective."""
        self._num_names += 1
        return f"{text}#{self._num_names}"

    def shared_counter(self, text: str) -> Callable[..., int]:
        """A function that draws 0, 1, 2, ...: every number once over all ranks. Collective, but for the drawing.

        ``draw(n)`` takes the next ``n`` numbers at once and returns the first of them.
        """
        from torch.distributed.distributed_c10d import _get_default_store

        store, name = _get_default_store(), self.own_name(text)
        return lambda amount=1: store.add(name, amount) - amount


def check_threads(engine: EngineConfig) -> None:
    """Raises ``UserError`` for more threads than a machine can ever run side by side: a typo would make it crawl."""
    num_cores = len(os.sched_getaffinity(0))
    if engine.num_threads != "auto" and engine.num_threads > 4 * num_cores:
        raise UserError(
            f"engine.num_threads: {engine.num_threads} for a rank, and this machine has {num_cores} cores; lower it"
        )


def threads_of(engine: EngineConfig, num_gpus: int) -> int:
    """CPU threads of this rank. ``num_gpus``: of this machine.

    torchrun says how many ranks share this machine's cores. Where srun has started them, each has cores of its own, or
    they share all.
    """
    if engine.num_threads != "auto":
        return engine.num_threads
    num_cores = len(os.sched_getaffinity(0))
    num_sharing = job.number("LOCAL_WORLD_SIZE", num_gpus if num_cores == os.cpu_count() else 1)
    return max(1, num_cores // max(1, num_sharing)) if num_gpus else 1


def start(engine: EngineConfig) -> Ranks:
    """Join the process group (NCCL with GPUs, else gloo) as the environment says.

    Raises ``UserError`` if there are fewer GPUs than ranks on this machine.
    """
    stop = StopFlag()
    stop.install()
    rank, world_size, local_rank = (job.number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if job.number("MASTER_PORT") > MAX_PORT:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment: ports end at {MAX_PORT:,}")
    if rank >= world_size:
        raise UserError(
            f"the environment says RANK={rank} and WORLD_SIZE={world_size}, and RANK must be the smaller one; torchrun "
            "sets both, unset them outside a group"
        )
    job.log_apart(rank)
    _die_with_parent()  # and tell the launcher that this rank takes signals
    import torch
    import torch.distributed as dist

    check_threads(engine)
    torch.set_num_threads(threads_of(engine, torch.cuda.device_count()))
    if torch.cuda.is_available():
        # Batches differ in shape, and without this the allocator's free blocks fit ever fewer of them.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"engine.num_processes: rank {rank} has no GPU of its own ({torch.cuda.device_count()} here); "
                "start as many ranks as there are GPUs"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        _mallopt(_M_ARENA_MAX, 1)  # per-thread arenas would ignore what keep_memory asks for
        # By itself glibc takes ever larger blocks, as gathered weights are, out of the one heap, in whose holes
        # gigabytes are lost (mT5-XL with adapters on two ranks: 11 GB each, and 8 so).
        _mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    timeout = timedelta(seconds=engine.timeout_seconds)
    store = _meet(stop, min(JOIN_SECONDS, engine.timeout_seconds))
    store.set_timeout(timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch and gloo raise both for what the environment has wrong
        if is_secondary(error):
            raise
        raise _kind_of_failure()(
            f"the ranks cannot make a group ({shorten(error)}); if they are set, GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME must name interfaces of this machine, and RANK must be below WORLD_SIZE"
        ) from None
    return Ranks(rank, world_size, local_rank, device, control, stop)


def _kind_of_failure() -> type[Exception]:
    """In a job a node that is away may be back at the next start, so that it is requeued."""
    return RankFailed if job.attempt_directory() else UserError


def _meet(stop: StopFlag, seconds: float) -> Any:
    """The store in which all ranks meet. A thread waits for it, so that a stop signal is not left unheard.

    Raises ``UserError`` if they do not meet within some seconds, in a job ``RankFailed``, so that it is requeued;
    ``Stopped`` if a signal comes first.
    """
    from torch.distributed.rendezvous import rendezvous

    found: list[Any] = []

    def wait() -> None:
        try:
            if os.environ["RANK"] != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                _knock(os.environ["MASTER_ADDR"], job.number("MASTER_PORT"), seconds)
            else:  # this rank listens there, and calls itself under that name
                socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
            found.append(next(iter(rendezvous("env://", timeout=timedelta(seconds=seconds)))))
        except Exception as error:  # torch raises several kinds; all mean that the ranks have not met
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    start, is_said = time.monotonic(), False
    while thread.is_alive() and time.monotonic() < start + seconds + 30:
        thread.join(0.1)
        if not is_said and time.monotonic() > start + NOTICE_SECONDS:
            is_said = True
            expected = f"the {os.environ['WORLD_SIZE']} ranks that RANK and WORLD_SIZE speak of"
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"waiting up to {seconds:.0f} s for {expected}, at {place}", file=sys.stderr, flush=True)
        if stop.is_set:
            raise Stopped(STOPPED)
    if found and not isinstance(found[0], Exception):
        return found[0][0]
    reason = " ".join(str(found[0]).split("\n")[0].split())[:200] if found else "no answer"
    raise _kind_of_failure()(
        f"the {os.environ['WORLD_SIZE']} ranks that RANK and WORLD_SIZE speak of have not met at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {seconds:.0f} s ({reason}); outside a group "
        "unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, inside one see that all ranks start and reach that port"
    )


def _knock(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there: torch would print the stack of its C++ code at every try.

    Raises ``OSError`` if nobody does in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def finish() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _die_with_parent() -> None:
    """A rank must not outlive its launcher: it would go on writing into a directory that a rerun already uses."""
    directory = error_directory()
    if directory and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        (directory / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))


def keep_memory(ranks: Ranks, weight_bytes: int) -> None:
    """From now on keep freed memory of the host for the next tensor, on ranks without a device of their own.

    glibc hands large blocks back to the kernel at once, so that every step pays for its memory in page faults again: a
    quarter of the time of a step on CPUs, nano or mT5-small. ``weight_bytes``: of the whole model; a large one's freed
    tensors leave holes that nothing fits into (mT5-XL on two ranks: 7 GB each), and its products take far longer.
    """
    if ranks.device.type == "cpu" and weight_bytes <= KEPT_WEIGHT_BYTES:
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, -1)
        _mallopt(_M_TOP_PAD, 64 * 2**20)


KEPT_WEIGHT_BYTES = 2_000_000_000  # of models whose freed memory is kept


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(option, value)
