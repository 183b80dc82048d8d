"""What languages answer while they are scored, by hand; and what is logged of it."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from alsace_dist.method.block import block_of
from alsace_dist.monitor.scoring import Counts, ScoringMonitor
from alsace_dist.monitor.sinks import METRICS, Places, read_scalars
from alsace_dist.ranks.group import Ranks, StopFlag

GROUPS = {
    "a": {"de": [0.7, 0.3], "en": [0.6, 0.4], "sw": [0.1, 0.9]},  # the vote is the first
    "b": {"de": [0.2, 0.8], "en": [0.45, 0.55]},
    "c": {"en": [0.2, 0.5, 0.3]},  # its other languages are in another part
}


def counts() -> Counts:
    found = Counts(num_rows=6, num_tokens=60, num_padded=80)
    logs = [{name: np.log(np.array(row, np.float32)) for name, row in group.items()} for group in GROUPS.values()]
    found.see(block_of(logs), np.array([True, True, False]))
    return found


def test_confidence_is_of_all_rows_and_agreement_of_whole_groups() -> None:
    values = counts().answers()
    assert values["confidence_of/en"] == pytest.approx((0.6 + 0.55 + 0.5) / 3)
    assert values["confidence_of/sw"] == pytest.approx(0.9)
    agreement = {name: values[f"vote_agreement_of/{name}"] for name in ("de", "en", "sw")}
    assert agreement == {"de": 1.0, "en": 1.0, "sw": 0.0}


def test_rates_are_of_what_was_counted_meanwhile() -> None:
    values = counts().rates(Counts(), seconds=2.0, num_ranks=3)
    assert values["sequences_per_second"] == 9 and values["tokens_per_second"] == 90
    assert values["padding_share"] == pytest.approx(0.25)
    values = counts().rates(Counts(num_rows=4, num_tokens=20, num_padded=20), seconds=2.0, num_ranks=1)
    assert values["sequences_per_second"] == 1 and values["tokens_per_second"] == 20
    assert values["padding_share"] == pytest.approx(1 / 3)


def test_a_pass_that_slows_down_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alsace_dist.monitor.scoring.EVERY_SECONDS", 0.0)
    alone = Ranks(0, 1, 0, torch.device("cpu"), None, StopFlag())
    monitor = ScoringMonitor(Places(tmp_path, tmp_path / "board"), alone, num_done=0, total=5)
    for part, seconds in ((1, 0.01), (2, 0.3)):
        time.sleep(seconds)
        monitor.counts.num_rows += 100
        monitor.counts.see(block_of([{"en": np.log(np.array([0.75, 0.25], np.float32))}]), np.array([True]))
        monitor.part(part)
    monitor.close()
    fast, slow = read_scalars(tmp_path / METRICS)
    assert fast["sequences_per_second"] > 3 * slow["sequences_per_second"] and slow["sequences_per_second"] < 100 / 0.3
    assert slow["confidence_of/en"] == pytest.approx(0.75)


def test_ranks_add_up() -> None:
    both, one = counts() + counts(), counts()
    assert (both.num_rows, both.num_tokens, both.num_padded) == (12, 120, 160)
    assert all(np.array_equal(both.by_language[name], 2 * row) for name, row in one.by_language.items())
    assert both.answers() == one.answers()


def test_the_last_line_is_of_all_ranks_and_says_that_all_is_done(tmp_path: Path) -> None:
    alone = Ranks(0, 1, 0, torch.device("cpu"), None, StopFlag())
    monitor = ScoringMonitor(Places(tmp_path, tmp_path / "board"), alone, num_done=2, total=5)
    monitor.part(1)  # too soon after the start for a line
    monitor.finish([counts(), counts()])
    monitor.close()
    (row,) = read_scalars(tmp_path / METRICS)
    assert row["step"] == 5 and row["done_share"] == 1.0 and row["vote_agreement_of/sw"] == 0.0
    monitor = ScoringMonitor(Places(tmp_path, tmp_path / "board"), alone, num_done=5, total=5)
    monitor.finish([Counts()])  # nothing was left to score
    monitor.close()
    assert len(read_scalars(tmp_path / METRICS)) == 1
