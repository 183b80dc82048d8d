"""The statistics against exact arithmetic, hand-computed examples and their own definitions."""

import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from alsace_dist.reporting import statistics
from alsace_dist.reporting.statistics import holm, mcnemar_exact, most_lost, paired_bootstrap, summary


def paired(gained: int, lost: int, same: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes before and after with so many discordant pairs of each kind."""
    before = np.array([False] * gained + [True] * lost + [True] * same)
    after = np.array([True] * gained + [False] * lost + [True] * same)
    return before, after


@pytest.mark.parametrize(
    ("gained", "lost"), [(1, 0), (5, 0), (0, 5), (7, 2), (10, 10), (11, 10), (60, 90), (1500, 1350), (30000, 30500)]
)
def test_mcnemar_equals_the_binomial_test_in_whole_numbers(gained: int, lost: int) -> None:
    """Two-sided: twice the chance of as few or fewer of one kind, if each is as likely; in exact arithmetic."""
    total, term, below = gained + lost, 1, 0
    for count in range(min(gained, lost) + 1):
        below += term  # so many ways to choose that many of all
        term = term * (total - count) // (count + 1)
    expected = min(Fraction(1), Fraction(2 * below, 2**total))
    assert mcnemar_exact(*paired(gained, lost, same=13)) == pytest.approx(float(expected), rel=1e-9)


def test_mcnemar_by_hand() -> None:
    # 4 discordant pairs, 0 of one kind: 2 * (1/2)^4; then 1 of 5: 2 * (1 + 5) / 32.
    assert mcnemar_exact(*paired(4, 0)) == pytest.approx(0.125)
    assert mcnemar_exact(*paired(1, 4)) == pytest.approx(0.375)


def test_mcnemar_without_discordant_pairs_is_1() -> None:
    assert mcnemar_exact(*paired(0, 0, same=9)) == 1.0
    assert mcnemar_exact(np.array([], dtype=bool), np.array([], dtype=bool)) == 1.0


def test_mcnemar_of_overwhelming_evidence_does_not_overflow() -> None:
    assert 0.0 <= mcnemar_exact(*paired(100_000, 3)) < 1e-300


def test_mcnemar_refuses_unpaired_outcomes() -> None:
    with pytest.raises(ValueError, match="one length"):
        mcnemar_exact(np.ones(3, bool), np.ones(4, bool))


@pytest.mark.parametrize(("gained", "lost", "total"), [(0, 0, 2), (0, 0, 30), (0, 0, 2000)])
def test_where_nothing_has_changed_the_number_of_examples_bounds_the_loss(gained: int, lost: int, total: int) -> None:
    """Then the score interval has a closed form; 30 examples rule out 11.4 points (an exact binomial bound: 11.6)."""
    assert most_lost(gained, lost, total) == pytest.approx(1.959964**2 / (total + 1.959964**2))


@pytest.mark.parametrize(("gained", "lost", "total"), [(3, 7, 40), (0, 5, 20), (7, 5, 204), (20, 30, 500), (1, 1, 9)])
def test_the_largest_loss_is_where_the_score_statistic_is_that_of_the_level(gained: int, lost: int, total: int) -> None:
    """With the most likely share of losses under the hypothesis found by looking at all of them."""
    change = -most_lost(gained, lost, total)
    shares = np.linspace(-change, (1 - change) / 2, 400_002)[1:-1]  # of losses; that of gains is larger by the change
    others = total - gained - lost
    likelihood = lost * np.log(shares) + others * np.log(1 - change - 2 * shares)
    likelihood += gained * np.log(shares + change) if gained else 0.0
    share = shares[likelihood.argmax()]
    statistic = (gained - lost - total * change) / np.sqrt(total * (2 * share + change - change**2))
    assert change < 0 and statistic == pytest.approx(1.959964, abs=0.005)


def test_a_loss_that_gains_exceed_by_far_is_none() -> None:
    assert most_lost(100, 0, 200) == 0.0
    assert most_lost(0, 200, 200) == pytest.approx(1.0)


def test_holm_by_hand() -> None:
    # Sorted: .01 *4 = .04; .02 *3 = .06; .03 *2 = .06 (monotone: not below .06); .4 *1 = .4.
    adjusted = holm({"a": 0.03, "b": 0.4, "c": 0.01, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.4, "c": 0.04, "d": 0.06})


def test_holm_is_capped_monotone_and_rejects_as_the_step_down_procedure() -> None:
    assert holm({}) == {}
    assert holm({"a": 0.3, "b": 0.9}) == pytest.approx({"a": 0.6, "b": 0.9})
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    rng = np.random.default_rng(0)
    for _ in range(50):
        raw = {f"l{i}": float(p) for i, p in enumerate(rng.beta(0.3, 2.0, size=8))}
        adjusted = holm(raw)
        rejected: set[str] = set()
        for rank, name in enumerate(sorted(raw, key=raw.get)):  # Holm's own statement of the procedure
            if raw[name] > 0.05 / (len(raw) - rank):
                break
            rejected.add(name)
        assert {name for name in raw if adjusted[name] <= 0.05} == rejected
        order = sorted(raw, key=raw.get)
        assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))


def test_summary_by_hand() -> None:
    result = summary({"en": 0.9, "de": 0.7, "ta": 0.4, "sw": 0.4}, "en")
    assert result.average == pytest.approx(0.6)
    assert result.gap == pytest.approx(0.9 - 0.5)
    assert result.std == pytest.approx(np.std([0.9, 0.7, 0.4, 0.4]))
    assert (result.worst_language, result.worst_accuracy) == ("sw", 0.4)


def test_the_gap_needs_the_source_language_and_another() -> None:
    alone = summary({"en": 0.8}, "en")
    assert (alone.average, alone.gap, alone.std) == (0.8, None, 0.0)
    assert summary({"de": 0.8, "fr": 0.6}, "en").gap is None
    with pytest.raises(ValueError, match="no language"):
        summary({}, "en")


def bootstrap_by_definition(
    before: np.ndarray, after: np.ndarray, present: np.ndarray, source: int, num_resamples: int, seed: int
) -> list[tuple[float, float]]:
    """Resample by resample, with masked means, as a textbook writes it."""
    rng = np.random.default_rng(seed)
    averages, gaps = [], []
    for _ in range(num_resamples):
        rows = rng.integers(len(present), size=len(present))
        changes = np.array(
            [
                (after[rows, t][present[rows, t]].mean() - before[rows, t][present[rows, t]].mean())
                if present[rows, t].any()
                else np.nan
                for t in range(present.shape[1])
            ]
        )
        averages.append(np.nanmean(changes))
        gaps.append(changes[source] - np.nanmean(np.delete(changes, source)))
    return [tuple(np.nanpercentile(values, [2.5, 97.5])) for values in (averages, gaps)]


@pytest.mark.parametrize("source", [2, 3])
def test_bootstrap_equals_its_definition_with_missing_languages(source: int) -> None:
    rng = np.random.default_rng(1)
    before, after = rng.random((40, 5)) < 0.4, rng.random((40, 5)) < 0.6
    present = rng.random((40, 5)) < 0.7
    present[:, 3] = False
    present[7, 3] = True  # so rare that a third of the resamples miss it, as source language too
    got = paired_bootstrap(before, after, present, source, 400, np.random.default_rng(5))
    average, gap = bootstrap_by_definition(before, after, present, source, 400, seed=5)
    assert got.average == pytest.approx(average)
    assert got.gap == pytest.approx(gap)


def test_outcomes_of_absent_languages_do_not_count() -> None:
    rng = np.random.default_rng(2)
    before, after, present = rng.random((3, 60, 4)) < 0.5
    flipped = np.where(present, after, ~after)
    one = paired_bootstrap(before, after, present, 0, 100, np.random.default_rng(0))
    two = paired_bootstrap(before, flipped, present, 0, 100, np.random.default_rng(0))
    assert one == two


def test_bootstrap_is_seeded_and_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    before, after = rng.random((2, 50, 3)) < 0.5
    present = np.ones((50, 3), bool)
    whole = paired_bootstrap(before, after, present, 0, 300, np.random.default_rng(7))
    monkeypatch.setattr(statistics, "MAX_CELLS", 350)  # 7 resamples at once
    assert paired_bootstrap(before, after, present, 0, 300, np.random.default_rng(7)) == whole
    assert paired_bootstrap(before, after, present, 0, 300, np.random.default_rng(8)) != whole


def test_groups_are_resampled_whole() -> None:
    """Languages that copy each other carry one group's information, so more copies must not narrow the interval."""
    rng = np.random.default_rng(4)
    before, after = rng.random((2, 100, 1)) < 0.5

    def width(copies: int) -> float:
        repeated = [np.repeat(x, copies, axis=1) for x in (before, after, np.ones_like(before))]
        low, high = paired_bootstrap(*repeated, 0, 500, np.random.default_rng(0)).average
        return high - low

    assert width(10) == pytest.approx(width(1))


def test_bootstrap_interval_of_one_language_is_that_of_its_differences() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.random((150, 1)) < 0.5, rng.random((150, 1)) < 0.6
    got = paired_bootstrap(before, after, np.ones_like(before), 0, 4000, np.random.default_rng(0))
    difference = after[:, 0].astype(float) - before[:, 0]
    drawn = np.random.default_rng(1).choice(difference, size=(4000, len(difference)))
    assert got.average == pytest.approx(np.percentile(drawn.mean(axis=1), [2.5, 97.5]), abs=0.015)
    assert got.gap is None


def test_bootstrap_covers_the_true_change() -> None:
    """The 95 % intervals hold the true change in most of 200 experiments: neither always nor seldom."""
    rng = np.random.default_rng(6)
    probability_before, probability_after = np.array([0.8, 0.4, 0.3]), np.array([0.8, 0.6, 0.4])
    true_average = float((probability_after - probability_before).mean())
    true_gap = 0.0 - 0.15
    hits = np.zeros(2)
    for _ in range(200):
        difficulty = rng.random((120, 1))  # shared by the languages of a group and by both models
        before = 0.5 * difficulty + 0.5 * rng.random((120, 3)) < _threshold(probability_before)
        after = 0.5 * difficulty + 0.5 * rng.random((120, 3)) < _threshold(probability_after)
        result = paired_bootstrap(before, after, np.ones_like(before), 0, 300, rng)
        assert result.gap is not None
        hits += [result.average[0] <= true_average <= result.average[1], result.gap[0] <= true_gap <= result.gap[1]]
    assert (hits >= 180).all() and (hits < 200).all(), hits


def _threshold(probability: np.ndarray) -> np.ndarray:
    """Quantile of the sum of two uniforms on [0, 1/2] (a triangular distribution on [0, 1])."""
    return np.where(probability <= 0.5, np.sqrt(probability / 2), 1 - np.sqrt((1 - probability) / 2))


def test_the_memory_of_the_bootstrap_is_bounded() -> None:
    present = np.ones((20_000, 3), bool)
    tracemalloc.start()
    paired_bootstrap(present, ~present, present, 0, 200, np.random.default_rng(0))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 << 20  # all resamples at once would take 96 MB at least


def test_bootstrap_without_source_or_with_wrong_input() -> None:
    present = np.ones((6, 2), bool)
    result = paired_bootstrap(~present, present, present, None, 20, np.random.default_rng(0))
    assert result.average == (1.0, 1.0) and result.gap is None
    with pytest.raises(ValueError, match="at least one example"):
        paired_bootstrap(present, present, np.array([[True, False]] * 6), 0, 20, np.random.default_rng(0))
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(present, present[:3], present, 0, 20, np.random.default_rng(0))
