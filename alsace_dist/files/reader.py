"""The bytes of a dataset's shards; those of a store are fetched before they are asked for, by threads."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain

from alsace_dist.files import store
from alsace_dist.files.cache import Cache

MAX_SHARD_BYTES = 8 << 30  # a shard is held in memory whole
MAX_AHEAD = 8  # shards
MAX_AHEAD_BYTES = 256 << 20  # of shards that wait, less the last of them; a rank, and a node has several


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the dataset's manifest lists it; ``num_examples``: language -> number of groups that have it."""

    name: str
    sha256: str
    num_bytes: int
    num_groups: int
    num_examples: dict[str, int]

    @property
    def stem(self) -> str:
        """File name without suffix: joins a shard with its scores."""
        return self.name.removesuffix(".tar")


class ShardReader:
    """Reads shards by their place below a URL. Threads may share it."""

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        self.url = url
        self._cache = cache
        self._coming: Iterator[ShardInfo] = iter(())
        self._ahead: deque[tuple[ShardInfo, Future[bytes]]] = deque()
        self._lock = threading.Lock()

    @property
    def is_remote(self) -> bool:
        """Whether the shards are in a store, and not on a disk of this machine."""
        return store.is_remote(self.url)

    def expect(self, shards: Iterable[ShardInfo]) -> None:
        """Say which shards will be read after those that were said before, in their order, each as often as it is read.

        Of a store the first of them are fetched at once. What is on a disk of this machine is read when it is asked
        for.
        """
        if not self.is_remote:
            return
        with self._lock:
            self._coming = chain(self._coming, shards)
            self._fetch_ahead()

    def read(self, shard: ShardInfo) -> bytes:
        """The bytes of a shard, with the sha256 that the manifest says.

        Raises ``FileNotFoundError``, and ``UserError`` as ``store.read``.
        """
        with self._lock:
            future = self._take(shard)
            self._fetch_ahead()
        return self._fetch(shard) if future is None else future.result()

    def _take(self, shard: ShardInfo) -> Future[bytes] | None:
        """What has been fetched, or is being fetched, of a shard. Those that it was to come after will not be read."""
        if shard not in [expected for expected, _ in self._ahead]:
            return None
        while True:
            expected, future = self._ahead.popleft()
            if expected == shard:
                return future

    def _fetch_ahead(self) -> None:
        while len(self._ahead) < MAX_AHEAD and sum(shard.num_bytes for shard, _ in self._ahead) < MAX_AHEAD_BYTES:
            shard = next(self._coming, None)
            if shard is None:
                return
            future: Future[bytes] = Future()
            self._ahead.append((shard, future))
            # A thread of its own that nobody waits for at the end of the process: it may be waiting for a store.
            threading.Thread(target=self._fulfil, args=(shard, future), daemon=True).start()

    def _fulfil(self, shard: ShardInfo, future: Future[bytes]) -> None:
        try:
            future.set_result(self._fetch(shard))
        except BaseException as error:  # raised where the shard is asked for
            future.set_exception(error)

    def _fetch(self, shard: ShardInfo) -> bytes:
        url = f"{self.url}/{shard.name}"
        if self._cache is None or not self.is_remote:
            return store.read(url, MAX_SHARD_BYTES, shard.sha256)
        return self._cache.get(shard.sha256, lambda: store.read(url, MAX_SHARD_BYTES, shard.sha256))
