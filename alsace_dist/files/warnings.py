"""``warnings.jsonl``: what people were warned of while a run was made; for its report and for ``alsace status``.

One object a line: when (UTC), by which stage, and the text. Lines are only added.
"""

import time
from contextlib import suppress
from pathlib import Path

from alsace_dist.config import Section
from alsace_dist.files.lines import append_line, readable_lines

WARNINGS = "warnings.jsonl"


class Warned(Section):
    """One warning."""

    time: str
    stage: str
    text: str


def add_warning(run: Path, stage: str, text: str) -> None:
    """Keep a warning; one that begins with its stage's command does not say it twice. A disk that is full, or gone, is
    told by what the disk is needed for, not by this."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = text.removeprefix(f"{stage.split(' ')[0]}: ")
    with suppress(OSError):
        append_line(run / WARNINGS, Warned(time=now, stage=stage, text=text).model_dump())


def read_warnings(run: Path) -> list[tuple[Warned, int]]:
    """The warnings of a run, each once, with how often it was said; in the order in which they were said last. Lines
    that nobody can read, such as one that a full disk has cut off, are left out."""
    found = dict[tuple[str, str], tuple[Warned, int]]()
    for one in readable_lines(run / WARNINGS, Warned):
        _, count = found.pop((one.stage, one.text), (one, 0))
        found[one.stage, one.text] = one, count + 1
    return list(found.values())
