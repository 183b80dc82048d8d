"""The jobs of a run: submitted as a chain, all or none, one submission at a time; known again, and cancelled."""

import errno
import fcntl
import os
import re
import shlex
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alsace_dist import sweep
from alsace_dist.cluster import queue
from alsace_dist.errors import UserError
from alsace_dist.files.layout import Layout
from alsace_dist.files.manifest import read_json, write_json
from alsace_dist.reading import shorten

CANCEL_SECONDS = 20.0  # how long a cancellation waits for a submission to end
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # what disks without locks say
_TASK = "%a"  # in the name of an array's log stands for the number of the task


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted: which stage, its id, its script and its log; of an array the tasks' numbers."""

    name: str
    job_id: str
    script: str
    log: str
    tasks: tuple[int, ...] = ()

    def of_task(self, task: int) -> "Submitted":
        """One task of the array, as a job by itself."""
        return replace(self, job_id=f"{self.job_id}_{task}", log=self.log.replace(_TASK, str(task)), tasks=())


@dataclass(frozen=True)
class Chain:
    """(Name, script) pairs, each to start when the one before has succeeded. ``tasks``: as arrays of these numbers,
    where each task waits for its own; ``at_once``: how many of an array's tasks may run, 0 for all."""

    scripts: tuple[tuple[str, Path], ...]
    tasks: tuple[int, ...] = ()
    at_once: int = 0


# --- one at a time -------------------------------------------------------------------------------------------------


@contextmanager
def alone(run: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a run, or of its sweep, on being submitted: of several submissions at once one is accepted. The
    kernel takes the lock back when this process ends, however it ends; disks without locks do without.

    Raises ``UserError`` if another process still holds it after some seconds.
    """
    found = sweep.sweep_of(run)
    path = Layout(found[0] if found else run).slurm / "submit.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise UserError(f"{path}: is a symbolic link or a directory, not the lock of alsace; remove it") from None
    try:
        _take(file, path, run, seconds)
        yield
    finally:
        os.close(file)


def _take(file: int, path: Path, run: Path, seconds: float) -> None:
    held = os.read(file, 200).decode("utf-8", "replace") if stat.S_ISREG(os.fstat(file).st_mode) else "?"
    if held and not held.startswith("process "):
        raise UserError(f"{path}: is not the lock that alsace writes; move it")
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                who = shorten(os.pread(file, 200, 0).decode("utf-8", "replace")) or "another process"
                raise UserError(f"{run}: is being submitted by {who}; wait for that one, or stop it") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            break
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


# --- submitting ----------------------------------------------------------------------------------------------------


def submit(run: Path, chains: Sequence[Chain], after: Sequence[str] = ()) -> list[Submitted]:
    """Submit chains of jobs, whose first jobs wait until those with the ids ``after`` have succeeded; all or none.

    Raises ``UserError`` if Slurm refuses one: then those before it are cancelled.
    """
    old = submitted(run)
    before = {job.job_id for job in queue.queued()}
    new = {task for chain in chains for task in chain.tasks}
    # What is known of the tasks that are not submitted now stays known.
    kept = [replace(job, tasks=rest) for job in old if (rest := tuple(sorted(set(job.tasks) - new)))]
    done: list[Submitted] = []
    first: list[str] = []
    try:
        for chain in chains:
            for job in _submitted_one_by_one(chain, after):
                done.append(job)
                _write(run, [*kept, *done])  # after every job: what is submitted can be asked for and cancelled
                if job.script == str(chain.scripts[0][1]):
                    first.append(job.job_id)
        for job_id in first:
            queue.release(job_id)
    except BaseException as error:
        _take_back(run, done, before, old, error)
        raise
    return done


def _submitted_one_by_one(chain: Chain, after: Sequence[str]) -> Iterator[Submitted]:
    """Submit a chain; each job as soon as Slurm has taken it."""
    kind = "aftercorr" if chain.tasks else "afterok"
    limit = f"%{chain.at_once}" if chain.at_once else ""
    array = [f"--array={','.join(map(str, chain.tasks))}{limit}"] if chain.tasks else []
    dependency = f"afterok:{':'.join(after)}" if after else ""
    for number, (name, script) in enumerate(chain.scripts):
        # The first job is held until all are taken: if Slurm refuses one, none has begun.
        options = [*array, *(["--hold"] if number == 0 else [])]
        if dependency:
            options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
        job_id = queue.sbatch(script, *options)
        yield Submitted(name, job_id, str(script), _log_of(script, bool(chain.tasks)), chain.tasks)
        dependency = f"{kind}:{job_id}"


def _take_back(
    run: Path, done: Sequence[Submitted], before: set[str], old: list[Submitted], error: BaseException
) -> None:
    """Cancel what was submitted. Raises ``UserError`` with the reason, if there is one to say."""
    ids = [job.job_id for job in reversed(done)]
    try:
        directory = Layout(run).slurm.resolve()
        # An sbatch that did not answer in time may have submitted a job all the same.
        lost = {job.job_id for job in queue.queued() if job.script.resolve().parent == directory} - before - set(ids)
        queue.scancel([*sorted(lost, key=int, reverse=True), *ids])
    except UserError as second:
        if not ids:
            raise type(second)(f"{error}; whether a job was submitted is not known: {second}") from None
        raise UserError(f"{error}; and {', '.join(ids)} cannot be cancelled: {second}") from None
    if done:
        _write(run, old)
    if isinstance(error, UserError):
        raise type(error)(f"{error}; nothing is submitted") from None


def _log_of(script: Path, is_array: bool) -> str:
    return str(script.parent / "logs" / f"{script.stem}{f'-{_TASK}' if is_array else ''}.log")


# --- what there is -------------------------------------------------------------------------------------------------


def submitted(run: Path) -> list[Submitted]:
    """The jobs of the run's last submission; none if it was never submitted. Raises ``UserError`` if the list of them
    is broken."""
    path = Layout(run).slurm / "jobs.json"
    if not path.exists():
        return []
    remedy = "remove it: jobs that are in the queue are known by their scripts, too"
    value = read_json(path, remedy)
    rows = value.get("jobs") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UserError(f"{path}: holds no list of jobs; {remedy}")
    return [Submitted(**row | {"tasks": tuple(row.get("tasks", ()))}) for row in rows]


def _is_row(row: Any) -> bool:
    texts = ("name", "job_id", "script", "log")
    if not isinstance(row, dict) or not set(texts) <= row.keys() <= {*texts, "tasks"}:
        return False
    tasks = row.get("tasks", [])
    are_tasks = isinstance(tasks, list) and all(type(task) is int and task >= 0 for task in tasks)
    # An id goes to scancel as a word of its command line: what is no number could be an option.
    is_id = isinstance(row["job_id"], str) and re.fullmatch(r"[1-9]\d{0,11}", row["job_id"], re.ASCII)
    return bool(is_id and are_tasks and all(isinstance(row[name], str) for name in texts))


def _write(run: Path, jobs: Sequence[Submitted]) -> None:
    rows = [{name: value for name, value in asdict(job).items() if name != "tasks" or value} for job in jobs]
    write_json(Layout(run).slurm / "jobs.json", {"jobs": rows})


def known_jobs(run: Path) -> list[Submitted]:
    """The jobs of a run, or of a sweep and its runs, by their ids: those of its last submission, and whatever else
    Slurm knows of its scripts, such as what was given to sbatch by hand, or taken by an sbatch that did not answer in
    time. A run that belongs to a sweep has its tasks of the sweep's arrays, too.

    Raises ``NoSlurm`` if Slurm does not answer.
    """
    if sweep.is_sweep(run):
        runs = [run, *(member.run for member in sweep.members(run))]
        listed = _listed(runs)
        return _in_order(job for one in runs for job in _known(one, listed))
    found = sweep.sweep_of(run)
    if found is None:
        return _in_order(_known(run, _listed([run])))
    whole, member = found
    return _of_member(member.run, member.place, *_listed_and_arrays(whole, [member.run]))


def submitted_to_members(run: Path) -> dict[int, list[Submitted]]:
    """Seed -> the jobs of its run, as ``known_to_members``, but of what was submitted only: Slurm is not asked."""
    arrays = submitted(run)
    return {member.seed: _of_member(member.run, member.place, [], arrays) for member in sweep.members(run)}


def known_to_members(run: Path) -> dict[int, list[Submitted]]:
    """Seed -> the jobs of its run, of a sweep: as ``known_jobs`` of each, but Slurm is asked once."""
    members = sweep.members(run)
    listed, arrays = _listed_and_arrays(run, [member.run for member in members])
    return {member.seed: _of_member(member.run, member.place, listed, arrays) for member in members}


def _listed_and_arrays(run: Path, runs: Sequence[Path]) -> tuple[list[queue.Queued], list[Submitted]]:
    listed = _listed([run, *runs])
    return listed, _known(run, listed)


def _of_member(run: Path, place: int, listed: Sequence[queue.Queued], arrays: Sequence[Submitted]) -> list[Submitted]:
    return _in_order([*_known(run, listed), *(job.of_task(place) for job in arrays if place in job.tasks)])


def _listed(runs: Sequence[Path]) -> list[queue.Queued]:
    """What Slurm knows of all jobs; it is not asked if none of these runs has scripts."""
    return queue.queued() if any(any(Layout(run).slurm.glob("[0-9]*-*.sh")) for run in runs) else []


def _in_order(jobs: Iterable[Submitted]) -> list[Submitted]:
    return sorted(jobs, key=lambda job: int(job.job_id.partition("_")[0]))


def _known(run: Path, listed: Sequence[queue.Queued]) -> list[Submitted]:
    jobs = {job.job_id: job for job in submitted(run)}
    directory = Layout(run).slurm.resolve()
    by_hand: dict[str, Submitted] = {}
    for one in listed:
        script = one.script.resolve()
        if script.parent == directory and one.job_id not in jobs:
            tasks = by_hand[one.job_id].tasks if one.job_id in by_hand else ()
            tasks += () if one.task is None else (one.task,)
            log = _log_of(script, sweep.is_sweep(run))
            by_hand[one.job_id] = Submitted(script.stem, one.job_id, str(script), log, tasks)
    return [*jobs.values(), *by_hand.values()]


def alive_jobs(run: Path) -> list[Submitted]:
    """Those of the run's jobs that are in the queue. Raises ``NoSlurm`` if there are jobs and Slurm does not answer."""
    jobs = known_jobs(run)
    states = queue.job_states([job.job_id for job in jobs]) if jobs else {}
    return [job for job in jobs if job.job_id in states and states[job.job_id].is_alive]


def refuse_if_alive(run: Path) -> None:
    """Raises ``UserError`` if the run has jobs in the queue."""
    if alive := alive_jobs(run):
        ids = ", ".join(f"{job.job_id} ({job.name})" for job in alive)
        raise UserError(
            f"{run}: has jobs in the queue: {ids}; wait for them, or `alsace cancel {shlex.quote(str(run))}` first"
        )


def cancel(run: Path) -> list[Submitted]:
    """Cancel what a run or a sweep has in the queue; the jobs that were.

    Raises ``UserError`` if the run is being submitted all the time.
    """
    if not Layout(run).slurm.exists() and sweep.sweep_of(run) is None:
        return []
    with alone(run, CANCEL_SECONDS):
        alive = alive_jobs(run)
        queue.scancel([job.job_id for job in reversed(alive)])  # the last one first, so that none starts in between
    return alive
