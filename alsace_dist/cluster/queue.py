"""Slurm's programs: sbatch, squeue, scontrol, scancel, sacct. What a run has in the queue, jobs.py knows."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alsace_dist.errors import UserError
from alsace_dist.reading import shorten

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
# What Slurm's programs read of the environment, and what of it they need to find their controller. The rest is left
# out: what people have set for their own sbatch or squeue would win over what is asked here, and what a session in a
# job says of itself (its memory, its cores) would reach the jobs, whose srun takes it for options.
_OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_")
_OF_CONTROLLER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"}


class NoSlurm(UserError):
    """Slurm's programs are not here, or its controller does not answer."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state, the reason for it, restarts, where it runs or when it starts."""

    state: str
    reason: str
    num_restarts: int
    nodes: str
    exit_code: str = ""  # "code:signal" as Slurm writes it, where the controller still knows the job

    @property
    def is_alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


@dataclass(frozen=True)
class Queued:
    """A job that the controller knows. ``task``: its number in an array; None outside of one."""

    job_id: str
    task: int | None
    script: Path


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; the job's id."""
    said = call(["sbatch", "--parsable", *options, str(script)])
    ids = re.findall(r"^(\d+)(?:;.*)?$", said, re.ASCII | re.MULTILINE)  # a site's wrapper may print more
    if len(ids) != 1:
        raise UserError(f"sbatch: answered {shorten(said)!r}, which is no job's id; is it a site's own program?")
    return str(ids[0])


def scancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs."""
    if job_ids:
        call(["scancel", *job_ids])


def release(job_id: str) -> None:
    """Let a job start that was submitted with ``--hold``."""
    call(["scontrol", "release", job_id])


def queued() -> list[Queued]:
    """All of the user's jobs that the controller knows, an array's tasks one by one; none where no Slurm is."""
    if not shutil.which("squeue"):
        return []
    found = []
    text = call(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%F|%K|%o"])
    for line in text.splitlines():
        job_id, _, rest = line.partition("|")
        task, _, script = rest.partition("|")
        if job_id.isdecimal():
            found.append(Queued(job_id, int(task) if task.isdecimal() else None, Path(script)))
    return found


def wait(job_id: str) -> str:
    """Wait until a job has ended; its last state, or that it is forgotten."""
    while True:
        state = job_states([job_id]).get(job_id)
        if state is None or not state.is_alive:
            return state.state if state else "FORGOTTEN"
        time.sleep(POLL_SECONDS)


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Id of a job, or of an array's task (``12_3``) -> what Slurm knows of it: the queue, the controller's memory of
    some minutes, accounting if there is any. An array's state is that of a task that runs, else of one that waits,
    else of any task.

    Jobs that nobody knows any more are left out. Raises ``NoSlurm`` if the controller does not answer.
    """
    wanted = set(job_ids)
    jobs = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}, key=int))
    command = ["squeue", "--noheader", "--all", "--array", "--states=all", "--format=%i|%T|%r|%N", f"--jobs={jobs}"]
    try:
        text = call(command) if jobs else ""
    except UserError as error:
        if "Invalid job id" not in str(error):  # squeue says so if it knows none of the jobs
            raise
        text = ""
    best: dict[str, tuple[str, str, str, str]] = {}
    for row in (line.split("|", 3) for line in text.splitlines()):
        if len(row) == 4:
            full_id, state, reason, nodes = row
            for job_id in {full_id, full_id.partition("_")[0]} & wanted:
                is_alive = state in ALIVE and (job_id not in best or best[job_id][1] not in ALIVE)
                if job_id not in best or state == "RUNNING" or is_alive:
                    best[job_id] = (full_id, state, "" if reason == "None" else reason, nodes)
    details = _details({job_id.partition("_")[0] for job_id in best})
    found = {}
    for job_id, (full_id, state, reason, nodes) in best.items():
        num_restarts, exit_code = details.get(full_id, (0, ""))
        found[job_id] = JobState(state, reason, num_restarts, nodes, exit_code)
    for job_id in sorted(wanted - found.keys()):
        if known := _from_accounting(job_id):
            found[job_id] = JobState(known, "", 0, "")
    return found


def _details(job_ids: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Id of a job or of a task -> restarts, exit code."""
    found = {}
    for job_id in job_ids:
        try:
            text = call(["scontrol", "show", "job", "--oneliner", job_id])
        except UserError:  # the controller has forgotten the job in between
            continue
        for line in text.splitlines():
            task = re.search(r" ArrayTaskId=(\d+) ", line)
            restarts, code = re.search(r" Restarts=(\d+) ", line), re.search(r" ExitCode=(\d+:\d+) ", line)
            name = f"{job_id}_{task[1]}" if task else job_id
            found[name] = (int(restarts[1]) if restarts else 0, code[1] if code else "")
    return found


def _from_accounting(job_id: str) -> str | None:
    try:
        text = call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"])
    except UserError:  # many clusters have no accounting
        return None
    return text.split()[0] if text.split() else None


def call(command: list[str]) -> str:
    """The output of one of Slurm's programs. Raises ``NoSlurm`` or ``UserError`` with the program's own words."""
    if (settings := os.environ.get("SLURM_CONF")) and not Path(settings).exists():  # they would wait a minute for it
        raise NoSlurm(f"SLURM_CONF={settings}: no such file; correct the variable, or unset it")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env={
                name: value
                for name, value in os.environ.items()
                if name in _OF_CONTROLLER or not name.startswith(_OF_SLURM)
            },
        )
    except FileNotFoundError:
        raise NoSlurm(f"{command[0]}: not found; run this where Slurm's programs are, such as a login node") from None
    except OSError as error:
        raise NoSlurm(f"{command[0]}: cannot be started ({error.strerror}); is Slurm installed rightly?") from None
    except subprocess.TimeoutExpired:
        raise NoSlurm(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; {REMEDY}") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if any(phrase in said.lower() for phrase in _UNREACHABLE):
        raise NoSlurm(f"{command[0]}: {said}; {REMEDY}")
    raise UserError(f"{command[0]}: {said}; correct the site profile or what was asked for")
