"""``warnings.jsonl``: what people were warned of while a run was made; for its report and for ``alsace status``.

One object a line: when (UTC), by which stage, and the text. Lines are only added.
"""

import time
from contextlib import suppress
from pathlib import Path

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import append_line
from alsace_dist.reading import parse_json, read_text

WARNINGS = "warnings.jsonl"


class Warned(Section):
    """One warning."""

    time: str
    stage: str
    text: str


def add_warning(run: Path, stage: str, text: str) -> None:
    """Keep a warning. A disk that is full, or gone, is told by what the disk is needed for, not by this."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(OSError):
        append_line(run / WARNINGS, Warned(time=now, stage=stage, text=text).model_dump())


def read_warnings(run: Path) -> list[tuple[Warned, int]]:
    """The warnings of a run, each once, with how often it was said; in the order in which they were said last. Lines
    that nobody can read, such as one that a full disk has cut off, are left out."""
    path, found = run / WARNINGS, dict[tuple[str, str], tuple[Warned, int]]()
    with suppress(UserError, OSError):
        for line in read_text(path, "remove it").split("\n") if path.exists() else ():
            with suppress(UserError):
                one = validate(Warned, parse_json(line, f"{path}: ", "remove it"), f"{path}: ")
                _, count = found.pop((one.stage, one.text), (one, 0))
                found[one.stage, one.text] = one, count + 1
    return list(found.values())
