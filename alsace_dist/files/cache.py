"""Shards of a store kept on a disk of this node: named by their sha256, within a bound, shared by the node's ranks.

Nothing here is needed: what goes wrong with the cache (a full disk, no permission, a damaged file) costs a fetch, and
never a run.
"""

import fcntl
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from alsace_dist import reading
from alsace_dist.config import DataConfig
from alsace_dist.errors import UserError, warn
from alsace_dist.files.manifest import digest_bytes

# A process that dies lets go of its lock; one that is stopped does not, and then everybody fetches for themselves.
LOCK_SECONDS = 300.0
FOLDER = "alsace-shards"  # of its own below the directory that a config names, where people may keep other things
_KEPT = re.compile("[0-9a-f]{64}")
_UNFINISHED = re.compile(r"fetching-\w+\.tmp")
_has_warned = threading.Event()


@dataclass(frozen=True)
class Cache:
    """A directory that holds at most ``most_bytes`` of shards; the least recently used go first."""

    directory: Path
    most_bytes: int

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes with this sha256: those that are kept, or else what ``fetch`` gives, which is kept then.

        Of several processes that ask at once, one fetches. Raises what ``fetch`` raises.
        """
        if (kept := self._kept(sha256)) is not None:
            return kept
        with self._alone(sha256[:2]):
            if (kept := self._kept(sha256)) is not None:
                return kept
            data = fetch()
            self._keep(sha256, data)
            return data

    def _kept(self, sha256: str) -> bytes | None:
        path = self.directory / sha256
        try:
            reading.check_regular(path, "")
            data = path.read_bytes()
            if digest_bytes(data) != sha256:
                path.unlink()
                return None
            os.utime(path)  # as used now; that it was read says nothing, where disks are mounted with noatime
        except (OSError, UserError):
            return None
        return data

    def _keep(self, sha256: str, data: bytes) -> None:
        if len(data) > self.most_bytes:
            return
        with self._alone("all") as is_alone:
            if not is_alone:
                return
            try:
                self._make_room(len(data))
                _write(self.directory / sha256, data)
            except OSError as error:
                _warn(
                    f"{self.directory}: not used as a cache ({error.strerror or error}); shards are fetched each time"
                )

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used until so many bytes fit, and what processes that died have left."""
        found: list[tuple[int, int, Path]] = []
        for path in self.directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):  # nobody else is writing: who writes holds the lock
                path.unlink()
            elif _KEPT.fullmatch(path.name):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = num_bytes + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.most_bytes:
                return
            path.unlink()
            total -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        """Hold a lock of all processes on this node; False if it cannot be had."""
        handle = -1
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.directory / f".lock-{name}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            is_alone = _lock(handle)
        except OSError as error:
            _warn(f"{self.directory}: not used as a cache ({error.strerror or error}); shards are fetched each time")
            is_alone = False
        try:
            yield is_alone
        finally:
            if handle >= 0:
                os.close(handle)


def _write(path: Path, data: bytes) -> None:
    """Atomic, but without fsync: who reads the file looks at its sha256."""
    handle, name = tempfile.mkstemp(prefix="fetching-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _lock(handle: int) -> bool:
    end = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _warn(text: str) -> None:
    if not _has_warned.is_set():
        _has_warned.set()
        warn(text)


def cache_of(config: DataConfig) -> Cache | None:
    """The cache that a config asks for, in a folder of its own there.

    Variables are those of this process: a job's directory has another name on each node, and none on a login node,
    where there is no cache then.
    """
    if config.cache is None:
        return None
    place = os.path.expandvars(config.cache)
    if "$" in place:
        _warn(f"data.cache: {config.cache}: no such variable here; shards are fetched each time")
        return None
    return Cache(Path(place) / FOLDER, round(config.cache_gb * 1e9))
