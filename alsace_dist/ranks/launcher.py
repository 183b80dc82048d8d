"""The launcher: this machine's part of a torchrun group, its signals, and the one error to show."""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import alsace_dist
from alsace_dist.config import EngineConfig
from alsace_dist.errors import EXIT_STOPPED, STOPPED, PeerFailed, RankFailed, Stopped, UserError
from alsace_dist.ranks import job
from alsace_dist.ranks.failures import ERROR_DIR
from alsace_dist.ranks.group import STOP_SIGNALS, check_threads
from alsace_dist.ranks.job import NODE_RANK, RANKS_PER_NODE

RENDEZVOUS_SECONDS = 600  # some nodes load the program slowly from a shared disk


def num_local_processes(engine: EngineConfig) -> int:
    """Ranks to start on this machine."""
    if job.attempt_directory() and RANKS_PER_NODE in os.environ:
        return job.number(RANKS_PER_NODE)
    if engine.num_processes != "auto":
        return engine.num_processes
    import torch

    return torch.cuda.device_count() or min(4, len(os.sched_getaffinity(0)))


def check_room(engine: EngineConfig) -> None:
    """Raises ``UserError`` for more ranks or threads than this machine can ever hold: a typo would hang it."""
    num_cores, num_ranks = len(os.sched_getaffinity(0)), num_local_processes(engine)
    check_threads(engine)
    if num_ranks > max(16, 4 * num_cores):
        raise UserError(
            f"engine.num_processes: {num_ranks} ranks on a machine of {num_cores} cores; each takes a GPU or a core, "
            "and a gigabyte of memory: ask for fewer"
        )


def launch(arguments: Sequence[str], num_processes: int, debug: bool = False) -> None:
    """Run ``alsace ARGUMENTS`` as the ranks of this machine's part of a torchrun group and wait for them.

    The group lies on this machine alone, or in a job on several nodes, each of which calls this function. Stop
    signals go on to the ranks, which agree on a point to stop at. Raises ``Stopped`` if they did; if a rank failed,
    ``UserError`` with the message of the rank that failed first, ``RankFailed``, or ``PeerFailed`` if it was on
    another machine.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun warns of signal handlers, which this module installs, and reports failed ranks, which speak themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="alsace-") as directory:
        settings = LaunchConfig(
            nproc_per_node=num_processes,
            run_id=f"alsace-{os.environ.get('SLURM_JOB_ID', f'{os.getpid()}-{time.time_ns()}')}",
            max_restarts=0,
            monitor_interval=0.1,
            **_rendezvous(),
        )
        outcome: list[BaseException] = []

        def run() -> None:
            try:
                elastic_launch(settings, sys.executable)(*_program(), *arguments)
            except BaseException as error:  # raised in the main thread
                outcome.append(error)

        os.environ[ERROR_DIR] = directory
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # without it torchrun prints a warning; ranks set their number of threads themselves
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
        if is_asked_to_stop:  # the stage was done already, but later stages must not begin
            raise Stopped(STOPPED)


def _program() -> list[str]:
    """Arguments of Python that start this very package, and import nothing from the working directory (``-P``)."""
    root = str(Path(alsace_dist.__file__).parents[1])
    return ["-P", "-c", f"import sys; sys.path.append({root!r}); from alsace_dist.cli import main; main()"]


def _rendezvous() -> dict[str, Any]:
    """How the machines of a group find each other: in a job at its first node; one alone takes any free port.

    On one machine nothing but the loopback interface is needed: a host name that does not resolve, or a
    GLOO_SOCKET_IFNAME meant for the cluster, must not matter.
    """
    num_nodes = job.num_nodes()
    if num_nodes == 1:
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        return {"min_nodes": 1, "max_nodes": 1, **place}
    return {
        "min_nodes": num_nodes,
        "max_nodes": num_nodes,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "rdzv_configs": {"rank": job.number(NODE_RANK), "timeout": RENDEZVOUS_SECONDS},
    }


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
                except ValueError:  # the rank is still writing its process id
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
    # torchrun's times have a resolution of 1 s, so its "first" failure may be a rank that only noticed the death of
    # another; prefer one killed by a signal.
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    killed = next((rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM), None)
    if killed is not None and (first is None or first[0]):
        name = signal.Signals(-codes[killed]).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        return RankFailed(
            f"rank {killed} was killed by {name}{hint}; the same command goes on from the last checkpoint"
        )
    rank, failure = error.get_first_failure()
    if failure.exitcode == EXIT_STOPPED:
        return Stopped(first[3]["message"] if first else STOPPED)
    if first is None:
        return RankFailed(f"rank {rank} ended with exit code {failure.exitcode}; its output above says why")
    row = first[3]
    if row["is_secondary"] and job.num_nodes() > 1:
        return PeerFailed(row["message"])  # the rank died on another node, whose launcher says how
    if debug or row["is_defect"]:
        print(row["traceback"], file=sys.stderr)
    if row["is_user_error"]:
        return UserError(row["message"])
    return RankFailed(f"{first[2]} failed: {row['message']}" if row["is_defect"] else row["message"])
