"""How a process fails: which errors are for people, what the launcher and the job script are left, exit codes."""

import errno
import json
import os
import re
import time
import traceback
from contextlib import suppress
from pathlib import Path

from alsace_dist.errors import (
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    STOPPED,
    PeerFailed,
    RankFailed,
    Stopped,
    UserError,
)
from alsace_dist.files.manifest import write_text
from alsace_dist.ranks import job

ERROR_DIR = "ALSACE_ERROR_DIR"  # where the ranks of this machine leave their errors and process ids for the launcher

# Other errors of the operating system, such as a network disk that does not answer or no memory for a process, may
# pass by themselves, so that a job is requeued.
_FOR_PEOPLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR}
_FOR_PEOPLE |= {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EFBIG}

# How gloo, NCCL and the store say that a rank at the other end is gone.
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "remote process",
    "remote worker",
)


def error_directory() -> Path | None:
    """Where a rank leaves its error and process id for the launcher; None without a launcher.

    The launcher makes it: a variable that names no directory is what an earlier start has left in the environment.
    """
    text = os.environ.get(ERROR_DIR, "")
    return Path(text) if text and Path(text).is_dir() else None


def in_group() -> bool:
    """Whether this process is a rank that torchrun (or srun with torchrun's variables) started.

    RANK and WORLD_SIZE alone do not make a group: interactive pods and earlier jobs leave them behind.
    """
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def readable(error: BaseException) -> BaseException:
    """The error to show: what the system refuses (full disk, no permission, no memory) becomes one line.

    Any other error is returned as it is; unless ``is_plain``, it is a defect of this program.
    """
    if isinstance(error, KeyboardInterrupt):
        return Stopped(STOPPED)
    if is_out_of_memory(error):
        return RankFailed(out_of_memory(error))
    if isinstance(error, OSError) and error.errno in _FOR_PEOPLE and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{error.strerror}; free space or correct the path, then run the same command again")
    return error


def exit_code(error: BaseException) -> int:
    """Exit code of a process that ends with this error."""
    return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_USER_ERROR if isinstance(error, UserError) else 1


def is_secondary(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; the error of that rank is the one to read."""
    if isinstance(error, PeerFailed):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PEER_GONE)


def is_plain(error: BaseException) -> bool:
    """Whether its message alone tells a person enough."""
    return isinstance(error, UserError | Stopped | RankFailed) or is_secondary(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left: Python's error, PyTorch's for GPUs, or that for CPUs."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's class, compared by name to spare the import
        or "can't allocate memory" in str(error)
    )


def asked_for(error: BaseException) -> str:
    """How much an ``is_out_of_memory`` error says that it asked for, in parentheses; empty if it does not."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return f" (tried to allocate {asked[1]})" if asked else ""


def out_of_memory(error: BaseException) -> str:
    """What to read of an ``is_out_of_memory`` error: which rank, how much it asked for, and what takes less."""
    what = f"out of memory{asked_for(error)}"
    if not in_group():
        return f"{what}; give this machine or job more, then run the same command again"
    return (
        f"rank {os.environ['RANK']}: {what}; lower tokens_per_micro_batch of the stage's section "
        "(for scoring score.tokens_per_batch), set engine.gradient_checkpointing, raise engine.zero_stage or take more "
        "ranks; `alsace plan` estimates the model's share; the same command goes on from the last checkpoint"
    )


def _message(error: BaseException) -> str:
    return str(error) if is_plain(error) else f"{type(error).__name__}: {error}"


def record_failure(error: BaseException) -> None:
    """Leave this rank's error for the launcher, which prints the first one last."""
    if directory := error_directory():
        row = {
            "seconds": time.time(),
            "message": _message(error),
            "is_user_error": isinstance(error, UserError),
            "is_defect": not is_plain(error),
            "is_secondary": is_secondary(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(row))


def record_cause(error: BaseException) -> None:
    """In a job: leave why this task ended, for the job script, which prints the first cause of all tasks last.

    The name says how it compares: ``cause-<0: own, 1: another rank failed>-<nanoseconds>-<exit code>-<who>``.
    """
    if directory := job.attempt_directory():
        who = f"rank{os.environ['RANK']}" if in_group() else f"node{os.environ.get(job.NODE_RANK, 0)}"
        message = _message(error)
        if is_secondary(error):
            message = f"a rank died without a word (killed? out of memory?), its node's lines above say how; {message}"
        name = f"cause-{int(is_secondary(error))}-{time.time_ns()}-{exit_code(error)}-{who}"
        with suppress(OSError):  # the error is printed whether or not the disk is full
            write_text(directory / name, " ".join(message.split()) + "\n")
