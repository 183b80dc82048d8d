"""The files that are finished in a directory that is not: their hashes, so that a later start takes up only what is as
it was written.

Each rank adds lines to a file of its own. When the directory is complete its manifest says the same, and they go.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from alsace_dist.config import Section
from alsace_dist.files import manifest
from alsace_dist.files.lines import append_line, readable_lines
from alsace_dist.files.manifest import FileEntry

NAMES = re.compile(r"written-\d{5,}\.jsonl")


class _Line(Section):
    name: str
    bytes: int
    sha256: str


class Written:
    """What has been written into a directory. ``entries``: by name, what this rank has written or found whole."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._file = _file_of(directory, rank)
        self.entries: dict[str, FileEntry] = {}
        lines = (line for path in _files(directory) for line in readable_lines(path, _Line))
        self._earlier = {(line.name, line.bytes, line.sha256) for line in lines}

    def add(self, path: Path) -> None:
        """List a file that this rank has just written."""
        self.entries[path.name] = entry = manifest.file_entry(path)
        append_line(self._file, {"name": path.name, **entry})

    def is_whole(self, path: Path) -> bool:
        """Whether a file is as this rank, or any rank in an earlier start, has written it."""
        if not path.is_file():  # nor a pipe, which would never end
            return False
        entry = manifest.file_entry(path)
        if entry != self.entries.get(path.name) and (path.name, entry["bytes"], entry["sha256"]) not in self._earlier:
            return False
        self.entries[path.name] = entry
        return True


def merged(entries: Iterable[Mapping[str, FileEntry]]) -> dict[str, FileEntry]:
    """What several ranks have, as one."""
    return {name: entry for one in entries for name, entry in one.items()}


def take_over(directory: Path, files: Mapping[str, FileEntry]) -> None:
    """List what the manifest of a directory said that is no longer complete."""
    for name, entry in files.items():
        append_line(_file_of(directory, 0), {"name": name, **entry})


def drop(directory: Path) -> None:
    """Delete the lists of a directory that is complete."""
    for path in _files(directory):
        path.unlink(missing_ok=True)


def _file_of(directory: Path, rank: int) -> Path:
    return directory / f"written-{rank:05d}.jsonl"


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("written-*")) if NAMES.fullmatch(path.name)]
