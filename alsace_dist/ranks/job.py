"""What a job script (cluster/stage.sh.j2, cluster/slurm_task.sh) says to its tasks, and what they leave for it."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text
from alsace_dist.reading import shorten

ATTEMPT_DIR = "ALSACE_ATTEMPT_DIR"  # where tasks leave their output and the cause of a failure
LEAD_SECONDS = "ALSACE_LEAD_SECONDS"  # how long before the end of the job its stop signal comes
GPUS_PER_NODE = "ALSACE_GPUS_PER_NODE"  # what the job has asked for
NUM_NODES, NODE_RANK, RANKS_PER_NODE = "ALSACE_NUM_NODES", "ALSACE_NODE_RANK", "ALSACE_RANKS_PER_NODE"


def attempt_directory() -> Path | None:
    """Directory in which this start of a job leaves its logs and causes; None outside a job.

    The job script makes it: a variable that names no directory is what an earlier job has left in the environment.
    """
    text = os.environ.get(ATTEMPT_DIR, "")
    return Path(text) if text and Path(text).is_dir() else None


def number(name: str, default: int = 0) -> int:
    """A whole number of the environment. Raises ``UserError`` if the variable holds something else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(
            f"{name}={shorten(text)!r} in the environment is no number; torchrun or a job sets it, unset it outside one"
        )
    return int(text)


def num_nodes() -> int:
    """Nodes of this job; outside a job one, whatever an earlier job has left in the environment.

    Raises ``UserError`` if this should be a job and its directory is not there: each node would work by itself.
    """
    if os.environ.get(ATTEMPT_DIR) and not attempt_directory():
        text = shorten(os.environ[ATTEMPT_DIR])
        raise UserError(f"{ATTEMPT_DIR}={text} in the environment is no directory; outside a job unset it")
    return number(NUM_NODES, 1) if attempt_directory() else 1


def lead_seconds() -> float:
    """Seconds between the job's stop signal and its end; infinite outside a job."""
    return number(LEAD_SECONDS) if LEAD_SECONDS in os.environ else float("inf")


def note_position(text: str) -> None:
    """Leave for the job script where the next start would go on: it stops a job that fails again and again there."""
    if directory := attempt_directory():
        with suppress(OSError):  # outputs that need the disk will say that it is full
            write_text(directory / "position", text + "\n")


def log_apart(rank: int) -> None:
    """In a job, the output of rank 0 alone goes into the job's log; every other rank has a file of its own."""
    directory = attempt_directory()
    if directory and rank:
        sys.stdout.flush()
        sys.stderr.flush()
        with (directory / f"rank{rank:05d}.log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
