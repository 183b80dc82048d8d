"""Submit a run or a sweep to a cluster: which stages become jobs, in which order; and cancel, and check the nodes."""

import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alsace_dist import pipeline, sweep
from alsace_dist.cluster import acceptance, jobs, queue, scripts
from alsace_dist.cluster.jobs import Chain
from alsace_dist.cluster.profile import JOB_COMMANDS, SiteProfile, load_profile
from alsace_dist.cluster.scripts import Array, Job
from alsace_dist.cluster.status import cause_of, tail
from alsace_dist.config import Config
from alsace_dist.config_file import config_text
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout
from alsace_dist.ranks.job import attempt_directory
from alsace_dist.stages.base import Stage

# Slurm looks at the dependencies of so many tasks of an array at a time (correspond_after_task_cnt): a task beyond them
# may look for the task that it waits for when the controller has forgotten that one, and is cancelled.
MAX_TASKS = 10


@dataclass(frozen=True)
class Request:
    """What ``alsace submit`` was asked for. ``num_nodes``: 0 as the profile says; ``commands``: only these, none for
    all; ``after``: comma-separated ids of jobs that the first ones wait for; ``at_once``: tasks of a stage of a sweep
    that may run at the same time, 0 for all."""

    profile: SiteProfile
    num_nodes: int
    commands: tuple[str, ...]
    is_dry_run: bool
    after: str = ""
    at_once: int = 0


def submit(
    config: Config,
    yaml_path: Path,
    cluster: str,
    num_nodes: int,
    only: str,
    dry_run: bool,
    after: str = "",
    seeds: Sequence[int] = (),
    at_once: int = 0,
) -> None:
    """Write the scripts of the stages that are not complete and submit them as a chain; with ``seeds``, as a chain of
    arrays, a task for each seed.

    ``yaml_path``: the YAML that the config was read from; ``cluster``: the site profile; ``num_nodes``: 0 as the
    profile says; ``only``: comma-separated commands; ``after``: comma-separated ids of jobs that the first one waits
    for.

    Raises ``UserError`` if the run has jobs in the queue or is being submitted, holds outputs of other settings, or
    Slurm refuses.
    """
    profile = load_profile(cluster)
    commands = tuple(part for part in only.split(",") if part)
    if unknown := [command for command in commands if command not in JOB_COMMANDS]:
        raise UserError(f"--stages: no {unknown[0]!r}; there are {', '.join(JOB_COMMANDS)}")
    if at_once < 0 or (at_once and not seeds):
        raise UserError(f"--at-once={at_once}: " + ("must be 1 or more" if at_once < 0 else "is for --seeds"))
    request = Request(profile, _num_nodes(profile, num_nodes), commands, dry_run, after, at_once)
    if ignored := sorted(name for name in os.environ if name.startswith("SBATCH_")):
        print(f"{', '.join(ignored)}: not used, only the site profile counts", file=sys.stderr)
    run = Path(config.run_dir)
    if seeds:
        if not dry_run:
            acceptance.check_array(len({*seeds, *(member.seed for member in sweep.members(run))}))
        found = sweep.claim(run, seeds)
        with jobs.alone(run):
            _submit_sweep(config, yaml_path, request, [member for member in found if member.seed in seeds])
        return
    sweep.refuse_sweep(run)
    pipeline.claim_run(Layout(run))  # before the lock is written into somebody else's directory
    with jobs.alone(run):
        _submit_run(config, yaml_path, request)


def _submit_run(config: Config, yaml_path: Path, request: Request) -> None:
    run = Path(config.run_dir)
    found = pipeline.stages(config)
    write_config(config, yaml_path, found, is_only_reading=request.is_dry_run)
    todo = _todo(config, found, request, "")
    if not todo:
        print(f"nothing is left to do in {run}")
        return
    written = scripts.write_scripts(config, request.profile, todo, request.num_nodes)
    chain = Chain(tuple((job.name, written[job.name]) for job in todo))
    _submit_chains(run, [chain], request)


def _submit_sweep(config: Config, yaml_path: Path, request: Request, wanted: Sequence[sweep.Member]) -> None:
    """Seeds that lack the same stages share their arrays, for a task can wait only for the task of its own number."""
    run = Path(config.run_dir)
    configs = sweep.configs(config, [member.seed for member in wanted])
    by_name: dict[str, Job] = {}
    lacking: dict[tuple[str, ...], list[int]] = {}  # names of jobs -> places of the seeds that lack just these
    for member in wanted:
        one, label = configs[member.seed], f"seed {member.seed}: "
        found = pipeline.stages(one)
        alive = [] if request.is_dry_run else jobs.alive_jobs(member.run)
        write_config(one, yaml_path, found, is_only_reading=request.is_dry_run or bool(alive))
        if alive:
            print(f"{label}has jobs in the queue, left out: {', '.join(job.job_id for job in alive)}", file=sys.stderr)
        elif todo := _todo(one, found, request, label):
            by_name |= {job.name: job for job in todo}
            lacking.setdefault(tuple(job.name for job in todo), []).append(member.place)
    if not lacking:
        print(f"nothing is left to submit in {run}")
        return
    written: dict[str, Path] = {}
    runs = tuple(member.run for member in sweep.members(run))
    for job in sorted(by_name.values(), key=lambda job: job.number):
        tasks = sorted(place for names, places in lacking.items() if job.name in names for place in places)
        array = Array(runs, tuple(tasks), request.at_once)
        written |= scripts.write_scripts(config, request.profile, [job], request.num_nodes, array)
    _submit_chains(run, list(_chains(lacking, written, request.at_once)), request)


def _chains(lacking: dict[tuple[str, ...], list[int]], written: dict[str, Path], at_once: int) -> Iterator[Chain]:
    """Chains of arrays of few tasks. Of ``at_once``, each gets its share."""
    parts: list[tuple[tuple[str, ...], list[int]]] = []
    for names, places in lacking.items():
        size = max(MAX_TASKS, math.ceil(len(places) / at_once) if at_once else 0)
        parts += [(names, places[begin : begin + size]) for begin in range(0, len(places), size)]
    if at_once and len(parts) > at_once:
        print(f"--at-once={at_once}: not all seeds lack the same, so {len(parts)} may run at once", file=sys.stderr)
    share = max(1, at_once // len(parts)) if at_once else 0
    for names, places in parts:
        yield Chain(tuple((name, written[name]) for name in names), tuple(places), share)


def _todo(config: Config, found: list[Stage], request: Request, label: str) -> list[Job]:
    """The jobs of a run that are asked for and not complete; none if nothing is left to do. ``label``: before what is
    said of them."""
    wanted = [job for job in scripts.jobs_of(config, found) if not request.commands or job.command in request.commands]
    complete = [job for job in wanted if _is_complete(job)]
    todo = _with_inputs([job for job in wanted if job not in complete], found)
    if not any(job.stage for job in todo) and (Path(config.run_dir) / "report.json").exists():
        todo = []
    if label and not todo:
        print(f"{label}complete, skipped", file=sys.stderr)
        return []
    for job in complete:
        print(f"{label}{job.name}: complete, skipped", file=sys.stderr)
    return todo


def _submit_chains(run: Path, chains: Sequence[Chain], request: Request) -> None:
    if request.is_dry_run:
        for path, name in dict.fromkeys((path, name) for chain in chains for name, path in chain.scripts):
            print(f"{path}   {name}")
        print("nothing is submitted; each script can be given to sbatch by hand, in this order")
        return
    acceptance.check_scripts(list(dict.fromkeys(path for chain in chains for _, path in chain.scripts)))
    ids = acceptance.check_after(request.after) if request.after else []
    done = jobs.submit(run, chains, ids)
    width = max(len(row.job_id) for row in done)
    seeds = {member.place: member.seed for member in sweep.members(run)}
    for row in done:
        which = f"seeds {','.join(str(seeds[task]) for task in row.tasks)}  " if row.tasks else ""
        print(f"{row.job_id:>{width}}  {row.name:<28} {which}log: {row.log}")
    board = run if seeds else run / "tensorboard"
    print(
        f"""
Each {"task" if seeds else "job"} starts when the one before has succeeded{" for its seed" if seeds else ""}.
  alsace status {shlex.quote(str(run))}     how far it is
  alsace cancel {shlex.quote(str(run))}     cancel what is left
  tensorboard --logdir {shlex.quote(str(board))}     the curves"""
    )


def check_cluster(config: Config, cluster: str, num_nodes: int) -> None:
    """Check a cluster's nodes in a job of its own, wait for the job and print what the job found.

    Raises ``UserError`` if something is wrong with a node.
    """
    profile = load_profile(cluster)
    num_nodes = _num_nodes(profile, num_nodes)
    run = Path(config.run_dir)
    if not sweep.is_sweep(run):
        pipeline.claim_run(Layout(run))
    job = scripts.doctor_job()
    script = scripts.write_scripts(config, profile, [job], num_nodes)[job.name]
    acceptance.check_scripts([script])
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
        cause = cause_of(script.parent, job_id) or (lines[-1] if lines else f"its job ended as {state.lower()}")
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
    sweep.refuse_sweep(run)
    path = Layout(run).config
    is_same = path.exists() and path.read_bytes() == config_text(config).encode()
    in_job = attempt_directory() is not None  # one of those jobs, under a program that knows new settings
    if not (is_only_reading and (is_same or in_job)):
        try:
            jobs.refuse_if_alive(run)
        except queue.NoSlurm as error:
            if not is_only_reading:
                raise
            whole = sweep.sweep_of(run)
            known = Layout(whole[0] if whole else run).slurm  # scripts, too, are a reason to ask
            raise queue.NoSlurm(f"{error}; if the run has no jobs in the queue any more, move {known} away") from None
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
    """Cancel what a run or a sweep has in the queue, and say what that was."""
    if not Layout(run).config.exists() and not sweep.is_sweep(run):
        raise UserError(f"{run}: is not the directory of a run; give the run_dir of one")
    gone = jobs.cancel(run)
    for row in gone:
        print(f"{row.job_id}  {row.name}: cancelled")
    if not gone:
        print(f"{run}: has no jobs in the queue")
