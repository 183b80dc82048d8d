"""Records as inputs spell them: rows that nobody has checked yet, the files they stand in, and what is wrong with them.

Reading reports only what hides the rows themselves; stage *prepare* checks what they hold.
"""

import csv
import glob
import gzip
import io
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from alsace_dist.config import InputConfig
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text

BAD_RECORDS = "bad-records.txt"
MAX_PRINTED = 50
OPEN_QUOTE = "open quote"
_WHOLE_FLOAT = re.compile(r"(0|-?[1-9][0-9]*)\.0")


class Place(NamedTuple):
    """Where a record stands: a line of a text file, or a row of a table; both count from 1."""

    file: str
    number: int
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.unit}{self.number}"


class RecordRow(NamedTuple):
    """One language of a group as the input spells it, unchecked. ``key`` is None if the input gives no id."""

    place: Place
    key: str | None
    language: Any
    label: Any
    fields: Any


class BadRecords:
    """Collects everything that is wrong with the inputs, for a person to mend in one go."""

    def __init__(self) -> None:
        self.problems: list[tuple[Place, str, str]] = []
        self.broken_keys: set[str] = set()  # ids of groups with a row that could not be read

    def add(self, place: Place, kind: str, detail: str) -> None:
        """Note a problem: where, of which kind, and what exactly."""
        self.problems.append((place, kind, detail))

    def counts(self) -> dict[str, int]:
        """Kind -> number of bad records (lines, or rows of a table) of that kind."""
        return dict(sorted(Counter(kind for _, kind in {(place, kind) for place, kind, _ in self.problems}).items()))

    def settle(self, path: Path, skip: bool) -> None:
        """Write the whole list to ``path``, print its beginning, and unless ``skip`` raise ``UserError``."""
        if not self.problems:
            path.unlink(missing_ok=True)  # a list that an earlier try has left would mislead
            return
        lines = [f"{place}: {kind}: {detail}" for place, kind, detail in sorted(self.problems, key=lambda row: row[0])]
        write_text(path, "\n".join(lines) + "\n")
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
        can_skip = OPEN_QUOTE not in self.counts()  # nobody knows how many rows of which groups such a quote hides
        if skip and can_skip:
            print(f"bad records left out: {kinds} (listed in {path})", file=sys.stderr)
            return
        print("\n".join(lines[:MAX_PRINTED]), file=sys.stderr)
        if len(lines) > MAX_PRINTED:
            print(f"... and {len(lines) - MAX_PRINTED} more of {len(lines)}", file=sys.stderr)
        remedy = "or use --data.on_bad=skip" if can_skip else f"of which an {OPEN_QUOTE} cannot be skipped"
        raise UserError(f"data.inputs: bad records ({kinds}); mend those listed in {path}, {remedy}")


def key_of(value: Any) -> str | None:
    """A group's id as text; None if it has none. A whole number is the same id as 1 and as pandas' 1.0."""
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value) if math.isfinite(value) else None
    return str(value) or None if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def whole(text: str) -> str:
    """A number as text without a `.0`: in CSV pandas writes 1.0 for 1 in a column of numbers with gaps."""
    return text.removesuffix(".0") if _WHOLE_FLOAT.fullmatch(text) else text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell the text: lone surrogates come from JSON escapes and from bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- files ---------------------------------------------------------------------------------------------------------


def input_files(one: InputConfig) -> list[Path]:
    """The files that an input's path names: itself, or those that match it as a pattern.

    Raises ``UserError`` if there is none.
    """
    path = Path(one.path)
    pattern = one.path.replace("{language}", "*")
    names = [one.path] if path.exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (may be absolute)
    for name in names:
        if Path(name).exists() and not (Path(name).is_file() or Path(name).is_dir()):
            raise UserError(f"data.inputs.path: {name}: is a pipe or a device, no file; correct the path")
    if files := [Path(name) for name in names if Path(name).is_file()]:
        if broken := [str(file) for file in files if not is_unicode(str(file))]:
            raise UserError(f"data.inputs.path: {broken[0]!a}: the file's name is not UTF-8; rename it")
        return files
    if path.is_dir():
        raise UserError(f"data.inputs.path: {one.path}: is a directory; name its files, such as {path / '*.jsonl'}")
    raise UserError(f"data.inputs.path: {one.path}: no such file (relative to {Path.cwd()}); correct the path")


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """Open a plain or .gz file for reading bytes, with a progress bar where a person watches."""
    import rich.progress
    from rich.console import Console

    try:
        console, silent = Console(stderr=True), not sys.stderr.isatty()
        bar = rich.progress.open(path, "rb", description=path.name, console=console, transient=True, disable=silent)
        with bar as raw:
            file = io.BufferedReader(
                cast(io.RawIOBase, raw), 1 << 20
            )  # read in blocks: rich's bar is slow line by line
            yield gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None
