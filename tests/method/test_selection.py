"""Votes, scores, thresholds and weights, by hand."""

import math

import numpy as np
import pytest

from alsace_dist.method.selection import (
    Yardstick,
    best_first,
    language_scores,
    score_weights,
    softmax_scores,
    teachers_by_threshold,
    vote,
)


def group(**probabilities: list[float]) -> dict[str, np.ndarray]:
    return {language: np.log(np.array(row)) for language, row in probabilities.items()}


# --- votes ---------------------------------------------------------------------------------------------------------


def test_most_languages_win_against_larger_probabilities() -> None:
    rows = group(a=[0.51, 0.49], b=[0.51, 0.49], c=[0.01, 0.99])
    assert vote(rows) == 0
    assert vote(rows, soft=True) == 1  # sums 1.03 and 1.97
    many = {f"a{index}": [0.51, 0.49] for index in range(15)} | {f"b{index}": [0.01, 0.99] for index in range(14)}
    assert vote(group(**many)) == 0


def test_equal_counts_are_broken_by_summed_probability_among_the_tied_only() -> None:
    rows = group(a=[0.45, 0.15, 0.40], b=[0.15, 0.46, 0.39])  # sums 0.60, 0.61, 0.79
    assert vote(rows) == 1
    assert vote(rows, soft=True) == 2


def test_probabilities_are_summed_and_not_multiplied() -> None:
    rows = group(a=[0.90, 0.05, 0.05], b=[0.01, 0.50, 0.49])  # sums 0.91, 0.55, 0.54; products 0.009, 0.025, 0.025
    assert vote(rows) == vote(rows, soft=True) == 0


def test_a_full_tie_goes_to_the_first_candidate() -> None:
    assert vote(group(a=[0.25, 0.75], b=[0.75, 0.25])) == 0


def test_a_language_left_out_has_no_say() -> None:
    rows = group(a=[0.9, 0.1], b=[0.8, 0.2], c=[0.15, 0.85])
    assert vote(rows) == 0
    # Without a, b against c: 0.95 against 1.05; without b, a against c: 1.05 against 0.95; without c, a and b.
    assert language_scores([rows], Yardstick(leave_one_out=True)) == pytest.approx({"a": 0.1, "b": 0.8, "c": 0.15})


# --- scores --------------------------------------------------------------------------------------------------------

SCORED = [
    group(a=[0.9, 0.1], b=[0.6, 0.4], c=[0.3, 0.7]),  # vote 0
    group(a=[0.2, 0.8], b=[0.9, 0.1]),  # one each; sums 1.1 and 0.9: vote 0
    group(b=[0.4, 0.6], c=[0.2, 0.8]),  # vote 1
    group(a=[0.3, 0.7]),  # vote 1
]


def test_scores_are_mean_probabilities_of_the_vote_over_the_groups_that_have_the_language() -> None:
    assert language_scores(SCORED) == pytest.approx(
        {"a": (0.9 + 0.2 + 0.7) / 3, "b": (0.6 + 0.9 + 0.6) / 3, "c": (0.3 + 0.8) / 2}
    )


def test_agreement_is_the_share_of_groups_whose_best_answer_is_the_vote() -> None:
    assert language_scores(SCORED, Yardstick(agreement=True)) == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 1 / 2})


def test_leave_one_out_scores_against_the_others_and_skips_lone_languages() -> None:
    # Votes of the others. Group 1: a sees b, c: tie, sums 0.9, 1.1 -> 1; b sees a, c: 1.2, 0.8 -> 0; c sees 0.
    # Group 2: a sees 0, b sees 1. Group 3: b sees 1, c sees 1. Group 4 has no others.
    assert language_scores(SCORED, Yardstick(leave_one_out=True)) == pytest.approx(
        {"a": (0.1 + 0.2) / 2, "b": (0.6 + 0.1 + 0.6) / 3, "c": (0.3 + 0.8) / 2}
    )
    assert language_scores(SCORED, Yardstick(agreement=True, leave_one_out=True)) == pytest.approx(
        {"a": 0.0, "b": 2 / 3, "c": 1 / 2}
    )
    assert language_scores(SCORED[3:], Yardstick(leave_one_out=True)) == {}


def test_scores_against_soft_votes() -> None:
    rows = [group(a=[0.51, 0.49], b=[0.51, 0.49], c=[0.01, 0.99])]
    assert language_scores(rows) == pytest.approx({"a": 0.51, "b": 0.51, "c": 0.01})
    assert language_scores(rows, Yardstick(soft=True)) == pytest.approx({"a": 0.49, "b": 0.49, "c": 0.99})


def test_the_number_of_candidates_may_differ_from_group_to_group() -> None:
    rows = [group(a=[0.2, 0.3, 0.5], b=[0.1, 0.1, 0.8]), group(a=[0.6, 0.4], b=[0.7, 0.3])]
    assert language_scores(rows) == pytest.approx({"a": (0.5 + 0.6) / 2, "b": (0.8 + 0.7) / 2})


def test_scored_against_the_source_noise_of_the_others_does_not_matter() -> None:
    """Three languages that agree on wrong answers outvote the source, but not where the source is what counts."""
    wrong, right = np.log(np.array([0.1, 0.9])), np.log(np.array([0.8, 0.2]))
    groups = [{"en": right, "de": wrong, "fr": wrong, "ru": wrong}, {"de": wrong, "fr": wrong}]
    assert language_scores(groups)["de"] == pytest.approx(0.9)
    against_source = language_scores(groups, Yardstick(source_language="en"))
    assert against_source == pytest.approx({"de": 0.1, "en": 0.8, "fr": 0.1, "ru": 0.1})


# --- teachers and weights ------------------------------------------------------------------------------------------


def test_threshold_is_the_mean_of_the_normalised_scores() -> None:
    """exp(0.9), exp(0.6), exp(0.3) = 2.460, 1.822, 1.350: their mean 1.877 is above b, whose score is the mean."""
    scores = {"c": 0.3, "a": 0.9, "b": 0.6}
    total = math.exp(0.3) + math.exp(0.9) + math.exp(0.6)
    assert softmax_scores(scores) == pytest.approx({name: math.exp(s) / total for name, s in scores.items()})
    assert teachers_by_threshold(scores) == ["a"]
    assert teachers_by_threshold(scores | {"b": 0.66}) == ["a", "b"]  # exp(0.66) = 1.935, mean 1.915
    assert teachers_by_threshold(scores | {"b": 0.62}) == ["a"]  # exp(0.62) = 1.859, mean 1.889


@pytest.mark.parametrize("num_languages", [1, 2, 15, 20, 21, 47])
def test_equal_languages_all_teach(num_languages: int) -> None:
    names = [f"l{index:02d}" for index in range(num_languages)]
    for score in (0.1, 0.3, 1 / 3, 0.7):
        assert teachers_by_threshold(dict.fromkeys(reversed(names), score)) == names


def test_best_first_and_equal_ones_by_name() -> None:
    assert best_first({"z": 0.5, "b": 0.2, "a": 0.5, "c": 0.9}) == ["c", "a", "z", "b"]


def test_score_weights_are_exponential_and_add_up_to_one() -> None:
    weights = score_weights({"a": 0.8, "b": 0.7, "c": 0.1}, ["b", "a"], beta=12.0)
    assert list(weights) == ["b", "a"]
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["a"] / weights["b"] == pytest.approx(math.exp(12 * 0.1))
    assert score_weights({"a": 0.9, "b": 0.1}, ["a", "b"], beta=1e6) == {"a": 1.0, "b": 0.0}
