"""How a submitted run stands: every stage in words, from its outputs, from Slurm, and from what its job left behind."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alsace_dist import pipeline, runner, sweep
from alsace_dist.cluster import jobs, queue, scripts
from alsace_dist.cluster.scripts import Job
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout
from alsace_dist.files.progress import read_progress
from alsace_dist.files.warnings import read_warnings
from alsace_dist.reading import check_regular
from alsace_dist.reporting.verdict import printable
from alsace_dist.stages.base import Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TAIL_BYTES = 20_000
SEEDS_ABREAST = 8  # columns of a table
_States = Mapping[str, queue.JobState] | None  # None: Slurm was not asked


@dataclass(frozen=True)
class StageStatus:
    """How a stage of a run stands. ``log``: of its job, whether it is there or not."""

    name: str
    job_id: str
    state: str
    progress: str
    num_restarts: int
    log: Path

    @property
    def is_telling(self) -> bool:
        """Whether the last lines of the log say something of it."""
        return self.state.startswith(("running", "failed", "ending", "stopped"))


def print_status(config: Config, num_lines: int) -> None:
    """A line per stage: done, running, pending, failed or to do; progress, restarts; and last lines of logs."""
    run = Path(config.run_dir)
    states: _States = None
    known = jobs.submitted(run)
    try:
        known = jobs.known_jobs(run)
        states = queue.job_states(row.job_id for row in known)
    except UserError as error:
        print(f"Slurm is not asked: {error}", file=sys.stderr)
    rows = list(_statuses(config, known, states))
    table = _table("stage", "job", "state", "progress", "restarts")
    for row in rows:
        table.add_row(row.name, row.job_id, row.state, row.progress, str(row.num_restarts or ""))
    console = _console()
    console.print(table)
    _print_tails(console, rows, num_lines)
    _print_warnings(console, run, num_lines)


def watch(show: Callable[[], None], seconds: float) -> None:
    """Show it again and again, until Ctrl-C; on a terminal in the place of what was shown before."""
    with suppress(KeyboardInterrupt):
        while True:
            if sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(time.strftime("%H:%M:%S"))
            show()
            sys.stdout.flush()
            time.sleep(seconds)


def print_sweep(run: Path, num_lines: int) -> None:
    """A table of stages and seeds; for what is under way or has failed a line with its job, and last lines of logs."""
    states: _States = None
    known = jobs.submitted_to_members(run)
    try:
        known = jobs.known_to_members(run)
        states = queue.job_states(row.job_id for rows in known.values() for row in rows)
    except UserError as error:
        print(f"Slurm is not asked: {error}", file=sys.stderr)
    found: dict[int, list[StageStatus]] = {}
    for member in sweep.members(run):
        path = Layout(member.run).config
        if path.exists():
            config = pipeline.load_run(path, {"run_dir": str(member.run)})
            found[member.seed] = list(_statuses(config, known[member.seed], states))
        else:
            print(f"seed {member.seed}: {path}: no such file; it was never begun, or is gone", file=sys.stderr)
    console, seeds = _console(), list(found)
    for begin in range(0, len(seeds), SEEDS_ABREAST):
        some = seeds[begin : begin + SEEDS_ABREAST]
        table = _table("stage", *(f"seed {seed}" for seed in some))
        for name in dict.fromkeys(row.name for seed in some for row in found[seed]):
            cells = {seed: row for seed in some for row in found[seed] if row.name == name}
            table.add_row(name, *(_short(cells[seed]) if seed in cells else "" for seed in some))
        console.print(table)
    told = [(seed, row) for seed in seeds for row in found[seed] if row.is_telling or row.state.startswith("cancelled")]
    for seed, row in told:
        restarts = f", {row.num_restarts} restarts" if row.num_restarts else ""
        console.print(f"seed {seed}  {row.name}  {row.job_id}  {row.state}{restarts}", soft_wrap=True)
    _print_tails(console, [row for _, row in told if row.is_telling], num_lines)
    for member in sweep.members(run):
        _print_warnings(console, member.run, num_lines)


def _short(row: StageStatus) -> str:
    """For a cell of a table: the state's first word, and how far it is."""
    word = "to do" if row.state.startswith("to do") else re.split(r"[ :;]", row.state)[0]
    return f"{word} {row.progress.partition(',')[0]}".rstrip()


def _statuses(config: Config, known: Sequence[jobs.Submitted], states: _States) -> Iterator[StageStatus]:
    """Of every stage of a run. ``states``: None if Slurm was not asked."""
    run, blocker = Path(config.run_dir), ""
    last = {Path(row.script).stem: row for row in known}
    for job in scripts.jobs_of(config, pipeline.stages(config)):
        row = last.get(job.file_name)
        found = states.get(row.job_id) if row and states else None
        state = _state(job, run, row, found, blocker)
        if row and states is None and state != "done":
            state = "unknown: Slurm is not asked"
        blocker = blocker or ("" if state == "done" else job.name)
        log = Path(row.log) if row else Layout(run).slurm / "logs" / f"{job.file_name}.log"
        one = StageStatus(job.name, row.job_id if row else "", state, "", found.num_restarts if found else 0, log)
        yield replace(one, progress=_progress(job, state.startswith("running"))) if one.is_telling else one


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def _print_tails(console: "Console", rows: Sequence[StageStatus], num_lines: int) -> None:
    for row in rows:
        if row.is_telling and (lines := tail(row.log)[-num_lines:] if num_lines > 0 else []):
            console.print(f"\nLast lines of {_relative(row.log)}:", soft_wrap=True)
            for line in lines:
                console.print(f"  {line}", soft_wrap=True)


def _print_warnings(console: "Console", run: Path, num_lines: int) -> None:
    """The last warnings of a run, each once."""
    if found := read_warnings(run)[-num_lines:] if num_lines > 0 else []:
        console.print(f"\nLast warnings of {_relative(run)}:", soft_wrap=True)
        for one, count in found:
            times = f" (said {count} times)" if count > 1 else ""
            said = printable(f"{one.time}  {one.stage}: {one.text}")
            console.print(f"  {said}{times}", soft_wrap=True)


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _state(job: Job, run: Path, row: jobs.Submitted | None, found: queue.JobState | None, blocker: str) -> str:
    """A stage's state in words: its outputs know best, then Slurm, then what the job left behind.

    ``blocker``: the first stage before it that is not done.
    """
    if job.stage is not None and job.stage.state() == "complete":
        return "done"
    if row is None and job.stage is not None:
        return _without_slurm(job.stage)
    if row is None:
        return "done" if (run / "report.json").exists() else "to do"
    cause = cause_of(Path(row.script).parent, row.job_id) or _last_error(Path(row.log), row.job_id)
    if found is None:
        if job.stage is None and (run / "report.json").exists():
            return "done"
        return f"failed: {cause}" if cause else "to do (Slurm knows nothing of its job)"
    if found.state == "PENDING":
        return f"pending ({found.reason})" + (f" after: {cause}" if cause else "")
    if found.state == "RUNNING":
        return f"running on {found.nodes}"
    if found.is_alive:
        return f"ending ({found.state.lower()})"
    if found.state == "COMPLETED":
        return "done" if job.stage is None else "failed: its job succeeded, but its outputs are not there"
    if found.state == "CANCELLED":
        if found.reason == "DependencyNeverSatisfied" and blocker:
            return f"cancelled: {blocker} has not succeeded"
        if found.reason == "DependencyNeverSatisfied":
            return "cancelled: the job that it was to follow has not succeeded"
        return "cancelled"
    return f"failed: {_why(found, cause)}"


def _without_slurm(stage: Stage) -> str:
    """A stage's state that is not done and was not submitted: others may work on it here all the same."""
    if holder := runner.holder_of(stage.lock):
        return f"running: {printable(holder)}"
    begun = any(read_progress(output.directory) for output in stage.outputs)
    return "stopped; `alsace run` goes on with it" if begun else "to do"


def _why(found: queue.JobState, cause: str) -> str:
    """The cause that the job has left, and what Slurm says of its end where that says more than that it failed."""
    said = [found.state.lower().replace("_", " ")] if found.state != "FAILED" else []
    said += [found.reason] if found.reason not in ("", "NonZeroExitCode") else []
    code, _, number = found.exit_code.partition(":")
    if number not in ("", "0"):
        said.append(f"ended by signal {number}")
    elif not cause and code not in ("", "0"):
        said.append(f"exit code {code}")
    words = ", ".join(said) or "no reason"
    if cause:
        return f"{cause} (Slurm: {words})" if said else cause
    return f"Slurm says: {words}; its log says no more"


def _last_error(log: Path, job_id: str) -> str:
    """The last ``error:`` line of a job's last start in its log; empty if there is none.

    Every start begins with a line that names its job, so an error of an earlier job is not taken for this one's.
    """
    found = ""
    for line in reversed(tail(log)):
        if line.startswith("== "):
            return found if re.search(rf": job {job_id}[_,]", line) else ""
        if not found and line.startswith(("error: ", "slurmstepd: error: ")):
            found = line.removeprefix("slurmstepd: ").removeprefix("error: ").strip()
    return ""


def cause_of(directory: Path, job_id: str) -> str:
    """Why a job's last start ended, as its ranks left it; empty if they left nothing. ``directory``: of its script."""
    attempts = directory / "attempts"
    starts = [path for path in (*attempts.glob(f"{job_id}/*"), *attempts.glob(f"{job_id}_*/*")) if path.name.isdigit()]
    if not starts:
        return ""
    causes = sorted(max(starts, key=lambda path: path.stat().st_mtime).glob("cause-*"))
    try:
        return printable(causes[0].read_text(encoding="utf-8", errors="replace").strip()) if causes else ""
    except OSError:  # no file, or gone since
        return ""


def _progress(job: Job, is_running: bool) -> str:
    """How far a stage says it is, in short: the first of its directories that is being written."""
    outputs = job.stage.outputs if job.stage else []
    progress = next((found for output in outputs if (found := read_progress(output.directory))), None)
    if progress is None:
        return ""
    eta = f", eta {progress.eta_seconds:.0f} s" if is_running and progress.eta_seconds is not None else ""
    return f"{progress.done}/{progress.total}{eta}"


def tail(log: Path) -> list[str]:
    """The last lines of a log, without reading the rest of it."""
    try:
        check_regular(log, "it is no log")  # a pipe would never end
    except (UserError, OSError):
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return [printable(line) for line in file.read().decode("utf-8", "replace").splitlines()]
