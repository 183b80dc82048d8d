"""Ranks: the torchrun environment, the process group, agreed stops, and the launcher of a local group."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist.config import EngineConfig
from alsace_dist.errors import EXIT_STOPPED, EXIT_USER_ERROR, STOPPED, Stopped, UserError

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
ERROR_DIR = "ALSACE_ERROR_DIR"  # where the ranks of a local group leave their errors and process ids
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


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
    """A rank met a defect of the program; its traceback is printed already."""


def start(engine: EngineConfig) -> Runtime:
    """Join the process group (NCCL with GPUs, else gloo) as the environment says.

    Raises ``UserError`` if there are fewer GPUs than ranks on this machine.
    """
    stop = StopFlag()
    stop.install()
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


def _keep_memory() -> None:
    """Keep freed memory for the next tensor.

    glibc hands large blocks back to the kernel at once, so that every step pays for its memory in page faults again: a
    quarter of the time of a nano model's step on CPUs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


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


def record_failure(error: BaseException) -> None:
    """Leave this rank's error for the launcher, which prints the first one last."""
    if directory := os.environ.get(ERROR_DIR):
        row = {
            "seconds": time.time(),
            "message": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}",
            "is_user_error": isinstance(error, UserError),
            "is_secondary": is_secondary(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        (Path(directory) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(row))


def num_local_processes(engine: EngineConfig) -> int:
    """Ranks to start on this machine."""
    if engine.num_processes != "auto":
        return engine.num_processes
    import torch

    return torch.cuda.device_count() or min(4, len(os.sched_getaffinity(0)))


def launch(arguments: Sequence[str], num_processes: int, debug: bool = False) -> None:
    """Run ``python -m alsace_dist ARGUMENTS`` as a torchrun group on this machine and wait for it.

    Stop signals go on to the ranks, which agree on a point to stop at. Raises ``Stopped`` if they did, and
    ``UserError`` with the message of the rank that failed first if one failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings are about handlers that are installed here, its errors about ranks that speak for themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="alsace-") as directory:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"alsace-{os.getpid()}-{time.time_ns()}",
            max_restarts=0,
            monitor_interval=0.1,
        )
        outcome: list[BaseException] = []

        def run() -> None:
            try:
                elastic_launch(settings, sys.executable)("-m", "alsace_dist", *arguments)
            except BaseException as error:  # carried over to the main thread
                outcome.append(error)

        os.environ[ERROR_DIR] = directory
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun prints a warning; ranks set their own number
        try:
            # The agent gives its ranks 30 seconds after a signal and then kills them. In a thread it installs no
            # handlers, so that the signals come here and the ranks have the time that a checkpoint takes.
            agent = threading.Thread(target=run, daemon=True)
            agent.start()
            is_asked_to_stop = _wait_and_forward_signals(agent, Path(directory))
        finally:
            del os.environ[ERROR_DIR]
        if outcome:
            raise _explain(outcome[0], Path(directory), debug)
        if is_asked_to_stop:  # too late for this stage, but there may be others
            raise Stopped(STOPPED)


def _wait_and_forward_signals(agent: threading.Thread, directory: Path) -> bool:
    """Wait for the agent; whether a stop signal came. It goes on to every rank as soon as the rank can take it."""
    received: list[int] = []
    told: set[Path] = set()
    is_said = False
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        while agent.is_alive():
            agent.join(0.1)
            if received and not is_said:
                print("stopping at the next safe point; what is done so far is kept", file=sys.stderr, flush=True)
                is_said = True
            for file in set(directory.glob("rank*.pid")) - told if received else ():
                try:
                    os.kill(int(file.read_text()), received[0])
                except ValueError:  # it is being written
                    continue
                except ProcessLookupError:
                    pass
                told.add(file)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(received)


def _explain(error: BaseException, directory: Path, debug: bool) -> Exception:
    """The one error to show: the earliest that a rank reported for itself, else how a rank died."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not isinstance(error, ChildFailedError):
        return error if isinstance(error, Exception) else RuntimeError(repr(error))
    rows = sorted(
        (row["is_secondary"], row["seconds"], file.stem, row)
        for file in directory.glob("rank*.json")
        if (row := json.loads(file.read_text()))
    )
    first = rows[0] if rows else None
    # The first by its time may be one that saw the other die: the times are whole seconds.
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    killed = next((rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM), None)
    if killed is not None and (first is None or first[0]):
        name = signal.Signals(-codes[killed]).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        return UserError(f"rank {killed} was killed by {name}{hint}; the same command goes on from the last checkpoint")
    rank, failure = error.get_first_failure()
    if failure.exitcode == EXIT_STOPPED:
        return Stopped(STOPPED)
    if first is None:
        return UserError(f"rank {rank} ended with exit code {failure.exitcode}; its output above says why")
    if debug or not first[3]["is_user_error"]:
        print(first[3]["traceback"], file=sys.stderr)
    message = first[3]["message"]
    return UserError(message) if first[3]["is_user_error"] else RankFailed(f"{first[2]} failed: {message}")


def exit_code(error: BaseException) -> int:
    """Exit code of a process that ends with this error."""
    return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_USER_ERROR if isinstance(error, UserError) else 1
