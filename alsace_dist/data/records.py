"""Records as inputs spell them: rows that nobody has checked yet, the files they stand in, and what is wrong with them.

Reading reports only what hides the rows themselves; stage *prepare* checks what they hold.
"""

import csv
import fnmatch
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
from alsace_dist.reading import check_file, is_unicode

BAD_RECORDS = "bad-records.txt"
MAX_PRINTED = 50
OPEN_QUOTE, ROW_COUNT, MISSING_ROWS = "open quote", "row count", "missing rows"
# What can be wrong with a record; docs/data.md explains each.
KINDS_OF_BAD = frozenset(
    {"broken JSON", "broken row", OPEN_QUOTE, ROW_COUNT, MISSING_ROWS, "no texts", "missing id", "duplicate id"}
    | {"missing language", "missing field", "non-string text", "empty text", "invalid UTF-8", "unknown label"}
    | {"conflicting labels", "missing label", "missing source language", "equal candidates"}
    | {"conflicting fields", "unknown value", "no candidates", "conflicting candidates", "no gap"}
)
# Nobody knows which rows an open quote hides, nor where a language that is joined by position lacks one.
NOT_SKIPPED = {OPEN_QUOTE: f"an {OPEN_QUOTE}", ROW_COUNT: f"a different {ROW_COUNT}"}
BLANK = "a blank line, and rows are joined by their position; fill it in, or mark it with a text of data.missing"
_WHOLE_FLOAT = re.compile(r"(0|-?[1-9][0-9]*)\.0")


class Place(NamedTuple):
    """Where a record stands: a line of a text file, or a row of a table; both count from 1."""

    file: str
    number: int
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.unit}{self.number}"


class RecordRow(NamedTuple):
    """One language of a group as the input spells it, unchecked. ``key`` is None if the input gives no id.

    ``unit``: what the group belongs to, as this language says it. ``is_whole``: whether every row of the group could be
    read; a language of one that is not may be missing for no good reason. ``is_changed``: whether a field that all
    languages share was corrected here. ``candidates``: the group's own, as the input spells them; ``is_apart``: whether
    they correspond to no other language's; ``category``: as in ``ParallelGroup``.
    """

    place: Place
    key: str | None
    language: Any
    label: Any
    fields: Any
    unit: str | None = None
    is_whole: bool = True
    is_changed: bool = False
    candidates: Any = None
    is_apart: bool = False
    category: str = ""


class BadRecords:
    """Collects everything that is wrong with the inputs, for a person to mend in one go."""

    def __init__(self) -> None:
        self.problems: list[tuple[Place, str, str]] = []
        self.broken_keys: set[str] = set()  # ids of the current input's groups with a row that could not be read

    def add(self, place: Place, kind: str, detail: str) -> None:
        """Note a problem: where, of which kind, and what exactly."""
        assert kind in KINDS_OF_BAD, kind
        # A terminal would obey what a text may hold.
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in detail)
        self.problems.append((place, kind, shown))

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
        fatal = [name for kind, name in NOT_SKIPPED.items() if kind in self.counts()]
        if skip and not fatal:
            print(f"bad records left out: {kinds} (listed in {path})", file=sys.stderr)
            return
        print("\n".join(lines[:MAX_PRINTED]), file=sys.stderr)
        if len(lines) > MAX_PRINTED:
            print(f"... and {len(lines) - MAX_PRINTED} more of {len(lines)}", file=sys.stderr)
        remedy = f"of which {fatal[0]} cannot be skipped" if fatal else "or use --data.on_bad=skip"
        if "duplicate id" in self.counts():  # skipping would lose what is no mistake
            remedy += "; where ids start anew in each input, give each a data.inputs.name"
        raise UserError(f"data.inputs: bad records ({kinds}); mend those listed in {path}, {remedy}")


def key_of(value: Any) -> str | None:
    """A group's id as text; None if it has none. A whole number is the same id as 1 and as pandas' 1.0.

    Blanks around an id are no part of it: with them, a row would not join its translations.
    """
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value) if math.isfinite(value) else None
    return str(value).strip() or None if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def whole(text: str) -> str:
    """A number as text without a `.0`: in CSV pandas writes 1.0 for 1 in a column of numbers with gaps."""
    return text.removesuffix(".0") if _WHOLE_FLOAT.fullmatch(text) else text


# --- files ---------------------------------------------------------------------------------------------------------


def input_files(one: InputConfig) -> list[Path]:
    """The files that an input's path names: itself, or those that match it as a pattern; of a path with ``{language}``
    only those in the input's own ``languages``.

    Raises ``UserError`` if there is none.
    """
    located = one.located()
    path = Path(located)
    pattern = located.replace("{language}", "*")
    names = [located] if path.exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (may be absolute)
    for name in names:
        language = language_of_file(located, Path(name))
        if language and one.languages is not None and language not in one.languages:
            continue  # nobody misses it
        if "{language}" in located or not Path(name).is_dir():  # a folder has no language: a pattern passes over it
            check_file(name, "data.inputs.path")
    if files := [Path(name) for name in names if Path(name).is_file()]:
        if broken := [str(file) for file in files if not is_unicode(str(file))]:
            raise UserError(f"data.inputs.path: {broken[0]!a}: the file's name is not UTF-8; rename it")
        return _in_wanted_languages(files, one)
    if path.is_dir():
        raise UserError(f"data.inputs.path: {one.path}: is a directory; name its files, such as {path / '*.jsonl'}")
    hint = "; a [ begins a choice of letters, one in a name is written [[]" if "[" in one.path else ""
    raise UserError(f"data.inputs.path: {one.path}: no such file (relative to {Path.cwd()}); correct the path{hint}")


def _in_wanted_languages(files: list[Path], one: InputConfig) -> list[Path]:
    if "{language}" not in one.path:
        return files
    found = {file: language_of_file(one.located(), file) for file in files}
    if known := [file for file in files if found[file] and (one.languages is None or found[file] in one.languages)]:
        return known
    names = ", ".join(sorted({str(language) for language in found.values() if language})) or "no language"
    wanted = ", ".join(one.languages or ()) or "one"
    raise UserError(
        f"data.inputs.path: {one.path}: its files are in {names}, not in {wanted}; correct path or languages"
    )


def language_of_file(pattern: str, path: Path) -> str | None:
    """What stands in a file's name where the pattern says ``{language}``; None if it does not."""
    if "{language}" not in pattern:
        return None
    first, *others = (fnmatch.translate(part)[4:-3] for part in str(Path(pattern)).split("{language}"))
    match = re.fullmatch(first + "(?P<language>[^/]+?)" + "(?P=language)".join(others), str(path))
    return match["language"] if match else None


def _check_packed(path: Path, beginning: bytes) -> None:
    """Raises ``UserError`` for files that hold texts in a packed form which their names do not tell."""
    if beginning.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: is compressed by gzip; give it a name that ends in .gz")
    if beginning.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: is a zip archive, or a spreadsheet; unpack it, or save it as CSV in UTF-8")


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
            is_gzip = path.suffix.lower() == ".gz"
            if not is_gzip:
                _check_packed(path, file.peek(4))
            yield gzip.GzipFile(fileobj=file) if is_gzip else file
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None
