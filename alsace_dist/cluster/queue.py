"""Submit a run to Slurm as a chain of jobs, and ask and stop it."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alsace_dist.errors import UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files.layout import Layout

TIMEOUT_SECONDS = 60
POLL_SECONDS = 2.0
# States in which a job may still do something; squeue(1), JOB STATE CODES.
ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"}
ALIVE |= {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT"}
REMEDY = "is the Slurm controller up? Try again later"
_UNREACHABLE = (
    "contact slurm controller",
    "configuration source",
    "timed out",
    "connection refused",
    "munge",
    "authentication",
)


class NoSlurm(UserError):
    """Slurm's programs are not here, or its controller does not answer."""


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted: which stage, its id, its script and its log."""

    name: str
    job_id: str
    script: str
    log: str


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state, the reason for it, restarts, where it runs or when it starts."""

    state: str
    reason: str
    num_restarts: int
    nodes: str

    @property
    def is_alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


def submit(run: Path, scripts: Sequence[tuple[str, Path]]) -> list[Submitted]:
    """Submit (name, script) pairs, each to start when the job before it has succeeded; all or none.

    Raises ``UserError`` if the run has jobs in the queue, or Slurm refuses one: then those before it are cancelled.
    """
    refuse_if_alive(run)
    done: list[Submitted] = []
    try:
        for name, script in scripts:
            # The first job is held until all are taken: if Slurm refuses one, none has begun.
            after = [f"--dependency=afterok:{done[-1].job_id}", "--kill-on-invalid-dep=yes"] if done else ["--hold"]
            job_id = sbatch(script, *after)
            done.append(Submitted(name, job_id, str(script), str(script.parent / "logs" / f"{script.stem}.log")))
            _write(run, done)  # after every job: what is submitted can be asked for and cancelled
        if done:
            _call(["scontrol", "release", done[0].job_id])
    except BaseException as error:
        ids = [job.job_id for job in reversed(done)]
        try:
            scancel(ids)
        except UserError as second:
            raise UserError(f"{error}; and {', '.join(ids)} cannot be cancelled: {second}") from None
        if done:
            _write(run, [])
        if isinstance(error, UserError):
            raise type(error)(f"{error}; nothing is submitted") from None
        raise
    return done


def check_num_nodes(num_nodes: int, partition: str | None) -> None:
    """Raises ``UserError`` if a partition (None: the cluster's default) has fewer nodes: sbatch would take such a job,
    which then waits for ever."""
    text = _call(["scontrol", "show", "partition", "--all", "--oneliner"])
    rows = [_fields(line) for line in text.splitlines()]
    for row in rows:
        if row.get("PartitionName") == partition or (partition is None and row.get("Default") == "YES"):
            available = int(row.get("TotalNodes", num_nodes))
            if num_nodes > available:
                raise UserError(
                    f"--nodes={num_nodes}: partition {row['PartitionName']} has {available} nodes; ask for fewer"
                )


def _fields(line: str) -> dict[str, str]:
    """A line of scontrol."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def refuse_if_alive(run: Path) -> None:
    """Raises ``UserError`` if the run has jobs in the queue."""
    if alive := alive_jobs(run):
        ids = ", ".join(f"{job.job_id} ({job.name})" for job in alive)
        raise UserError(f"{run}: has jobs in the queue: {ids}; wait for them, or `alsace cancel {run}` first")


def submitted(run: Path) -> list[Submitted]:
    """The jobs of the run's last submission; none if it was never submitted."""
    path = Layout(run).slurm / "jobs.json"
    return [Submitted(**row) for row in artifacts.read_json(path)["jobs"]] if path.exists() else []


def _write(run: Path, jobs: list[Submitted]) -> None:
    artifacts.write_json(Layout(run).slurm / "jobs.json", {"jobs": [asdict(job) for job in jobs]})


def known_jobs(run: Path) -> list[Submitted]:
    """The run's jobs, by their ids: those of its last submission, and whatever else Slurm knows of its scripts, such as
    what was given to sbatch by hand, or taken by an sbatch that did not answer in time.

    Raises ``NoSlurm`` if Slurm does not answer.
    """
    jobs = {job.job_id: job for job in submitted(run)}
    directory = Layout(run).slurm.resolve()
    if directory.exists() and shutil.which("squeue"):
        for line in _call(["squeue", "--me", "--noheader", "--states=all", "--format=%F|%o"]).splitlines():
            job_id, _, command = line.partition("|")
            script = Path(command).resolve()
            if script.parent == directory and job_id not in jobs:
                log = directory / "logs" / f"{script.stem}.log"
                jobs[job_id] = Submitted(script.stem, job_id, str(script), str(log))
    return sorted(jobs.values(), key=lambda job: int(job.job_id))


def alive_jobs(run: Path) -> list[Submitted]:
    """Those of the run's jobs that are in the queue. Raises ``NoSlurm`` if there are jobs and Slurm does not answer."""
    jobs = known_jobs(run)
    states = job_states([job.job_id for job in jobs]) if jobs else {}
    return [job for job in jobs if job.job_id in states and states[job.job_id].is_alive]


def cancel(run: Path) -> list[Submitted]:
    """Cancel what the run has in the queue; the jobs that were."""
    alive = alive_jobs(run)
    if alive:
        scancel([job.job_id for job in reversed(alive)])  # from the last to the first, so that none starts in between
    return alive


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; the job's id."""
    return _call(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def scancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs."""
    if job_ids:
        _call(["scancel", *job_ids])


def wait(job_id: str) -> str:
    """Wait until a job has ended; its last state, or that it is forgotten."""
    while True:
        state = job_states([job_id]).get(job_id)
        if state is None or not state.is_alive:
            return state.state if state else "FORGOTTEN"
        time.sleep(POLL_SECONDS)


def job_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """Job id -> what Slurm knows of it: the queue, the controller's memory of some minutes, accounting if there is any.

    Jobs that nobody knows any more are left out. Raises ``NoSlurm`` if the controller does not answer.
    """
    try:
        text = _call(
            ["squeue", "--noheader", "--all", "--states=all", "--format=%i|%T|%r|%N", f"--jobs={','.join(job_ids)}"]
        )
    except UserError as error:
        if "Invalid job id" not in str(error):  # squeue says so if it knows none of the jobs
            raise
        text = ""
    wanted = set(job_ids)
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        full_id, state, reason, nodes = line.split("|", 3)
        job_id = full_id.partition("_")[0]
        # An array's state is that of a task that runs, else of one that waits, else of any task.
        is_better = job_id not in found or state == "RUNNING" or (state in ALIVE and not found[job_id].is_alive)
        if job_id in wanted and is_better:
            found[job_id] = JobState(state, "" if reason == "None" else reason, _num_restarts(full_id), nodes)
    for job_id in sorted(wanted - found.keys()):
        if known := _from_accounting(job_id):
            found[job_id] = JobState(known, "", 0, "")
    return found


def _num_restarts(job_id: str) -> int:
    try:
        text = _call(["scontrol", "show", "job", "--oneliner", job_id])
    except UserError:  # the controller has forgotten the job in between
        return 0
    found = re.search(r" Restarts=(\d+) ", text)
    return int(found[1]) if found else 0


def _from_accounting(job_id: str) -> str | None:
    try:
        text = _call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"])
    except UserError:  # many clusters have no accounting
        return None
    return text.split()[0] if text.split() else None


def _call(command: list[str]) -> str:
    """The output of one of Slurm's programs. Raises ``NoSlurm`` or ``UserError`` with the program's own words."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            # SBATCH_* variables, which people set for their own sbatch, would win over the scripts' options.
            env={name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")},
        )
    except FileNotFoundError:
        raise NoSlurm(f"{command[0]}: not found; run this where Slurm's programs are, such as a login node") from None
    except subprocess.TimeoutExpired:
        raise NoSlurm(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; {REMEDY}") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if any(phrase in said.lower() for phrase in _UNREACHABLE):
        raise NoSlurm(f"{command[0]}: {said}; {REMEDY}")
    raise UserError(f"{command[0]}: {said}; correct the site profile or what was asked for")
