"""What each rank writes of a checkpoint of mT5-XXL, on 8 to 512 ranks of ZeRO-3: a simulation with its parameters."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alsace_dist.models.decoding import CandidateForm
from alsace_dist.models.mt5 import make_scorer
from alsace_dist.plan.model import known_config, load_known
from alsace_dist.training.saving import cut
from alsace_dist.training.state import MOMENTS, WEIGHT, Piece, shard_of
from alsace_dist.training.tensor_file import FILE_BYTES

KEYS = (WEIGHT, *MOMENTS)


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Elements of every trained parameter: the embedding is frozen."""
    known = known_config("google/mt5-xxl")
    assert known is not None
    with torch.device("meta"):
        module = make_scorer(load_known(known)[1], CandidateForm(True, (0, 1, 2), (0,), 0), 0.0, True)
    return {name: one.numel() for name, one in module.named_parameters() if name != "body.shared.weight"}


def engine_of(sizes: dict[str, int], rank: int, num_ranks: int) -> Any:
    """What ``cut`` asks of an engine, with shards as ZeRO-3 makes them: equal parts of each parameter, padded."""

    def own(name: str) -> dict[str, Piece]:
        part = torch.empty(math.ceil(sizes[name] / num_ranks), device="meta")
        piece = shard_of(SimpleNamespace(ds_tensor=part, ds_numel=sizes[name]), rank)  # type: ignore[arg-type]
        return dict.fromkeys(KEYS, piece) if piece.values.numel() else {}

    return SimpleNamespace(parameters=sizes, moments=MOMENTS, layout=SimpleNamespace(own=own))


@pytest.mark.parametrize("num_ranks", [8, 16, 64, 512])
def test_no_rank_writes_more_than_its_own_slices(sizes: dict[str, int], num_ranks: int) -> None:
    """All write at once and wait for nobody, so the slowest writes its own part one after another and no more: 12 bytes
    an element, of 130 GB in all, where ranks used to write one after the other. Every element is written once."""
    total, written, slowest = sum(sizes.values()), dict.fromkeys(range(len(sizes)), 0), 0
    for rank in range(num_ranks):
        files = cut(engine_of(sizes, rank, num_ranks), FILE_BYTES)
        assert all(0 < file.numel * 4 * len(KEYS) <= FILE_BYTES for file in files)
        own = sum(file.numel for file in files)
        assert len(files) == math.ceil(own / (FILE_BYTES // (4 * len(KEYS))))
        slowest = max(slowest, own)
        for number, start, size in (one for file in files for one in file.slices):
            assert start == written[number]
            written[number] += size
    assert list(written.values()) == list(sizes.values())
    assert total > 10e9 and slowest <= total / num_ranks + len(sizes)
