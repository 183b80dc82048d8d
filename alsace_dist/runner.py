"""Run one stage: skip it if it is complete, hold its lock, do it here or on ranks. And report on what is there."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from alsace_dist import pipeline
from alsace_dist.config import Config
from alsace_dist.data import audit
from alsace_dist.errors import NotReady, RankFailed, UserError
from alsace_dist.files.evaluation import KIND as EVALUATION
from alsace_dist.files.evaluation import read_evaluation
from alsace_dist.files.layout import DATA, MODEL, Layout
from alsace_dist.ranks import group, job, launcher
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Output, Stage, model_after

LOCK_SECONDS = 10.0  # time for the ranks of a killed start to be gone
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def run_stage(stage: Stage, debug: bool = False) -> None:
    """Do a stage from outside: in this process, or on this machine's ranks, which read the run's resolved config."""
    if stage.is_complete():
        print(f"{stage.name}: complete, skipped", file=sys.stderr)
        return
    if stage.on_ranks:
        arguments = [stage.command, str(stage.layout.config), *stage.flags, *(["--debug"] if debug else [])]
        launcher.check_room(stage.config.engine)
        launcher.launch(arguments, launcher.num_local_processes(stage.config.engine), debug)
        if job.num_nodes() == 1 and not stage.is_complete():  # of several nodes, a slow disk may not show it yet
            raise RankFailed(
                f"{stage.name}: its ranks ended without an error and without a result; see their output above"
            )
        return
    print(stage.name, file=sys.stderr)
    with alone(stage.lock, stage.name):
        if not stage.is_complete():  # whoever held the lock may have finished the stage
            stage.run(None)


def run_as_rank(stage: Stage) -> None:
    """Do a stage as one of the ranks that torchrun (or srun) has started.

    Raises ``UserError`` for a stage of one process.
    """
    if not stage.on_ranks:
        raise UserError(f"{stage.name} runs in one process; start it without torchrun")
    run_on_ranks(stage, group.start(stage.config.engine))
    group.finish()


def run_on_ranks(stage: Stage, ranks: Ranks) -> None:
    """Do a stage with the group that this rank has joined; rank 0 holds the lock. Collective."""
    with ExitStack() as stack:
        found: list[bool] = []

        def look() -> None:
            stack.enter_context(alone(stage.lock, stage.name))
            found.append(stage.is_complete())  # whoever held the lock may have finished the stage

        ranks.main_first(look)
        (is_complete,) = ranks.any_rank(any(found))
        if not is_complete:
            stage.run(ranks)


def report(config: Config) -> None:
    """Write the report of a run from the evaluations that are complete, and print its summary.

    Raises ``NotReady`` if there is none.
    """
    from rich.console import Console

    from alsace_dist.reporting.report import print_summary, write_report

    evaluations = {}
    for name, _ in pipeline.variants(config):
        output = Output(Layout(Path(config.run_dir), name).evaluation, EVALUATION)
        if output.exists:
            evaluations[name or "main"] = read_evaluation(output.directory)
    if not evaluations:
        raise NotReady(f"{config.run_dir}: holds no evaluation yet; `alsace run` makes one")
    layout = Layout(Path(config.run_dir))
    model = model_after(config, layout, config.rounds)
    details = {
        "report": layout.run / "report.html",
        "numbers": layout.run / "report.json",
        "model": model.directory / MODEL if model else config.model.path,
        "config": layout.config,
        "TensorBoard": f"tensorboard --logdir {layout.run / 'tensorboard'}",
    }
    write_report(layout.run, evaluations, details, alpha=config.evaluate.alpha, data=_data_lines(layout))
    console = Console()
    print_summary(next(iter(evaluations.values())), console, alpha=config.evaluate.alpha)
    for name, value in details.items():
        console.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)


def _data_lines(layout: Layout) -> list[str]:
    """What the audit has found in the data that this run has prepared; nothing for data prepared elsewhere."""
    output = Output(layout.data, DATA)
    details = output.manifest().details if output.exists else {}
    skipped = [f"left out: {number:,} records with {kind}" for kind, number in details.get("bad_records", {}).items()]
    missing = [f"{language}: {number:,} texts missing" for language, number in details.get("num_missing", {}).items()]
    return [*(audit.lines(details["audit"]) if "audit" in details else []), *skipped, *missing]


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` on ``what``: the kernel takes it back when this process ends, however it ends.

    Raises ``UserError`` if another process still holds it after ``LOCK_SECONDS``; in a job ``RankFailed``, for there
    the holder may be the start before this one, which is about to end on a node that is gone. Without effect where a
    disk has no locks.
    """
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
                    error = RankFailed if job.attempt_directory() else UserError
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
