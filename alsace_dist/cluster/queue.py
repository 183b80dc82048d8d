"""Submit a run to Slurm as a chain of jobs, and ask and stop it."""

import errno
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from alsace_dist.cluster.profile import seconds_of
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
# What Slurm's programs read of the environment, and what of it they need to find their controller. The rest is left
# out: what people have set for their own sbatch or squeue would win over what is asked here, and what a session in a
# job says of itself (its memory, its cores) would reach the jobs, whose srun takes it for options.
_OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_")
_OF_CONTROLLER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # what disks without locks say
# With what sbatch --test-only refuses a job that would wait and then start.
_NOT_NOW = ("partition not available", "node not available", "nodes are busy")
_NO_SUCH_NODES = "node configuration is not available"  # too much is asked for, or nodes are down
_AWAY = ("DOWN", "DRAIN", "FAIL", "MAINT", "NOT_RESPONDING", "UNKNOWN", "*")


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
    exit_code: str = ""  # "code:signal" as Slurm writes it, where the controller still knows the job

    @property
    def is_alive(self) -> bool:
        """Whether it may still do something."""
        return self.state in ALIVE


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold the run's lock on being submitted: of several submissions at once one is accepted. The kernel takes the lock
    back when this process ends, however it ends; disks without locks do without.

    Raises ``UserError`` if another process holds it.
    """
    path = Layout(run).slurm / "submit.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: is a symbolic link, not the lock that alsace writes; remove it") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UserError(f"{run}: is being submitted by another process; wait for that one") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
    try:
        yield
    finally:
        os.close(file)


def submit(run: Path, scripts: Sequence[tuple[str, Path]], after: Sequence[str] = ()) -> list[Submitted]:
    """Submit (name, script) pairs, each to start when the job before it has succeeded, the first one when those with
    the ids ``after`` have; all or none.

    Raises ``UserError`` if the run has jobs in the queue, or Slurm refuses one: then those before it are cancelled.
    """
    refuse_if_alive(run)
    done: list[Submitted] = []
    try:
        for name, script in scripts:
            # The first job is held until all are taken: if Slurm refuses one, none has begun.
            before = [done[-1].job_id] if done else after
            options = [] if done else ["--hold"]
            if before:
                options += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
            job_id = sbatch(script, *options)
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


def check_after(text: str) -> list[str]:
    """The ids in ``--after``. Raises ``UserError`` if they are none, or jobs after which nothing would ever start."""
    ids = text.split(",")
    if bad := next((one for one in ids if not re.fullmatch(r"[1-9][0-9]*", one)), None):
        raise UserError(f"--after={text}: {bad!r} is no job's id; give those that sbatch has printed, comma-separated")
    states = job_states(ids)
    for one in ids:
        if one not in states:
            raise UserError(f"--after={one}: Slurm knows no such job; leave the flag out if it has ended")
        if not states[one].is_alive and states[one].state != "COMPLETED":
            ended = states[one].state.lower()
            raise UserError(f"--after={one}: that job has ended ({ended}), nothing would start after it; leave it out")
    return ids


def check_scripts(scripts: Sequence[Path]) -> None:
    """Raises ``UserError`` if Slurm would take one of the scripts and never start it, for sbatch looks less closely at
    a job that is held or waits for another. That nodes are down now is no reason to refuse."""
    text = _call(["scontrol", "show", "partition", "--all", "--oneliner"])
    partitions = [_fields(line) for line in text.splitlines()]
    seen: list[dict[str, str]] = []
    for script in scripts:
        asked = _asked(script)
        request = {name: value for name, value in asked.items() if name not in ("job-name", "output")}
        if request not in seen:
            seen.append(request)
            wanted = asked.get("partition")
            its = [
                row
                for row in partitions
                if (row.get("PartitionName") in wanted.split(",") if wanted else row.get("Default") == "YES")
            ]
            problems = [_beyond(row, asked) for row in its]
            if problems and all(problems):
                raise UserError(f"{problems[0]}; nothing is submitted")
            _test(script, asked, {row["PartitionName"] for row in its})


def _asked(script: Path) -> dict[str, str]:
    """What a script's #SBATCH lines ask for: option without dashes -> value."""
    lines = script.read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --")]
    return {name: "".join(shlex.split(value)) for name, _, value in options}


def _beyond(partition: dict[str, str], asked: dict[str, str]) -> str:
    """In what a job is beyond a partition's limits, in words; empty if in nothing."""
    name, nodes = partition["PartitionName"], int(asked["nodes"])
    if nodes > (available := int(partition.get("TotalNodes", nodes))):
        return f"--nodes={nodes}: partition {name} has {available} nodes; ask for fewer"
    if "qos" in asked:  # which may lift the partition's other limits
        return ""
    if (most := partition.get("MaxNodes", "")).isdigit() and nodes > int(most):
        return f"--nodes={nodes}: partition {name} gives a job at most {most} nodes; ask for fewer"
    longest = partition.get("MaxTime", "")
    if longest[:1].isdigit() and seconds_of(asked["time"]) > seconds_of(longest):
        return f"time: {asked['time']} is beyond the limit of partition {name}, {longest}; ask for less"
    return ""


def _test(script: Path, asked: dict[str, str], partitions: set[str]) -> None:
    try:
        _call(["sbatch", "--test-only", str(script)])
    except NoSlurm:
        raise
    except UserError as error:
        said = str(error).lower()
        is_waiting = any(phrase in said for phrase in _NOT_NOW)
        if not is_waiting and not (_NO_SUCH_NODES in said and _would_fit(asked, partitions)):
            raise UserError(f"{error} ({script.name}); nothing is submitted") from None
        print("some of the nodes are not available now; the jobs wait for them", file=sys.stderr)


def _would_fit(asked: dict[str, str], partitions: set[str]) -> bool:
    """Whether a job would fit on a partition's nodes if none were down, by what their configuration says of them."""
    rows = [_fields(line) for line in _call(["scontrol", "show", "node", "--all", "--oneliner"]).splitlines()]
    cpus = int(asked["cpus-per-task"]) * int(asked["ntasks-per-node"])
    gpus = _num_gpus("gpu:" + asked["gpus-per-node"]) if "gpus-per-node" in asked else _num_gpus(asked.get("gres", ""))
    able = [
        row.get("State", "")
        for row in rows
        if partitions & set(row.get("Partitions", "").split(","))
        and int(row.get("CPUTot", 0)) >= cpus
        and int(row.get("RealMemory", 0)) >= _megabytes(asked.get("mem", "0"))
        and _num_gpus(row.get("Gres", "")) >= gpus
    ]
    return len(able) >= int(asked["nodes"]) and any(word in state for state in able for word in _AWAY)


def _num_gpus(resources: str) -> int:
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^,:(]+)?:(\d+)", resources))


def _megabytes(memory: str) -> float:
    """Of memory as Slurm writes it; 0 if it is not to be read."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory.upper())
    return int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2]] if found else 0


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
    if any(directory.glob("[0-9]*-*.sh")) and shutil.which("squeue"):
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
            found[job_id] = JobState(state, "" if reason == "None" else reason, *_details(full_id, nodes))
    for job_id in sorted(wanted - found.keys()):
        if known := _from_accounting(job_id):
            found[job_id] = JobState(known, "", 0, "")
    return found


def _details(job_id: str, nodes: str) -> tuple[int, str, str]:
    """Restarts, nodes, exit code."""
    try:
        text = _call(["scontrol", "show", "job", "--oneliner", job_id])
    except UserError:  # the controller has forgotten the job in between
        return 0, nodes, ""
    restarts, code = re.search(r" Restarts=(\d+) ", text), re.search(r" ExitCode=(\d+:\d+) ", text)
    return int(restarts[1]) if restarts else 0, nodes, code[1] if code else ""


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
            env={
                name: value
                for name, value in os.environ.items()
                if name in _OF_CONTROLLER or not name.startswith(_OF_SLURM)
            },
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
