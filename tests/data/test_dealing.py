"""How scoring is dealt: each batch once, many ranks busy with few shards, few ranks undisturbed."""

import itertools

import pytest

from alsace_dist.data.dealing import PARTS_PER_RANK, Part, deal
from alsace_dist.files.shards import ShardInfo


def shards(number: int) -> list[ShardInfo]:
    return [ShardInfo(f"{index:06d}.tar", 1, 256, {"en": 256, "de": 250}, "0" * 64) for index in range(number)]


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "num_batches"), itertools.product((0, 1, 2, 79, 3000), (1, 2, 32, 512), (0, 1, 5, 12))
)
def test_every_batch_is_dealt_once(num_shards: int, num_ranks: int, num_batches: int) -> None:
    parts = deal(shards(num_shards), num_ranks, lambda shard: 64)
    found = [(part.shard.stem, batch) for part in parts for batch in part.of(range(num_batches))]
    assert found == [(shard.stem, batch) for shard in shards(num_shards) for batch in range(num_batches)]
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)


def test_few_shards_keep_many_ranks_busy() -> None:
    """500 unlabeled groups in shards of 256, the default: of 32 ranks two had work."""
    parts = deal(shards(2), 32, lambda shard: 100)
    assert len([part for part in parts if part.of(range(16))]) == 32
    assert max(len(part.of(range(16))) for part in parts) == 1


def test_many_shards_stay_whole_but_for_the_end() -> None:
    """What is divided is read and tokenised by several ranks."""
    assert deal(shards(3), 1, lambda shard: 64) == [Part(shard) for shard in shards(3)]
    assert all(part.num_parts == 1 for part in deal(shards(PARTS_PER_RANK * 8), 8, lambda shard: 64))
    assert all(part.num_parts == 2 for part in deal(shards(PARTS_PER_RANK * 8 - 1), 8, lambda shard: 64))


def test_a_shard_has_no_more_parts_than_batches() -> None:
    assert [part.num_parts for part in deal(shards(2), 32, lambda shard: 3)] == [3] * 6
    assert [part.num_parts for part in deal(shards(1), 32, lambda shard: 0)] == [1]
