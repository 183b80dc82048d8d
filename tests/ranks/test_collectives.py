"""What ranks tell each other."""

from typing import Any

import numpy as np
import tiny


def flags_of(rank: int) -> np.ndarray:
    return np.arange(1000) % 5 == rank


def union(ranks: Any) -> list[int]:
    found = ranks.union(flags_of(ranks.rank))
    assert found.dtype == bool and not ranks.union(np.zeros(0, bool)).any()
    return np.flatnonzero(found).tolist()


def test_each_rank_learns_which_flags_any_rank_has_set() -> None:
    for num_ranks in (1, 2):
        expected = np.flatnonzero(np.any([flags_of(rank) for rank in range(num_ranks)], axis=0)).tolist()
        assert tiny.run_ranks(union, num_ranks) == [expected] * num_ranks
