"""Submit a run to a cluster: which of its stages become jobs, in which order; and cancel, and check the nodes."""

import shlex
import sys
from pathlib import Path

from alsace_dist import pipeline
from alsace_dist.cluster import queue, scripts
from alsace_dist.cluster.profile import JOB_COMMANDS, SiteProfile, load_profile
from alsace_dist.cluster.scripts import Job
from alsace_dist.cluster.status import cause_of, tail
from alsace_dist.config import Config
from alsace_dist.config_file import config_text
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout
from alsace_dist.ranks.job import attempt_directory
from alsace_dist.stages.base import Stage


def submit(
    config: Config, yaml_path: Path, cluster: str, num_nodes: int, only: str, dry_run: bool, after: str = ""
) -> None:
    """Write the scripts of the stages that are not complete and submit them as a chain.

    ``yaml_path``: the YAML that the config was read from; ``cluster``: the site profile; ``num_nodes``: 0 as the
    profile says; ``only``: comma-separated commands; ``after``: comma-separated ids of jobs that the first one waits
    for.

    Raises ``UserError`` if the run has jobs in the queue or is being submitted, holds outputs of other settings, or
    Slurm refuses.
    """
    profile = load_profile(cluster)
    num_nodes = _num_nodes(profile, num_nodes)
    commands = [part for part in only.split(",") if part]
    if unknown := [command for command in commands if command not in JOB_COMMANDS]:
        raise UserError(f"--stages: no {unknown[0]!r}; there are {', '.join(JOB_COMMANDS)}")
    pipeline.claim_run(Layout(Path(config.run_dir)))  # before the lock is written into somebody else's directory
    with queue.alone(Path(config.run_dir)):
        _submit(config, yaml_path, profile, num_nodes, commands, dry_run, after)


def _submit(
    config: Config,
    yaml_path: Path,
    profile: SiteProfile,
    num_nodes: int,
    commands: list[str],
    dry_run: bool,
    after: str,
) -> None:
    found = pipeline.stages(config)
    run = Path(config.run_dir)
    write_config(config, yaml_path, found, is_only_reading=dry_run)
    jobs = [job for job in scripts.jobs_of(config, found) if not commands or job.command in commands]
    complete = [job for job in jobs if _is_complete(job)]
    for job in complete:
        print(f"{job.name}: complete, skipped", file=sys.stderr)
    todo = _with_inputs([job for job in jobs if job not in complete], found)
    if not todo or (not any(job.stage for job in todo) and (run / "report.json").exists()):
        print(f"nothing is left to do in {run}")
        return
    written = scripts.write_scripts(config, profile, todo, num_nodes)
    if dry_run:
        for job in todo:
            print(f"{written[job.name]}   {job.name}")
        print("nothing is submitted; each script can be given to sbatch by hand, in this order")
        return
    queue.check_scripts([written[job.name] for job in todo])
    ids = queue.check_after(after) if after else []
    done = queue.submit(run, [(job.name, written[job.name]) for job in todo], ids)
    width = max(len(row.job_id) for row in done)
    for row in done:
        print(f"{row.job_id:>{width}}  {row.name:<28} log: {row.log}")
    print(
        f"""
Each job starts when the one before has succeeded.
  alsace status {shlex.quote(str(run))}     how far it is
  alsace cancel {shlex.quote(str(run))}     cancel what is left
  tensorboard --logdir {shlex.quote(str(run / "tensorboard"))}     the curves"""
    )


def check_cluster(config: Config, yaml_path: Path, cluster: str, num_nodes: int) -> None:
    """Check a cluster's nodes in a job of its own, wait for the job and print what the job found.

    Raises ``UserError`` if something is wrong with a node.
    """
    profile = load_profile(cluster)
    num_nodes = _num_nodes(profile, num_nodes)
    write_config(config, yaml_path, pipeline.stages(config))
    job = scripts.doctor_job(config)
    script = scripts.write_scripts(config, profile, [job], num_nodes)[job.name]
    queue.check_scripts([script])
    log = script.parent / "logs" / f"{script.stem}.log"
    log.unlink(missing_ok=True)  # an earlier check has left its log
    job_id = queue.sbatch(script)
    print(f"job {job_id} checks {num_nodes} nodes; its log: {log}", file=sys.stderr)
    try:
        state = queue.wait(job_id)
    except KeyboardInterrupt:
        queue.scancel([job_id])
        raise
    lines = tail(log)
    for line in lines:
        if line.startswith(("ok ", "FAILED ")):
            print(line)
    if state != "COMPLETED":
        cause = cause_of(Path(config.run_dir), job_id) or (lines[-1] if lines else f"its job ended as {state.lower()}")
        raise UserError(f"doctor: {cause.removeprefix('doctor: ')}")


def _num_nodes(profile: SiteProfile, given: int) -> int:
    if given < 0:
        raise UserError(f"--nodes={given}: must be 1 or more")
    return given or profile.nodes


def write_config(config: Config, yaml_path: Path, found: list[Stage], is_only_reading: bool = True) -> None:
    """Write the resolved config, but not one with other settings under jobs that are still to read it.

    ``is_only_reading``: the config is all that is written, so that jobs in the queue do not matter if it says the same.
    """
    run = Path(config.run_dir)
    path = Layout(run).config
    is_same = path.exists() and path.read_bytes() == config_text(config).encode()
    in_job = attempt_directory() is not None  # one of those jobs, under a program that knows new settings
    if not (is_only_reading and (is_same or in_job)):
        try:
            queue.refuse_if_alive(run)
        except queue.NoSlurm as error:
            if not is_only_reading:
                raise
            listed = Layout(run).slurm / "jobs.json"
            raise queue.NoSlurm(f"{error}; if the run has no jobs in the queue any more, remove {listed}") from None
    pipeline.write_config(config, yaml_path, found)


def _with_inputs(todo: list[Job], found: list[Stage]) -> list[Job]:
    """The jobs whose inputs are complete or made by jobs before them; any other job is left out, which is said.

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


def _missing_input(job: Job, kept: list[Job], found: list[Stage]) -> Stage | None:
    """The first stage whose output a job needs and that is neither complete nor among the jobs kept."""
    needed = {output.directory for output in job.stage.inputs} if job.stage else set()
    submitted = [one.stage.name for one in kept if one.stage]
    for stage in found:
        is_needed = any(output.directory in needed for output in stage.outputs)
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
    if not Layout(run).config.exists():
        raise UserError(f"{run}: is not the directory of a run; give the run_dir of one")
    gone = queue.cancel(run)
    for row in gone:
        print(f"{row.job_id}  {row.name}: cancelled")
    if not gone:
        print(f"{run}: has no jobs in the queue")
