"""The order of training examples and the batches of scoring: canonical, seekable, nothing twice, nothing lost."""

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from alsace_dist.data.stream import (
    CanonicalOrder,
    CutRule,
    Position,
    ShardCache,
    TrainStream,
    ahead,
    micro_batches,
    score_batches,
)

# Counts per shard and global batch size: even, uneven, empty shards, one shard, a batch larger than the data, more
# shards than slots, a prime batch, more shards than streams.
CASES = [
    ([8, 8, 8, 8], 8),
    ([7, 3, 11, 5, 1], 6),
    ([0, 9, 0, 4, 0], 4),
    ([13], 4),
    ([3], 8),
    ([2, 1], 64),
    ([1] * 10, 3),
    ([5, 6, 7], 7),
    ([2] * 150, 128),
]


def stream(
    counts: Sequence[int], size: int, rank: int = 0, world_size: int = 1, seed: int = 5
) -> TrainStream[tuple[int, int]]:
    """A stream whose rows are (shard, index) and whose examples are (shard, index, pass)."""

    def load(shard: int) -> list[tuple[int, int]]:
        assert counts[shard] > 0, "an empty shard was opened"
        return [(shard, index) for index in range(counts[shard])]

    order = CanonicalOrder(counts, size, seed)
    return TrainStream(order, load, lambda row, pass_index: (*row, pass_index), rank, world_size)


def positions(order: CanonicalOrder, num_passes: int) -> dict[int, list[Position]]:
    """All positions of the first passes, by pass, in slot order."""
    num_steps = math.ceil(num_passes * order.total / order.global_batch_size)  # the slowest stream needs no more
    found: dict[int, list[Position]] = defaultdict(list)
    for step in range(num_steps):
        for slot in range(order.global_batch_size):
            place = order.locate(step, slot)
            found[place.pass_index].append(place)
    return {pass_index: found[pass_index] for pass_index in range(num_passes)}


# --- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "size"), CASES)
def test_a_pass_has_every_example_at_most_once_and_leaves_out_fewer_than_there_are_streams(
    counts: list[int], size: int
) -> None:
    order = CanonicalOrder(counts, size, 5)
    for seen in positions(order, 4).values():
        assert len({(place.shard, place.example) for place in seen}) == len(seen)
        assert all(0 <= place.example < counts[place.shard] for place in seen)
        assert 0 <= sum(counts) - len(seen) <= order.num_streams - 1


def test_other_examples_are_left_out_in_each_pass() -> None:
    order = CanonicalOrder([7, 3, 11, 5, 1], 5, 5)
    assert order.num_streams == 5 and order.total % 5 == 2
    seen = Counter((place.shard, place.example) for rows in positions(order, 60).values() for place in rows)
    assert len(seen) == 27 and min(seen.values()) < 60
    assert min(seen.values()) > 40


def test_passes_differ_and_so_do_seeds() -> None:
    counts = [7, 3, 11, 5, 1]
    orders = {
        tuple((place.shard, place.example) for place in rows)
        for seed in (0, 1)
        for rows in positions(CanonicalOrder(counts, 4, seed), 5).values()
    }
    assert len(orders) == 10
    within = positions(CanonicalOrder([13], 4, 0), 5).values()
    assert len({tuple(place.example for place in rows) for rows in within}) == 5
    shard_orders = set()
    for rows in positions(CanonicalOrder(counts, 1, 0), 10).values():
        shard_orders.add(tuple(dict.fromkeys(place.shard for place in rows)))
    assert len(shard_orders) > 5  # the shards' order is shuffled as well


@pytest.mark.parametrize("size", [32, 31, 17, 50])
def test_a_batch_mixes_as_many_shards_as_there_are(size: int) -> None:
    order = CanonicalOrder([100] * 16, size, 0)
    assert order.num_streams == 16
    # Streams start wherever a shard ends or goes on, so two of them may share one.
    assert len({order.locate(0, slot).shard for slot in range(size)}) >= 12
    assert CanonicalOrder([1000] * 200, 256, 0).num_streams == 64


def test_few_examples_leave_each_stream_one_at_least() -> None:
    order = CanonicalOrder([1] * 5, 7, 0)
    for seen in positions(order, 3).values():
        assert len(seen) >= order.num_streams


def test_fewer_examples_than_a_batch_are_seen_again_in_the_same_step() -> None:
    order = CanonicalOrder([3], 8, 0)
    for step in range(6):
        seen = Counter(order.locate(step, slot).example for slot in range(8))
        assert sorted(seen) == [0, 1, 2] and set(seen.values()) <= {2, 3, 4}
    total = Counter(order.locate(step, slot).example for step in range(6) for slot in range(8))
    assert set(total.values()) == {16}


def test_steps_of_an_epoch() -> None:
    order = CanonicalOrder([50, 50], 32, 0)
    assert [order.num_steps(epochs) for epochs in (0.001, 1, 2.5, 3)] == [1, 3, 8, 9]


def test_no_examples_are_refused() -> None:
    for counts in ([], [0, 0]):
        with pytest.raises(ValueError, match="no examples"):
            CanonicalOrder(counts, 4, 0)


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "size"), CASES)
def test_the_order_does_not_depend_on_the_world_size(counts: list[int], size: int) -> None:
    """What the ranks have of a step, one after another, is what one rank has; more ranks than slots have nothing."""
    num_steps = 12
    alone = stream(counts, size)
    expected = [alone.batch(step) for step in range(num_steps)]
    assert [len(batch) for batch in expected] == [size] * num_steps
    for world_size in (2, 3, 5, size + 1):
        ranks = [stream(counts, size, rank, world_size) for rank in range(world_size)]
        for step in range(num_steps):
            found: list[Any] = []
            for rank, one in enumerate(ranks):
                batch = one.batch(step)
                assert len(batch) == len(one.order.slots_of(rank, world_size))
                found += batch
            assert found == expected[step]


@pytest.mark.parametrize("world_size", [1, 2, 3, 24, 56, 63, 64, 512])
def test_ranks_take_equally_much_and_read_few_shards(world_size: int) -> None:
    """A shard that two ranks draw from is read by both."""
    order = CanonicalOrder([1000] * 200, 1024, 0)
    assert order.num_streams == 64
    own = [order.slots_of(rank, world_size) for rank in range(world_size)]
    assert sorted(slot for slots in own for slot in slots) == list(range(1024))
    assert {len(slots) for slots in own} <= {1024 // world_size, -(-1024 // world_size)}
    num_reads = sum(len({slot % 64 for slot in slots}) for slots in own)
    assert num_reads <= 64 + world_size - math.gcd(64, world_size)


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "size"), CASES)
def test_a_stream_that_starts_at_a_step_sees_what_one_that_ran_from_the_beginning_sees(
    counts: list[int], size: int
) -> None:
    ran = stream(counts, size, rank=1, world_size=2)
    batches = [ran.batch(step) for step in range(40)]
    for step in (0, 1, 7, 20, 39):
        fresh = stream(counts, size, rank=1, world_size=2)
        assert fresh.batch(step) == batches[step]
        needed = {fresh.order.locate(step, slot).shard for slot in fresh.order.slots_of(1, 2)}
        assert sorted(fresh.cache.opened) == sorted(needed)  # those shards, each once, and no other


def test_resuming_far_into_the_data_opens_one_shard_per_stream() -> None:
    fresh = stream([100] * 500, 8)
    assert fresh.order.num_streams == 8
    fresh.batch(5_000_000)
    assert len(fresh.cache.opened) == 8


def test_a_pass_opens_no_shard_again_except_where_streams_meet() -> None:
    one = stream([10] * 40, 8)
    for step in range(50):
        one.batch(step)
    assert sum(count - 1 for count in Counter(one.cache.opened).values()) <= one.order.num_streams
    assert len(one.cache._rows) <= 2 * one.order.num_streams + 2  # and forgets those that it has done with


def test_batches_made_ahead_are_the_same_in_the_same_order() -> None:
    expected = stream([7, 3, 11], 4)
    for first, last in ((0, 9), (5, 6), (5, 7), (3, 3)):
        found = stream([7, 3, 11], 4).batches(first, last, lambda step, batch: (step, batch))
        assert list(found) == [(step, expected.batch(step)) for step in range(first, last)]


@pytest.mark.parametrize(("counts", "size"), [*CASES, ([10] * 40, 8), ([3] * 30, 2)])
def test_the_shards_of_the_first_steps_are_those_that_they_draw_from(counts: list[int], size: int) -> None:
    order, drawn = CanonicalOrder(counts, size, 5), set[int]()
    for step in range(30):
        drawn |= {order.locate(step, slot).shard for slot in range(size)}
        found = order.shards_of(step + 1)
        # A stream begins and ends at one example of a shard, and within a pass its examples come one after another.
        assert found == sorted(drawn)
    assert order.shards_of(10**8) == [shard for shard, count in enumerate(counts) if count]


@pytest.mark.parametrize(("counts", "size"), [*CASES, ([10] * 40, 8), ([3] * 30, 2)])
def test_what_a_stream_says_it_will_load_is_what_it_loads(counts: list[int], size: int) -> None:
    """So what is fetched ahead is what is asked for next, also where shards leave the cache and come again."""
    heard: list[int] = []
    one = stream(counts, size, rank=0, world_size=2)
    one._expect = heard.extend
    assert len(list(one.batches(7, 80, lambda step, batch: batch))) == 73
    assert heard == one.cache.opened


def test_items_are_made_ahead_and_no_further_than_asked() -> None:
    made: list[int] = []
    items = ahead((made.append(number) or number for number in range(10)), depth=2)
    assert next(items) == 0
    for _ in range(1000):
        if len(made) == 3:
            break
        time.sleep(0.005)
    time.sleep(0.02)
    assert made == [0, 1, 2]  # the one in use, and two more
    items.close()
    assert next(items, None) is None
    assert made == [0, 1, 2]


def test_an_error_while_loading_reaches_the_one_who_asks_for_the_batch() -> None:
    def load(shard: int) -> list[int]:
        raise OSError("disk gone")

    broken: TrainStream[int] = TrainStream(CanonicalOrder([4], 2, 0), load, lambda row, _: row, 0, 1)
    with pytest.raises(OSError, match="disk gone"):
        next(broken.batches(0, 5, lambda step, batch: batch))


def test_a_shard_with_another_number_of_rows_than_counted_is_not_used() -> None:
    cache: ShardCache[int] = ShardCache(lambda shard: [1, 2], [3], 1)
    with pytest.raises(AssertionError, match="shard 0: 2 examples, 3 counted"):
        cache[0]


def test_the_cache_keeps_the_most_recently_used() -> None:
    cache: ShardCache[int] = ShardCache(lambda shard: [shard], [1] * 4, capacity=2)
    for shard in (0, 1, 0, 2, 0, 1):
        assert cache[shard] == [shard]
    assert cache.opened == [0, 1, 2, 1]


def test_two_threads_that_want_a_shard_load_it_once() -> None:
    """The loop asks for a stand-in while the thread that makes batches ahead is loading."""
    loading, go_on = threading.Event(), threading.Event()

    def load(shard: int) -> list[int]:
        loading.set()
        go_on.wait(0.3)
        return [shard]

    cache: ShardCache[int] = ShardCache(load, [1], 1)
    ahead = threading.Thread(target=lambda: cache[0])
    ahead.start()
    loading.wait()
    assert cache[0] == [0]
    go_on.set()
    ahead.join()
    assert cache.opened == [0]


# --- batches -------------------------------------------------------------------------------------------------------

LENGTHS = [
    [],
    [5],
    [3, 3, 3, 3],
    [1, 9, 2, 8, 3, 7],
    np.random.default_rng(0).integers(1, 60, size=203).tolist(),
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [1, 4, 64, None])
@pytest.mark.parametrize("budget", [1, 60, 500, 10**9])
@pytest.mark.parametrize("pass_cost", [0, 30, 10_000])
def test_micro_batches_hold_everything_once_longest_first(
    lengths: list[int], size: int | None, budget: int, pass_cost: int
) -> None:
    parts = micro_batches(lengths, CutRule(budget, size, pass_cost))
    assert all(0 < len(part) <= (size or len(lengths)) for part in parts)
    assert all(len(part) == 1 or len(part) * max(lengths[index] for index in part) <= budget for part in parts)
    order = [index for part in parts for index in part]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    if pass_cost == 0:
        assert all(len({lengths[index] for index in part}) == 1 for part in parts)
    if pass_cost == 10_000 and budget == 10**9:
        assert len(parts) == math.ceil(len(lengths) / (size or max(1, len(lengths))))


def cost(lengths: list[int], pass_cost: int) -> int:
    """Of one micro-batch."""
    return pass_cost + len(lengths) * max(lengths)


@pytest.mark.parametrize("pass_cost", [0, 3, 7, 20])
@pytest.mark.parametrize("size", [2, 3, None])
@pytest.mark.parametrize("budget", [9, 21, 100])
def test_no_other_cut_into_micro_batches_costs_less(size: int | None, budget: int, pass_cost: int) -> None:
    lengths = [9, 1, 8, 3, 3, 7, 2]
    ordered = sorted(lengths, reverse=True)
    cuts = [pairwise([0, *inner, 7]) for num in range(7) for inner in combinations(range(1, 7), num)]

    def is_allowed(begin: int, end: int) -> bool:
        return end - begin == 1 or (end - begin <= (size or 7) and (end - begin) * ordered[begin] <= budget)

    allowed = [cut for cut in map(list, cuts) if all(is_allowed(begin, end) for begin, end in cut)]
    least = min(sum(cost(ordered[begin:end], pass_cost) for begin, end in cut) for cut in allowed)
    parts = micro_batches(lengths, CutRule(budget, size, pass_cost))
    assert sum(cost([lengths[index] for index in part], pass_cost) for part in parts) == least


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("budget", [1, 60, 500, 10_000])
def test_score_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = score_batches(lengths, budget)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1
    for batch in batches[:-1]:  # none could have taken one more
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_equal_lengths_keep_their_order() -> None:
    assert score_batches([2, 5, 2, 5, 2], 10) == [[1, 3], [0, 2, 4]]
    assert micro_batches([2, 5, 2, 5, 2], CutRule(100, 2, 3)) == [[1, 3], [0], [2, 4]]
