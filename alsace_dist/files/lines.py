"""Files of one JSON object a line, to which lines are only added."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.reading import MAX_TEXT_BYTES, check_regular, parse_json

S = TypeVar("S", bound=Section)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add an object; a line that a full disk has cut off is ended first. Raises ``OSError``.

    In ASCII, so that a line that is cut off is cut between two characters.
    """
    whole = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))  # of names that are no UTF-8
    line = json.dumps(whole).encode("ascii") + b"\n"
    with path.open("ab+") as file:  # what is written goes to the end, whatever was read
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        file.write(line if size == 0 or file.read(1) == b"\n" else b"\n" + line)


def readable_lines(path: Path, kind: type[S]) -> Iterator[S]:
    """The objects of a file, in their order. Lines that nobody can read are left out, and so is a file that is none, is
    too large, or is not there."""
    with suppress(UserError, OSError):
        check_regular(path, "remove it", MAX_TEXT_BYTES)
        for line in path.read_bytes().split(b"\n"):
            with suppress(UserError):
                yield validate(kind, parse_json(line, f"{path}: ", "remove it"), f"{path}: ")
