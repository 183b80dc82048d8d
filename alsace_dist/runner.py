"""Run one stage: skip it if it is complete, hold its lock, do it here or on ranks. And report on what is there."""

import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from alsace_dist.config import Config
from alsace_dist.config_file import variant as variant_of
from alsace_dist.errors import NotReady, RankFailed, UserError, heard_by
from alsace_dist.files.costs import Start
from alsace_dist.files.layout import SEEDS_NUMBERS, SEEDS_TABLE, Layout
from alsace_dist.files.manifest import write_json, write_text
from alsace_dist.files.scores import read_scores
from alsace_dist.files.selection import read_selection
from alsace_dist.files.warnings import add_warning
from alsace_dist.ranks import group, job, launcher
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages.base import Stage

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
            with _kept(stage, 1):
                stage.run(None)


def replay(stage: Stage, debug: bool = False) -> None:
    """Look at a step of a training once more, on this machine's ranks.

    Raises ``UserError`` for a training that was not begun, or is complete, so that its checkpoints are gone.
    """
    if not stage.is_begun():
        raise UserError(f"{stage.name}: has not begun in {stage.config.run_dir}")
    if stage.is_complete():
        raise UserError(f"{stage.name}: is complete, and its checkpoints are gone; replay is for one that has stopped")
    arguments = ["replay", stage.config.run_dir, f"--stage={stage.command}", *stage.flags, f"--step={stage.replay}"]
    launcher.launch(arguments, launcher.num_local_processes(stage.config.engine), debug)


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
            if ranks.is_main:
                stack.enter_context(_kept(stage, ranks.world_size))
            stage.run(ranks)


@contextmanager
def _kept(stage: Stage, num_ranks: int) -> Iterator[None]:
    """Within it a stage runs: what people are warned of is kept in the run, and in the end how long it took. Not where
    ranks were started without the run's resolved config, which marks its directory as this program's."""
    if not stage.layout.config.exists():
        yield
        return
    run, is_done = stage.layout.run, False
    with heard_by(partial(add_warning, run, stage.name)):
        if stage.replay is not None:
            yield
            return
        mark = stage.lock.with_name(f"{stage.lock.name}.begun")
        directories = [output.directory for output in stage.outputs]
        start = Start(run, stage.name, mark, directories, num_ranks, job.num_nodes())
        try:
            yield
            is_done = True
        finally:
            start.end(is_done)


def report(config: Config) -> None:
    """Write the report of a run from the evaluations that are complete, and print its summary.

    Raises ``NotReady`` if the run itself has none.
    """
    from rich.console import Console

    from alsace_dist import outcome
    from alsace_dist.reporting.report import pictures_of, print_summary, write_report

    evaluations = outcome.evaluations_of(config)
    if "main" not in evaluations:  # of variants alone a report would pass one off as the run
        raise NotReady(f"{config.run_dir}: holds no evaluation of its own yet; `alsace run` makes one")
    facts, numbers = outcome.facts_of(config), Path(config.run_dir) / "report.json"
    before = numbers.read_bytes() if numbers.exists() else b""
    write_report(Path(config.run_dir), evaluations, facts, config.evaluate)
    if numbers.read_bytes() != before or not outcome.is_shown_in_tensorboard(config):
        outcome.show_in_tensorboard(config, evaluations, pictures_of(evaluations, facts, config.evaluate.alpha))
    console = Console()
    print_summary(next(iter(evaluations.values())), console, config.evaluate)
    for name, value in facts.details.items():
        console.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)


def report_seeds(run: Path, configs: Mapping[int, Config]) -> None:
    """Write the report of a sweep over the seeds that have been evaluated, and print the table.

    ``configs``: seed -> the config of its run. Raises ``NotReady`` if none has.
    """
    from alsace_dist import outcome
    from alsace_dist.reporting import markdown, seeds

    found = {seed: evaluations for seed, config in configs.items() if (evaluations := outcome.evaluations_of(config))}
    if not found:
        raise NotReady(f"{run}: holds no evaluation yet; `alsace run --seeds` makes them")
    ways = seeds.pooled(found, next(iter(configs.values())).evaluate.alpha)
    text = markdown.table(seeds.seeds_table(ways))
    title = f"Seeds {', '.join(map(str, found))}: mean ± standard deviation, in percent; languages that changed "
    title += "significantly over all seeds together."
    write_text(run / SEEDS_TABLE, f"{title}\n\n{text}\n")
    write_json(run / SEEDS_NUMBERS, seeds.as_json(ways))
    print(f"{title}\n\n{text}")


def explain(config: Config, round_: int, variant: str = "") -> str:
    """Why the teachers of a round teach, as Markdown. Raises ``NotReady`` if they have not been selected."""
    from alsace_dist.reporting import markdown
    from alsace_dist.reporting.explanation import explanation

    config = variant_of(config, variant) if variant else config
    layout = Layout(Path(config.run_dir), variant)
    selection = read_selection(layout.selection(round_))
    size = config.task.num_candidates
    scores = read_scores(layout.scores(round_ - 1, "unlabeled"), config.select.num_groups, size)
    tables = explanation(config, selection, scores)
    return "\n\n".join(f"{markdown.escape(title)}\n\n{markdown.table(table)}" for title, table in tables)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` on ``what``: the kernel takes it back when this process ends, however it ends.

    Raises ``UserError`` if another process still holds it after ``LOCK_SECONDS``; in a job ``RankFailed``, for there
    the holder may be the start before this one, which is about to end on a node that is gone. Without effect where a
    disk has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LOCK_SECONDS
    with _open_lock(path) as file:
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


def holder_of(path: Path) -> str | None:
    """Who holds a lock now, in words; None if nobody does, or the disk has no locks."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
    except BlockingIOError:
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        pass
    return None


def _open_lock(path: Path) -> TextIO:
    """The lock's file, to be read and appended to. Raises ``UserError`` for a link, whose target would be written
    over, and for a pipe or a device."""
    remedy = "is not the lock that alsace_dist writes; remove it"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path}: {remedy}") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: {remedy}")
    return os.fdopen(handle, "a+", encoding="utf-8")
