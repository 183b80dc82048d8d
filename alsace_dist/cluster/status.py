"""How a submitted run stands: every stage in words, from its outputs, from Slurm, and from what its job left behind."""

import re
import sys
from pathlib import Path

from alsace_dist import pipeline
from alsace_dist.cluster import queue, scripts
from alsace_dist.cluster.scripts import Job
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout
from alsace_dist.files.progress import read_progress

TAIL_BYTES = 20_000


def print_status(config: Config, num_lines: int) -> None:
    """A line per stage: done, running, pending, failed or to do; progress, restarts; and last lines of logs."""
    from rich.console import Console
    from rich.table import Table

    run, is_asked = Path(config.run_dir), True
    try:
        known = queue.known_jobs(run)
        states = queue.job_states([row.job_id for row in known]) if known else {}
    except UserError as error:
        known, states, is_asked = queue.submitted(run), {}, False
        print(f"Slurm is not asked: {error}", file=sys.stderr)
    last = {Path(row.script).stem: row for row in known}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "job", "state", "progress", "restarts"):
        table.add_column(name, overflow="fold")
    tails, blocker = [], ""
    for job in scripts.jobs_of(config, pipeline.stages(config)):
        row = last.get(job.file_name)
        found = states.get(row.job_id) if row else None
        state = _state(job, run, row, found, blocker)
        if row and not is_asked and state != "done":
            state = "unknown: Slurm is not asked"
        blocker = blocker or ("" if state == "done" else job.name)
        log = Layout(run).slurm / "logs" / f"{job.file_name}.log"
        is_telling = state.startswith(("running", "failed", "ending"))
        progress = _progress(job) if is_telling else ""
        restarts = str(found.num_restarts) if found and found.num_restarts else ""
        table.add_row(job.name, row.job_id if row else "", state, progress, restarts)
        if is_telling and (lines := tail(log)[-num_lines:] if num_lines > 0 else []):
            tails.append((log, lines))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for log, lines in tails:
        console.print(f"\nLast lines of {log}:", soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)


def _state(job: Job, run: Path, row: queue.Submitted | None, found: queue.JobState | None, blocker: str) -> str:
    """A stage's state in words: its outputs know best, then Slurm, then what the job left behind.

    ``blocker``: the first stage before it that is not done.
    """
    if job.stage is not None and job.stage.state() == "complete":
        return "done"
    if row is None:
        return "done" if job.stage is None and (run / "report.json").exists() else "to do"
    cause = cause_of(run, row.job_id) or _last_error(Path(row.log), row.job_id)
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


def cause_of(run: Path, job_id: str) -> str:
    """Why a job's last start ended, as its ranks left it; empty if they left nothing."""
    attempts = Layout(run).slurm / "attempts"
    starts = [path for path in (*attempts.glob(f"{job_id}/*"), *attempts.glob(f"{job_id}_*/*")) if path.name.isdigit()]
    if not starts:
        return ""
    causes = sorted(max(starts, key=lambda path: path.stat().st_mtime).glob("cause-*"))
    return causes[0].read_text(encoding="utf-8").strip() if causes else ""


def _progress(job: Job) -> str:
    """How far a stage says it is, in short: the first of its directories that is being written."""
    outputs = job.stage.outputs if job.stage else []
    progress = next((found for output in outputs if (found := read_progress(output.directory))), None)
    if progress is None:
        return ""
    eta = f", eta {progress.eta_seconds:.0f} s" if progress.eta_seconds is not None else ""
    return f"{progress.done}/{progress.total}{eta}"


def tail(log: Path) -> list[str]:
    """The last lines of a log, without reading the rest of it."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()
