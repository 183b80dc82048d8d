"""Atomic files, manifests and fingerprints: how the stages know that an output is whole and up to date.

A stage's output directory is complete if and only if it holds a ``manifest.json``; that file is written last.
While the stage runs, ``started.json`` holds its fingerprint, so that partial work is never continued under another
configuration.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from alsace_dist import __version__, reading
from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import NotReady, UserError
from alsace_dist.reading import shorten

MANIFEST = "manifest.json"
STARTED = "started.json"
HANG = "hang"  # directory in which the watchdog of a stage that hangs leaves what it sees
FORMAT_VERSION = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it over ``path``, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:  # would name the temporary file, which nobody knows
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private, but outputs are shared within a project
        temporary.replace(path)
        sync_file(path.parent)
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename in (None, name):  # a write does not say into which file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file or a directory to stable storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically. (``shutil.copyfile`` says of a full disk that the source has no room.)"""
    with atomic_path(path) as temporary, source.open("rb") as original, temporary.open("wb") as copy:
        shutil.copyfileobj(original, copy)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


RERUN = "delete its directory and run the stage again"


def read_json(path: Path, remedy: str = RERUN) -> Any:
    """Read JSON. Raises ``NotReady`` if the file is missing, ``UserError`` with this ``remedy`` if it is broken."""
    return reading.read_json(path, remedy)


def digest_bytes(data: bytes) -> str:
    """sha256 of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form, hexadecimal."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode())


def _is_within(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"{shorten(ascii(name))} does not name a file of the directory")
    return name


@with_config(ConfigDict(extra="forbid"))
class FileEntry(TypedDict):
    """How a manifest lists a file."""

    bytes: Annotated[int, Field(strict=True, ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Section):
    """What a complete output directory says of itself.

    ``fingerprint``: everything the output depends on. ``files``: by relative path. ``details``: facts for readers of
    the directory (counts, languages, ...).
    """

    kind: str
    fingerprint: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_is_within)], FileEntry]
    details: dict[str, Any]
    code_version: str
    format_version: int

    @property
    def digest(self) -> str:
        """Identity of the content: what a later stage puts into its own fingerprint."""
        return digest_json([self.kind, self.files, self.details])


def write_manifest(
    directory: Path,
    kind: str,
    fingerprint: dict[str, Any],
    files: Iterable[Path],
    details: dict[str, Any] | None = None,
    entries: dict[str, FileEntry] | None = None,
) -> Manifest:
    """Hash ``files`` (below ``directory``), then write the manifest that makes the directory complete.

    ``entries``: hashes that are known already (of files that other ranks wrote), by relative path.
    """
    entries = dict(entries or {})
    for file in files:
        entries[file.relative_to(directory).as_posix()] = file_entry(file)
    entries = dict(sorted(entries.items()))
    # Convert through JSON and back, so that the manifest in memory equals the one that a later stage reads.
    manifest = Manifest(
        kind=kind,
        fingerprint=json.loads(json.dumps(fingerprint)),
        files=entries,
        details=json.loads(json.dumps(details or {})),
        code_version=__version__,
        format_version=FORMAT_VERSION,
    )
    write_json(directory / MANIFEST, manifest.model_dump())
    (directory / STARTED).unlink(missing_ok=True)
    return manifest


def file_entry(path: Path) -> FileEntry:
    """The entry of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest_file(path)}


def load_manifest(directory: Path, kind: str) -> Manifest:
    """Read a directory's manifest.

    Raises ``NotReady`` if it is missing (the stage has not finished), ``UserError`` if it is broken or of another kind.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise NotReady(f"{directory}: not complete ({MANIFEST} is missing); run the stage that writes it first")
    return parse_manifest(read_json(path), kind, str(path), f"delete {directory} and run its stage again")


def parse_manifest(value: Any, kind: str, place: str, remedy: str) -> Manifest:
    """A manifest from JSON. Raises ``UserError`` with this place and remedy if it is of another kind or form."""
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{place}: not of manifest format {FORMAT_VERSION}; {remedy}")
    if value.get("kind") != kind:
        found = shorten(repr(value.get("kind")))
        raise UserError(f"{place}: holds {found} where {kind!r} is needed; name the right directory")
    return validate(Manifest, value, f"{place}: ", remedy)


def verify_files(directory: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Check that every file of the manifest is there with its size and (``hashes``) its sha256.

    Raises ``UserError`` naming the first file that is not.
    """
    for name in manifest.files:
        verify_file(directory, manifest, name, hashes)


def verify_file(directory: Path, manifest: Manifest, name: str, hashes: bool = True) -> None:
    """Check one file of a manifest. Raises ``UserError`` if it is missing or not as listed."""
    entry, path = manifest.files[name], directory / name
    remedy = f"restore it, or delete {directory} and run its stage again"
    try:
        size = reading.check_regular(path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though {MANIFEST} lists it; {remedy}") from None
    if size != entry["bytes"]:
        raise UserError(f"{path}: {size} bytes where {MANIFEST} says {entry['bytes']}; {remedy}")
    if hashes and digest_file(path) != entry["sha256"]:
        raise UserError(f"{path}: content differs from the sha256 in {MANIFEST}; {remedy}")


class OtherSettings(UserError):
    """A directory holds, finished or begun, the output of another configuration."""


MISSING = object()  # None will not do: it is a value that JSON has


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Dotted names at which two JSON values differ, each with both values, for people to read.

    Of files and outputs, which a fingerprint knows by their sha256, only that they are others.
    """
    if old != new and _is_content(old) and _is_content(new):
        return [f"{name}: its content has changed"]
    if isinstance(old, dict) and isinstance(new, dict):
        rows: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            rows += differences(old.get(key, MISSING), new.get(key, MISSING), f"{name}.{key}" if name else key)
        return rows
    if old == new:
        return []
    return [f"{name}: {_shorten(old)} -> {_shorten(new)}"]


def _is_content(value: Any) -> bool:
    """Whether a part of a fingerprint stands for the content of a file or an output."""
    if isinstance(value, dict):
        return "sha256" in value
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _shorten(value: Any) -> str:
    if value is MISSING:
        return "(nothing)"
    if _is_content(value):
        return "(some content)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_complete(directory: Path, kind: str, fingerprint: dict[str, Any]) -> bool:
    """Whether the directory holds exactly this output already.

    Raises ``OtherSettings`` if it holds, finished or begun, the output of another configuration, and says what differs;
    ``UserError`` if the mark in it is not this program's.
    """
    for name in (MANIFEST, STARTED):
        path = directory / name
        if not path.exists():
            continue
        found = read_json(path)
        if not isinstance(found, dict) or not {"kind", "fingerprint"} <= found.keys():
            raise UserError(f"{path}: was not written by alsace_dist; choose another run_dir, or move {directory} away")
        rows = differences(found["fingerprint"], json.loads(json.dumps(fingerprint)))
        if rows or found["kind"] != kind:
            raise OtherSettings(
                f"{directory}: made with other settings ({'; '.join(rows[:4]) or 'another kind of stage'}"
                f"{f'; and {len(rows) - 4} more' if len(rows) > 4 else ''}); "
                "choose another run_dir, undo the change, or delete that directory"
            )
        if name == MANIFEST:
            # Sizes alone: this runs before every stage, and hashing a model takes about a second per GB.
            verify_files(directory, load_manifest(directory, kind), hashes=False)
            return True
        return False
    return False


def claim(directory: Path) -> None:
    """Make sure that a directory is this program's to write into and delete from: empty, or with its mark.

    Every stage comes through here before it removes or writes anything. Raises ``UserError`` that names what somebody
    else has put there: files without our mark beside them, or a link to another place.
    """
    remedy = "it is not alsace_dist's; move it away, or choose another run_dir"
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: is no directory; {remedy}")
    entries = [path for path in sorted(directory.iterdir()) if not _is_passing(path)]
    if linked := next((path for path in sorted(directory.rglob("*")) if path.is_symlink()), None):
        raise UserError(f"{linked}: is a link to another place, where files would be written or deleted; {remedy}")
    if entries and not any(_is_mark(directory / name) for name in (MANIFEST, STARTED)):
        raise UserError(f"{entries[0]}: lies where a stage writes; {remedy}")


_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as ``atomic_path`` names what it has not finished


_NOTHING = re.compile("(?!)")


def remove_own(directory: Path, names: "re.Pattern[str]" = _NOTHING) -> None:
    """Delete what an earlier start has left in a directory: its manifest first, so that nothing half deleted is taken
    for whole, then the files whose whole name the pattern matches, and temporary files. The directory goes if it is
    empty then; whatever else a person has put there stays, and so does the directory. A link to a directory is left
    alone: what it leads to is somebody else's.
    """
    if not directory.is_dir() or directory.is_symlink():
        return
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in sorted(directory.iterdir()):
        if path.is_file() and (names.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)):
            path.unlink()
    with suppress(OSError):  # not empty
        directory.rmdir()


def _is_passing(path: Path) -> bool:
    """What a start that was killed may leave before its mark: a temporary file, and the watchdog's directory."""
    return bool(_TEMPORARY.fullmatch(path.name)) or path.name == HANG


def _is_mark(path: Path) -> bool:
    if not path.exists():
        return False
    found = read_json(path)
    return isinstance(found, dict) and {"kind", "fingerprint"} <= found.keys()


def begin(directory: Path, kind: str, fingerprint: dict[str, Any]) -> None:
    """Claim a directory, and mark it as work in progress under this fingerprint. Raises ``UserError`` as ``claim``."""
    claim(directory)
    write_json(directory / STARTED, {"kind": kind, "fingerprint": fingerprint})
