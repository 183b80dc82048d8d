"""``progress.json``: how far a stage is, in the directory that it is writing; for ``alsace status``.

It is there while the stage runs and stays when it is killed. It says nothing of whether the stage is complete: that is
what the manifest is for.
"""

from contextlib import suppress
from pathlib import Path

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import read_json, write_json

PROGRESS = "progress.json"


class Progress(Section):
    """Units (steps or shards) that are done, all of them, and the seconds that the rest will take if that is known."""

    done: int
    total: int
    eta_seconds: float | None


def write_progress(directory: Path, progress: Progress) -> None:
    """Leave it for others to read. A full disk is told by what the disk is needed for, not by this."""
    with suppress(OSError):
        write_json(directory / PROGRESS, progress.model_dump(mode="json"))


def clear_progress(directory: Path) -> None:
    """The stage is done with this directory."""
    (directory / PROGRESS).unlink(missing_ok=True)


def read_progress(directory: Path) -> Progress | None:
    """What a running or killed stage has left; None if there is nothing that can be read."""
    path = directory / PROGRESS
    if not path.exists():
        return None
    try:
        return validate(Progress, read_json(path), f"{path}: ")
    except (UserError, OSError):
        return None
