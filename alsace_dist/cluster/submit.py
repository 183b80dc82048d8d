"""A run on a cluster: which of its stages are submitted, how they stand, and what people are told of it."""

import re
import sys
from pathlib import Path

from alsace_dist import pipeline
from alsace_dist.cluster import queue as slurm
from alsace_dist.cluster import scripts as job_scripts
from alsace_dist.cluster.profile import STAGES, SiteProfile, load_profile
from alsace_dist.cluster.scripts import Job
from alsace_dist.config import Config
from alsace_dist.config_file import config_text
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout

TAIL_BYTES = 20_000
# A line of metrics._LineProgress.
_PROGRESS = re.compile(r"[a-z -]+: (?P<done>\d+)/(?P<total>\d+)($|, \d+ s, eta (?P<eta>\d+) s)")


def submit(config: Config, source: Path, cluster: str, num_nodes: int, only: str, dry_run: bool) -> None:
    """Write the scripts of the stages that are not complete and submit them as a chain.

    ``source``: the YAML that the config was read from; ``cluster``: the site profile; ``num_nodes``: 0 as the profile
    says; ``only``: comma-separated commands.

    Raises ``UserError`` if the run has jobs in the queue, holds outputs of other settings, or Slurm refuses.
    """
    profile = load_profile(cluster)
    num_nodes = _num_nodes(profile, num_nodes)
    commands = [part for part in only.split(",") if part]
    if unknown := [command for command in commands if command not in STAGES]:
        raise UserError(f"--stages: no {unknown[0]!r}; there are {', '.join(STAGES)}")
    found = pipeline.stages(config)
    run = Path(config.run_dir)
    _write_config(config, source, found, is_only_reading=dry_run)
    jobs = [job for job in job_scripts.jobs_of(config, found) if not commands or job.command in commands]
    complete = [job for job in jobs if _is_complete(job)]
    for job in complete:
        print(f"{job.name}: complete, skipped", file=sys.stderr)
    todo = _with_inputs([job for job in jobs if job not in complete], found)
    if not todo or (not any(job.stage for job in todo) and (run / "report.json").exists()):
        print(f"nothing is left to do in {run}")
        return
    scripts = job_scripts.write_scripts(config, profile, todo, num_nodes)
    if dry_run:
        for job in todo:
            print(f"{scripts[job.name]}   {job.name}")
        print("nothing is submitted; each script can be given to sbatch by hand, in this order")
        return
    if any(job.tasks == "ranks" for job in todo):
        slurm.check_num_nodes(num_nodes, profile.partition)
    done = slurm.submit(run, [(job.name, scripts[job.name]) for job in todo])
    width = max(len(row.job_id) for row in done)
    for row in done:
        print(f"{row.job_id:>{width}}  {row.name:<28} log: {row.log}")
    print(
        f"""
Each job starts when the one before has succeeded.
  alsace status {run}     how far it is
  alsace cancel {run}     cancel what is left
  tensorboard --logdir {run / "tensorboard"}     the curves"""
    )


def check_cluster(config: Config, source: Path, cluster: str, num_nodes: int) -> None:
    """Check a cluster's nodes in a job of its own, wait for it and print what it found.

    Raises ``UserError`` if something is wrong with a node.
    """
    profile = load_profile(cluster)
    num_nodes = _num_nodes(profile, num_nodes)
    _write_config(config, source, pipeline.stages(config), is_only_reading=True)
    slurm.check_num_nodes(num_nodes, profile.partition)
    job = job_scripts.doctor_job(config)
    script = job_scripts.write_scripts(config, profile, [job], num_nodes)[job.name]
    log = script.parent / "logs" / f"{script.stem}.log"
    log.unlink(missing_ok=True)  # of an earlier check
    job_id = slurm.sbatch(script)
    print(f"job {job_id} checks {num_nodes} nodes; its log: {log}", file=sys.stderr)
    try:
        state = slurm.wait(job_id)
    except KeyboardInterrupt:
        slurm.scancel([job_id])
        raise
    lines = _tail(log)
    for line in lines:
        if line.startswith(("ok ", "FAILED ")):
            print(line)
    if state != "COMPLETED":
        cause = _cause(Path(config.run_dir), job_id) or (lines[-1] if lines else f"its job ended as {state.lower()}")
        raise UserError(f"doctor: {cause.removeprefix('doctor: ')}")


def _num_nodes(profile: SiteProfile, given: int) -> int:
    if given < 0:
        raise UserError(f"--nodes={given}: must be 1 or more")
    return given or profile.nodes


def _write_config(config: Config, source: Path, found: list[pipeline.Stage], is_only_reading: bool) -> None:
    """Write the resolved config, but not one with other settings under jobs that are still to read it."""
    run = Path(config.run_dir)
    path = Layout(run).config
    is_same = path.exists() and path.read_text(encoding="utf-8") == config_text(config)
    if not (is_only_reading and is_same):
        slurm.refuse_if_alive(run)
    pipeline.write_config(config, source, found)


def _with_inputs(todo: list[Job], found: list[pipeline.Stage]) -> list[Job]:
    """The jobs whose inputs are complete or made by jobs before them; the others are said and left out.

    Raises ``UserError`` if of a command none is left.
    """
    kept: list[Job] = []
    for job in todo:
        missing = _missing_input(job, kept, found)
        if missing is None:
            kept.append(job)
            continue
        reason = f"{job.name} needs {missing.name}, which is not complete"
        if job.command not in (one.command for one in kept):
            raise UserError(f"--stages: {reason}; add {missing.command}")
        print(f"{reason}: left out", file=sys.stderr)
    return kept


def _missing_input(job: Job, kept: list[Job], found: list[pipeline.Stage]) -> pipeline.Stage | None:
    """The first stage before a job's that it needs and that is neither complete nor among the jobs kept."""
    if job.stage is None:
        return None
    submitted = [one.stage.name for one in kept if one.stage]
    for stage in found[: job.number - 1]:
        is_shared = stage.command in ("prepare", "pretrain-nano", "finetune", "score") and not stage.round
        is_needed = stage.variant == job.stage.variant or (is_shared and not stage.variant)
        if is_needed and stage.name not in submitted and stage.state() != "complete":
            return stage
    return None


def _is_complete(job: Job) -> bool:
    if job.stage is None:
        return False
    state = job.stage.state()
    if state.startswith("refused: "):
        raise UserError(state.removeprefix("refused: "))
    return state == "complete"


def cancel(run: Path) -> None:
    """Cancel what a run has in the queue, and say what that was."""
    gone = slurm.cancel(run)
    for row in gone:
        print(f"{row.job_id}  {row.name}: cancelled")
    if not gone:
        print(f"{run}: has no jobs in the queue")


def print_status(config: Config, num_lines: int) -> None:
    """A line per stage: done, running, pending, failed or to do; progress, restarts; and last lines of logs."""
    from rich.console import Console
    from rich.table import Table

    run, is_asked = Path(config.run_dir), True
    try:
        known = slurm.known_jobs(run)
        states = slurm.job_states([row.job_id for row in known]) if known else {}
    except UserError as error:
        known, states, is_asked = slurm.submitted(run), {}, False
        print(f"Slurm is not asked: {error}", file=sys.stderr)
    last = {Path(row.script).stem: row for row in known}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "job", "state", "progress", "restarts"):
        table.add_column(name, overflow="fold")
    tails, blocker = [], ""
    for job in job_scripts.jobs_of(config, pipeline.stages(config)):
        row = last.get(job.file_name)
        found = states.get(row.job_id) if row else None
        state = _state(job, run, row, found, blocker)
        if row and not is_asked and state != "done":
            state = "unknown: Slurm is not asked"
        blocker = blocker or ("" if state == "done" else job.name)
        log = Layout(run).slurm / "logs" / f"{job.file_name}.log"
        is_telling = state.startswith(("running", "failed", "ending"))
        progress = _progress(log) if is_telling else ""
        restarts = str(found.num_restarts) if found and found.num_restarts else ""
        table.add_row(job.name, row.job_id if row else "", state, progress, restarts)
        if is_telling and (lines := _tail(log)[-num_lines:] if num_lines > 0 else []):
            tails.append((log, lines))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for log, lines in tails:
        console.print(f"\nLast lines of {log}:", soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)


def _state(job: Job, run: Path, row: slurm.Submitted | None, found: slurm.JobState | None, blocker: str) -> str:
    """A stage's state in words: its outputs know best, then Slurm, then what the job left behind.

    ``blocker``: the first stage before it that is not done.
    """
    if job.stage is not None and job.stage.state() == "complete":
        return "done"
    if row is None:
        return "done" if job.stage is None and (run / "report.json").exists() else "to do"
    cause = _cause(run, row.job_id)
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
        return "cancelled"
    return f"failed: {cause or found.state.lower()}"


def _cause(run: Path, job_id: str) -> str:
    """Why a job's last start ended, as its ranks left it; empty if they left nothing."""
    attempts = Layout(run).slurm / "attempts"
    starts = [path for path in (*attempts.glob(f"{job_id}/*"), *attempts.glob(f"{job_id}_*/*")) if path.name.isdigit()]
    if not starts:
        return ""
    causes = sorted(max(starts, key=lambda path: path.stat().st_mtime).glob("cause-*"))
    return causes[0].read_text(encoding="utf-8").strip() if causes else ""


def _progress(log: Path) -> str:
    """The last progress line of a log, in short."""
    for line in reversed(_tail(log)):
        if line.startswith("== "):  # the job's start
            return ""
        if match := _PROGRESS.match(line):
            eta = f", eta {match['eta']} s" if match["eta"] else ""
            return f"{match['done']}/{match['total']}{eta}"
    return ""


def _tail(log: Path) -> list[str]:
    """The last lines of a log, without reading the rest of it."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()
