"""A rank: the torchrun environment, its process group, agreed stops, and what it leaves about a failure."""

import ctypes
import errno
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist.config import EngineConfig
from alsace_dist.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError
from alsace_dist.files.manifest import write_text

if TYPE_CHECKING:
    import torch

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
LOCK_SECONDS = 10.0  # for the ranks of a start that was killed to be gone
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
ERROR_DIR = "ALSACE_ERROR_DIR"  # where the ranks of a local group leave their errors and process ids
# What a job script says to its tasks (cluster/stage.sh.j2, cluster/slurm_task.sh).
ATTEMPT_DIR = "ALSACE_ATTEMPT_DIR"  # where they leave their output and the cause of a failure
LEAD_SECONDS = "ALSACE_LEAD_SECONDS"  # how long before the end of the job its stop signal comes
NUM_NODES, NODE_RANK, RANKS_PER_NODE = "ALSACE_NUM_NODES", "ALSACE_NODE_RANK", "ALSACE_RANKS_PER_NODE"
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def in_group() -> bool:
    """Whether this process is a rank that torchrun (or srun with torchrun's variables) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class StopFlag:
    """Remembers that a signal asked this process to stop; the handler does nothing else."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Catch the stop signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the group. ``control``: a gloo group, so that flags never wait for the accelerator."""

    rank: int
    world_size: int
    local_rank: int
    device: "torch.device"
    control: Any
    stop: StopFlag = field(default_factory=StopFlag)

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

    def max(self, value: float) -> float:
        """Largest value of any rank. Collective."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return float(tensor)

    def gather(self, value: Any) -> list[Any]:
        """A small JSON-like value of every rank, in rank order. Collective."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        import torch.distributed as dist

        dist.barrier(group=self.control)

    def main_first(self, action: Any) -> None:
        """Run ``action`` on rank 0 only, while the others wait; if it fails there, every rank raises.

        The rank that failed raises its own error; the others a short one that names rank 0.
        """
        error: Exception | None = None
        if self.is_main:
            try:
                action()
            except Exception as caught:
                error = caught
        (failed,) = self.any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerFailed("rank 0 failed")


class PeerFailed(Exception):
    """Another rank failed; its own error says why."""


class RankFailed(Exception):
    """A rank was killed, or met a defect of the program whose traceback is printed already."""


def start(engine: EngineConfig) -> Runtime:
    """Join the process group (NCCL with GPUs, else gloo) as the environment says.

    Raises ``UserError`` if there are fewer GPUs than ranks on this machine.
    """
    stop = StopFlag()
    stop.install()
    _log_apart()
    _die_with_parent()  # and says that this rank takes signals
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.set_num_threads(engine.num_threads)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"engine.num_processes: rank {rank} has no GPU of its own ({torch.cuda.device_count()} here); "
                "start as many ranks as there are GPUs"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        _keep_memory()
    timeout = timedelta(seconds=engine.timeout_seconds)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank, world_size, local_rank, device, control, stop)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` on ``what``: the kernel takes it back when this process ends, however it ends.

    Raises ``UserError`` if another process still holds it after ``LOCK_SECONDS``; in a job ``RankFailed``, for there it
    may be the last start, which is about to end on a node that is gone. Without effect where a disk has no locks.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LOCK_SECONDS
    with path.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    error = RankFailed if ATTEMPT_DIR in os.environ else UserError
                    who = file.read() or "another process"
                    raise error(f"{what}: {who} works on it; wait for that one, or stop it") from None
                time.sleep(0.1)
            except OSError as error_of_disk:
                if error_of_disk.errno not in _NO_LOCKS:
                    raise
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def finish() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def shared_counter(name: str) -> Any:
    """A function that draws 0, 1, 2, ...: every number once over all ranks, in the process group's store.

    ``draw(n)`` takes the next ``n`` numbers at once and returns the first of them.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    return lambda amount=1: store.add(name, amount) - amount


def _die_with_parent() -> None:
    """A rank must not outlive its launcher: it would go on writing into a directory that a rerun already uses."""
    if ERROR_DIR in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        (Path(os.environ[ERROR_DIR]) / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))


def _log_apart() -> None:
    """In a job, the output of rank 0 alone goes into the job's log; every other rank has a file of its own."""
    rank = int(os.environ["RANK"])
    if ATTEMPT_DIR in os.environ and rank:
        sys.stdout.flush()
        sys.stderr.flush()
        with (Path(os.environ[ATTEMPT_DIR]) / f"rank{rank:05d}.log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)


def note_position(text: str) -> None:
    """Leave for the job script where the next start would go on: it stops a job that fails again and again there."""
    if ATTEMPT_DIR in os.environ:
        with suppress(OSError):  # a full disk is told by what the disk is needed for
            write_text(Path(os.environ[ATTEMPT_DIR]) / "position", text + "\n")


class LeadCheck:
    """In a job: warns, once, if stopping takes longer than the time between the signal and the end of the job."""

    def __init__(self) -> None:
        self.lead_seconds = float(os.environ.get(LEAD_SECONDS, "inf"))

    def __call__(self, seconds: float, what: str) -> None:
        """``seconds``: the most that passes between a signal and what is kept of ``what``, as measured."""
        if seconds > self.lead_seconds:
            print(
                f"warning: {what} took {seconds:.0f} s, but the signal to stop comes {self.lead_seconds:.0f} s before "
                f"a job's end: set lead_seconds in the site profile to {2 * seconds:.0f}, or work is lost",
                file=sys.stderr,
            )
            self.lead_seconds = float("inf")


def _keep_memory() -> None:
    """Keep freed memory for the next tensor.

    glibc hands large blocks back to the kernel at once, so that every step pays for its memory in page faults again: a
    quarter of the time of a step on CPUs, nano or mT5-small. In one arena, for those of other threads are given back
    all the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 * 2**20)
        mallopt(_M_ARENA_MAX, 1)


# How gloo, NCCL and the store say that a rank at the other end is gone.
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process",
    "remote worker",
)


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; that rank's own error is the one to read."""
    if isinstance(error, PeerFailed):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PEER_GONE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left: Python's error, PyTorch's for GPUs, or that for CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, which need not be imported here
        or "can't allocate memory" in str(error)
    )


def out_of_memory(error: BaseException) -> str:
    """What to read of an ``is_out_of_memory`` error: which rank, how much it asked for, and what takes less."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    what = f"out of memory{f' (tried to allocate {asked[1]})' if asked else ''}"
    if not in_group():
        return f"{what}; give this machine or job more, then run the same command again"
    return (
        f"rank {os.environ['RANK']}: {what}; lower micro_batch_size of the stage's section (for scoring "
        "score.tokens_per_batch), set engine.gradient_checkpointing, raise engine.zero_stage or take more ranks; "
        "`alsace plan` estimates the model's share; the same command goes on from the last checkpoint"
    )


def is_plain(error: BaseException) -> bool:
    """Whether its message alone tells a person enough."""
    return isinstance(error, UserError | Stopped | RankFailed) or is_secondary(error)


def _message(error: BaseException) -> str:
    return str(error) if is_plain(error) else f"{type(error).__name__}: {error}"


def record_failure(error: BaseException) -> None:
    """Leave this rank's error for the launcher, which prints the first one last."""
    if directory := os.environ.get(ERROR_DIR):
        row = {
            "seconds": time.time(),
            "message": _message(error),
            "is_user_error": isinstance(error, UserError),
            "is_defect": not is_plain(error),
            "is_secondary": is_secondary(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        (Path(directory) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(row))


def record_cause(error: BaseException) -> None:
    """In a job: leave why this task ended, for the job script, which prints the first cause of all tasks last.

    The name says how it compares: ``cause-<0: own, 1: another rank failed>-<nanoseconds>-<exit code>-<who>``.
    """
    if directory := os.environ.get(ATTEMPT_DIR):
        who = f"rank{os.environ['RANK']}" if in_group() else f"node{os.environ.get(NODE_RANK, 0)}"
        message = _message(error)
        if is_secondary(error):
            message = f"a rank died without a word (killed? out of memory?), its node's lines above say how; {message}"
        name = f"cause-{int(is_secondary(error))}-{time.time_ns()}-{exit_code(error)}-{who}"
        with suppress(OSError):  # the error itself is printed all the same
            write_text(Path(directory) / name, " ".join(message.split()) + "\n")


def exit_code(error: BaseException) -> int:
    """Exit code of a process that ends with this error."""
    return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_USER_ERROR if isinstance(error, UserError) else 1
