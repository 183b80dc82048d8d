"""Reading files that somebody else may have written: the one place that bounds what is read and names what is wrong.

Only regular files are opened (a FIFO or a device never ends), their size is looked at first, and nesting and numbers
are bounded, so that no input takes all memory or ends in a traceback. Nothing here executes what it reads.
"""

import json
import stat
from pathlib import Path
from typing import Any

from alsace_dist.errors import NotReady, UserError

MAX_TEXT_BYTES = 256 << 20  # JSON of the largest dataset's manifest (10^5 shards) is a tenth of it
MAX_DEPTH = 64
MAX_SHOWN = 120  # characters of a foreign text that an error quotes


def shorten(text: object, most: int = MAX_SHOWN) -> str:
    """A foreign text on one line, cut where it is long, so that an error stays readable."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def check_regular(path: Path, remedy: str, most_bytes: int | None = None) -> int:
    """The size of a regular file in bytes.

    Raises ``FileNotFoundError`` if there is none, ``UserError`` if it is no regular file or larger than ``most_bytes``.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file (a pipe or a device)"
        raise UserError(f"{path}: is {kind}; {remedy}")
    if most_bytes is not None and found.st_size > most_bytes:
        size, most = found.st_size / 2**20, most_bytes / 2**20
        raise UserError(f"{path}: {size:,.0f} MiB where at most {most:,.0f} are read; {remedy}")
    return found.st_size


def read_text(path: Path, remedy: str, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 text.

    Raises ``FileNotFoundError`` and ``PermissionError``, whose own words name path and reason; ``UserError`` if it is
    no regular file, too large, or no UTF-8.
    """
    check_regular(path, remedy, most_bytes)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text (byte {error.start + 1}: {error.reason}); {remedy}") from None


def read_json(path: Path, remedy: str) -> Any:
    """JSON. Raises ``NotReady`` if the file is missing, ``UserError`` with this ``remedy`` if it is broken."""
    try:
        text = read_text(path, remedy)
    except FileNotFoundError:
        raise NotReady(f"{path}: no such file; run the stage that writes it first") from None
    return parse_json(text, f"{path}: ", remedy)


def parse_json(text: str | bytes, prefix: str, remedy: str) -> Any:
    """JSON of bounded depth. Raises ``UserError``: ``prefix``, what is wrong, ``remedy``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError, too
        reason = "nested too deeply" if isinstance(error, RecursionError) else shorten(error)
        raise UserError(f"{prefix}not readable as JSON ({reason}); {remedy}") from None
    if depth_of(value) > MAX_DEPTH:
        raise UserError(f"{prefix}nested more than {MAX_DEPTH} deep; {remedy}")
    return value


def depth_of(value: Any) -> int:
    """Levels of mappings and lists within each other; counted without recursion."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            return depth
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return depth
