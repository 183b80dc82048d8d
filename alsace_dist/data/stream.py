"""Which examples go where: the canonical order of training, and the batches of a scoring pass.

The order of training examples is a function of (seed, counts per shard, global batch size). World size, worker count
and micro-batches have no part in it, and the position is just the step number: resuming opens only the shards that the
next step needs.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar, overload

import numpy as np

Row = TypeVar("Row")
Item = TypeVar("Item")
MAX_STREAMS = 64
# Fixed overhead of one forward and backward pass, whatever its size, expressed in tokens. Measured on a CPU
# (one thread, bf16): for mT5-small 108, and 250 if its vocabulary is trained too; 330 and more for nano models. Between
# 128 and 256 the whole cost of a step hardly differs, and the lower value pads less. For GPUs an estimate, where a
# training's first passes measure none: 20 ms of launches, 1e5 tokens/s.
PASS_COST = {"cpu": 128, "cuda": 2048}
# From ZeRO-2 on each pass also reduces all gradients over the ranks. Estimates: gloo at 1 GB/s, NCCL at 100 GB/s.
REDUCTION_COST = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Position:
    """One training example: which pass over the data, which shard, which of its examples."""

    pass_index: int
    shard: int
    example: int


class CanonicalOrder:
    """Training examples by (step, slot).

    A pass is the concatenation of all shards in a shuffled order, each shuffled within. It is cut into ``num_streams``
    parts that are read side by side, so that a global batch mixes many shards; slot ``j`` of a step belongs to stream
    ``j mod num_streams``, and a stream is as long as it has slots. Up to ``num_streams - 1`` examples of a pass are
    left over; others in each pass.
    """

    def __init__(self, counts: Sequence[int], global_batch_size: int, seed: int) -> None:
        """``counts``: examples per shard. Raises ``ValueError`` if there is none."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise ValueError("no examples")
        self.global_batch_size = global_batch_size
        self.seed = seed
        most = min(int((self.counts > 0).sum()), MAX_STREAMS, global_batch_size)
        # The largest number of streams at which the stream with the fewest slots still has one example.
        self.num_streams = next(
            n for n in range(most, 0, -1) if self.total * (global_batch_size // n) >= global_batch_size
        )
        self._slots = [len(range(stream, global_batch_size, self.num_streams)) for stream in range(self.num_streams)]
        self._lengths = [self.total * slots // global_batch_size for slots in self._slots]
        self._starts = np.cumsum([0, *self._lengths]).tolist()
        self._pass = lru_cache(maxsize=4)(self._make_pass)
        self._permutation = lru_cache(maxsize=4 * MAX_STREAMS)(self._make_permutation)

    def num_steps(self, num_epochs: float) -> int:
        """Steps of ``num_epochs`` passes, at least one."""
        return max(1, round(num_epochs * self.total / self.global_batch_size))

    def locate(self, step: int, slot: int) -> Position:
        """The example in slot ``slot`` (0 <= slot < global batch size) of step ``step``."""
        stream = slot % self.num_streams
        consumed = step * self._slots[stream] + slot // self.num_streams
        pass_index, offset = divmod(consumed, self._lengths[stream])
        shards, starts = self._pass(pass_index)
        place = self._starts[stream] + offset
        rank = int(np.searchsorted(starts, place, side="right")) - 1
        shard = int(shards[rank])
        return Position(pass_index, shard, int(self._permutation(pass_index, shard)[place - starts[rank]]))

    def slots_of(self, rank: int, world_size: int) -> list[int]:
        """The slots of every step that a rank takes: equally many, stream by stream, for each stream is another shard
        to read. All ranks together read a shard about ``1 + world_size / num_streams`` times."""
        size = self.global_batch_size
        by_stream = [slot for stream in range(self.num_streams) for slot in range(stream, size, self.num_streams)]
        return by_stream[rank * size // world_size : (rank + 1) * size // world_size]

    def shards_of(self, num_steps: int) -> list[int]:
        """The shards that the first steps draw from, in ascending order."""
        needed: set[int] = set()
        for stream, (slots, length) in enumerate(zip(self._slots, self._lengths, strict=True)):
            consumed = num_steps * slots
            for pass_index in range(-(-consumed // length)):
                if len(needed) == int((self.counts > 0).sum()):
                    break
                shards, starts = self._pass(pass_index)
                first = self._starts[stream]
                last = first + min(length, consumed - pass_index * length) - 1
                begin, end = np.searchsorted(starts, [first, last], side="right")
                needed.update(shards[begin - 1 : end].tolist())
        return sorted(needed)

    def _make_pass(self, pass_index: int) -> tuple[np.ndarray, np.ndarray]:
        shards = np.random.default_rng([self.seed, pass_index]).permutation(np.flatnonzero(self.counts))
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])[:-1]])

    def _make_permutation(self, pass_index: int, shard: int) -> np.ndarray:
        return np.random.default_rng([self.seed, pass_index, shard]).permutation(self.counts[shard])


class Lazily(Sequence[Row]):
    """A sequence whose items are made when they are asked for, each time anew."""

    def __init__(self, size: int, make: Callable[[int], Row]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        return self._make(index)


class ShardCache(Generic[Row]):
    """Shards loaded whole, the most recently used kept. ``opened`` lists every load, for tests and logs."""

    def __init__(self, load: Callable[[int], Sequence[Row]], counts: Sequence[int], capacity: int) -> None:
        self._load = load
        self._counts = counts
        self.capacity = capacity
        self._rows: OrderedDict[int, Sequence[Row]] = OrderedDict()
        self._lock = threading.Lock()  # two threads read: one makes batches ahead, and the loop asks for stand-ins
        self.opened: list[int] = []

    def __getitem__(self, shard: int) -> Sequence[Row]:
        with self._lock:
            return self._get(shard)

    def held(self) -> "OrderedDict[int, None]":
        """The shards that are there, the least recently used first."""
        with self._lock:
            return OrderedDict.fromkeys(self._rows)

    def _get(self, shard: int) -> Sequence[Row]:
        if shard not in self._rows:
            rows = self._load(shard)
            assert len(rows) == self._counts[shard], (
                f"shard {shard}: {len(rows)} examples, {self._counts[shard]} counted"
            )
            self._rows[shard] = rows
            self.opened.append(shard)
            if len(self._rows) > self.capacity:
                self._rows.popitem(last=False)
        self._rows.move_to_end(shard)
        return self._rows[shard]


class TrainStream(Generic[Row]):
    """This rank's share of every global batch.

    ``build`` makes a training example from a row and the pass it is seen in. Batches are made ahead, in one thread.
    """

    def __init__(
        self,
        order: CanonicalOrder,
        load: Callable[[int], Sequence[Row]],
        build: Callable[[Row, int], Any],
        rank: int,
        world_size: int,
        expect: Callable[[Iterator[int]], None] | None = None,
    ) -> None:
        """``expect``: hears which shards will be loaded, in their order, before the first of them is."""
        self.order = order
        self._expect = expect
        self._build = build
        self._slots = order.slots_of(rank, world_size)
        num_streams = len({slot % order.num_streams for slot in self._slots})
        # Keep the shards that a step draws from and the shards that follow them.
        self.cache = ShardCache(load, order.counts.tolist(), capacity=2 * num_streams + 2)

    def batch(self, step: int) -> list[Any]:
        """This rank's examples of one step; empty if there are more ranks than slots."""
        return [self._example(step, slot) for slot in self._slots]

    def stand_in(self, step: int) -> Any:
        """An example of a step: one of this rank's, where it has any."""
        return self._example(step, next(iter(self._slots), 0))

    def _example(self, step: int, slot: int) -> Any:
        place = self.order.locate(step, slot)
        return self._build(self.cache[place.shard][place.example], place.pass_index)

    def batches(self, first: int, last: int, make: Callable[[int, list[Any]], Item]) -> Iterator[Item]:
        """``make(step, batch)`` of steps first, ..., last - 1; the next items are made while one is used."""
        if self._expect is not None:
            self._expect(self._loads(first, last, self.cache.held()))
        return ahead(make(step, self.batch(step)) for step in range(first, last))

    def _loads(self, first: int, last: int, held: "OrderedDict[int, None]") -> Iterator[int]:
        """The shards that steps first, ..., last - 1 will load, in their order: those that the cache, which has
        ``held`` before, will not have then."""
        for step in range(first, last):
            for slot in self._slots:
                shard = self.order.locate(step, slot).shard
                if shard not in held:
                    yield shard
                    if len(held) == self.cache.capacity:
                        held.popitem(last=False)
                held[shard] = None
                held.move_to_end(shard)


def ahead(items: Iterator[Item], depth: int = 2) -> Generator[Item]:
    """The same items; a thread makes up to ``depth`` items before they are asked for.

    An error while making one is raised where it is asked for.
    """
    done = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        made: deque[Future[Any]] = deque(pool.submit(next, items, done) for _ in range(depth))
        try:
            while (item := made.popleft().result()) is not done:
                made.append(pool.submit(next, items, done))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class CutRule:
    """How large micro-batches may be: encoder tokens, padding included; examples (None: any number). ``pass_cost``: the
    fixed overhead of a forward and backward pass, in tokens."""

    most_tokens: int
    most_examples: int | None
    pass_cost: int


def micro_batches(lengths: Sequence[int], rule: CutRule) -> list[list[int]]:
    """Cut a rank's share of a step into micro-batches by length, longest first. An example that is longer than the
    budget is a micro-batch of its own.

    Of all such cuts this is the cheapest: a micro-batch costs its tokens, padding included, and the overhead of a pass.
    Returns indices.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ordered = np.array([lengths[index] for index in by_length], dtype=np.float64)
    costs, starts = np.zeros(len(ordered) + 1), [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        begins = np.arange(max(0, end - (rule.most_examples or end)), end)
        tokens = (end - begins) * ordered[begins]
        candidates = costs[begins] + tokens + rule.pass_cost
        candidates[(tokens > rule.most_tokens) & (begins < end - 1)] = np.inf
        best = int(candidates.argmin())
        costs[end], starts[end] = candidates[best], int(begins[best])
    parts: list[list[int]] = []
    end = len(ordered)
    while end > 0:
        parts.insert(0, by_length[starts[end] : end])
        end = starts[end]
    return parts


def score_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut a shard's rows into batches of at most ``tokens_per_batch`` tokens, padding included, longest first.

    A function of the shard alone: whoever scores it computes the same products. A row longer than the budget is a
    batch of its own.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in by_length:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
