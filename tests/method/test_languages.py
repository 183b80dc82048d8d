"""The method's arithmetic: votes, scores and thresholds by hand; calibration; the closed form of the loss."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alsace_dist.method import languages
from alsace_dist.stages import train
from alsace_dist.tasks.base import EncodedText

Groups = list[dict[str, np.ndarray]]


def group(**probabilities: list[float]) -> dict[str, np.ndarray]:
    return {language: np.log(np.array(row)) for language, row in probabilities.items()}


def random_groups(num_groups: int, num_candidates: int, names: str = "abcd", seed: int = 0) -> Groups:
    """Rows of different sharpness and bias, each language missing from a third of the groups but never from all."""
    rng = np.random.default_rng(seed)
    biases = {language: 1.5 * rng.normal(size=num_candidates) for language in names}
    groups: Groups = []
    for index in range(num_groups):
        found = {}
        for number, language in enumerate(names):
            if (index + number) % 3 or index < 2:
                logits = (number + 1) * rng.normal(size=num_candidates) + biases[language]
                found[language] = logits - np.log(np.exp(logits).sum())
        groups.append(found)
    return groups


# --- votes ---------------------------------------------------------------------------------------------------------


def test_most_languages_win_against_larger_probabilities() -> None:
    rows = group(a=[0.51, 0.49], b=[0.51, 0.49], c=[0.01, 0.99])
    assert languages.vote(rows) == 0
    assert languages.vote(rows, soft=True) == 1  # sums 1.03 and 1.97
    many = {f"a{index}": [0.51, 0.49] for index in range(15)} | {f"b{index}": [0.01, 0.99] for index in range(14)}
    assert languages.vote(group(**many)) == 0


def test_equal_counts_are_broken_by_summed_probability_among_the_tied_only() -> None:
    rows = group(a=[0.45, 0.15, 0.40], b=[0.15, 0.46, 0.39])  # sums 0.60, 0.61, 0.79
    assert languages.vote(rows) == 1
    assert languages.vote(rows, soft=True) == 2


def test_probabilities_are_summed_and_not_multiplied() -> None:
    rows = group(a=[0.90, 0.05, 0.05], b=[0.01, 0.50, 0.49])  # sums 0.91, 0.55, 0.54; products 0.009, 0.025, 0.025
    assert languages.vote(rows) == languages.vote(rows, soft=True) == 0


def test_a_full_tie_goes_to_the_first_candidate() -> None:
    assert languages.vote(group(a=[0.25, 0.75], b=[0.75, 0.25])) == 0


def test_a_language_left_out_has_no_say() -> None:
    rows = group(a=[0.9, 0.1], b=[0.8, 0.2], c=[0.1, 0.9])
    assert languages.vote(rows) == 0
    assert languages.vote(rows, leave_out="a") == 1  # b against c: 0.9 against 1.1
    assert languages.vote(rows, leave_out="c") == 0
    assert languages.vote(rows, leave_out="zz") == 0


# --- scores --------------------------------------------------------------------------------------------------------

SCORED = [
    group(a=[0.9, 0.1], b=[0.6, 0.4], c=[0.3, 0.7]),  # vote 0
    group(a=[0.2, 0.8], b=[0.9, 0.1]),  # one each; sums 1.1 and 0.9: vote 0
    group(b=[0.4, 0.6], c=[0.2, 0.8]),  # vote 1
    group(a=[0.3, 0.7]),  # vote 1
]


def test_scores_are_mean_probabilities_of_the_vote_over_the_groups_that_have_the_language() -> None:
    assert languages.language_scores(SCORED) == pytest.approx(
        {"a": (0.9 + 0.2 + 0.7) / 3, "b": (0.6 + 0.9 + 0.6) / 3, "c": (0.3 + 0.8) / 2}
    )


def test_agreement_is_the_share_of_groups_whose_best_answer_is_the_vote() -> None:
    assert languages.language_scores(SCORED, agreement=True) == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 1 / 2})


def test_leave_one_out_scores_against_the_others_and_skips_lone_languages() -> None:
    # Votes of the others. Group 1: a sees b, c: tie, sums 0.9, 1.1 -> 1; b sees a, c: 1.2, 0.8 -> 0; c sees 0.
    # Group 2: a sees 0, b sees 1. Group 3: b sees 1, c sees 1. Group 4 has no others.
    assert languages.language_scores(SCORED, leave_one_out=True) == pytest.approx(
        {"a": (0.1 + 0.2) / 2, "b": (0.6 + 0.1 + 0.6) / 3, "c": (0.3 + 0.8) / 2}
    )
    assert languages.language_scores(SCORED, agreement=True, leave_one_out=True) == pytest.approx(
        {"a": 0.0, "b": 2 / 3, "c": 1 / 2}
    )
    assert languages.language_scores(SCORED[3:], leave_one_out=True) == {}


def test_scores_against_soft_votes() -> None:
    rows = [group(a=[0.51, 0.49], b=[0.51, 0.49], c=[0.01, 0.99])]
    assert languages.language_scores(rows) == pytest.approx({"a": 0.51, "b": 0.51, "c": 0.01})
    assert languages.language_scores(rows, soft=True) == pytest.approx({"a": 0.49, "b": 0.49, "c": 0.99})


def test_the_number_of_candidates_may_differ_from_group_to_group() -> None:
    rows = [group(a=[0.2, 0.3, 0.5], b=[0.1, 0.1, 0.8]), group(a=[0.6, 0.4], b=[0.7, 0.3])]
    assert languages.language_scores(rows) == pytest.approx({"a": (0.5 + 0.6) / 2, "b": (0.8 + 0.7) / 2})


# --- teachers and weights ------------------------------------------------------------------------------------------


def test_threshold_is_the_mean_of_the_normalised_scores() -> None:
    """exp(0.9), exp(0.6), exp(0.3) = 2.460, 1.822, 1.350: their mean 1.877 is above b, whose score is the mean."""
    scores = {"c": 0.3, "a": 0.9, "b": 0.6}
    total = math.exp(0.3) + math.exp(0.9) + math.exp(0.6)
    assert languages.softmax_scores(scores) == pytest.approx({name: math.exp(s) / total for name, s in scores.items()})
    assert languages.teachers_by_threshold(scores) == ["a"]
    assert languages.teachers_by_threshold(scores | {"b": 0.66}) == ["a", "b"]  # exp(0.66) = 1.935, mean 1.915
    assert languages.teachers_by_threshold(scores | {"b": 0.62}) == ["a"]  # exp(0.62) = 1.859, mean 1.889


@pytest.mark.parametrize("num_languages", [1, 2, 15, 20, 21, 47])
def test_equal_languages_all_teach(num_languages: int) -> None:
    names = [f"l{index:02d}" for index in range(num_languages)]
    for score in (0.1, 0.3, 1 / 3, 0.7):
        assert languages.teachers_by_threshold(dict.fromkeys(reversed(names), score)) == names


def test_best_first_and_equal_ones_by_name() -> None:
    assert languages.best_first({"z": 0.5, "b": 0.2, "a": 0.5, "c": 0.9}) == ["c", "a", "z", "b"]


def test_score_weights_are_exponential_and_add_up_to_one() -> None:
    weights = languages.score_weights({"a": 0.8, "b": 0.7, "c": 0.1}, ["b", "a"], beta=12.0)
    assert list(weights) == ["b", "a"]
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["a"] / weights["b"] == pytest.approx(math.exp(12 * 0.1))
    assert languages.score_weights({"a": 0.9, "b": 0.1}, ["a", "b"], beta=1e6) == {"a": 1.0, "b": 0.0}


# --- calibration ---------------------------------------------------------------------------------------------------


def mean_prediction(groups: Groups, language: str, wanted: str | None = None) -> np.ndarray:
    rows = [g[language] for g in groups if language in g and (wanted is None or wanted in g)]
    mean: np.ndarray = np.exp(np.stack(rows)).mean(axis=0)
    return mean


def test_calibrated_languages_predict_the_sources_marginal_where_both_are_there() -> None:
    groups = random_groups(60, 4)
    biases = languages.marginal_biases(groups, "a")
    calibrated = [languages.calibrate(g, biases) for g in groups]
    assert set(biases) == set("abcd")
    assert np.array_equal(biases["a"], np.zeros(4))
    for language in "bcd":
        aim = mean_prediction(groups, "a", wanted=language)
        assert np.abs(mean_prediction(groups, language, wanted="a") - aim).max() > 0.05  # there was something to mend
        assert mean_prediction(calibrated, language, wanted="a") == pytest.approx(aim, abs=1e-5)
        assert biases[language].mean() == pytest.approx(0, abs=1e-12)


def test_calibrated_languages_predict_the_pooled_marginal_of_their_groups() -> None:
    groups = random_groups(60, 4)
    biases = languages.marginal_biases(groups, None)
    calibrated = [languages.calibrate(g, biases) for g in groups]
    for language in "abcd":
        own = [g for g in groups if language in g]
        aim = np.mean([np.exp(np.stack(list(g.values()))).mean(axis=0) for g in own], axis=0)
        assert np.abs(mean_prediction(groups, language) - aim).max() > 0.02
        assert mean_prediction(calibrated, language) == pytest.approx(aim, abs=1e-5)


def test_a_language_that_always_gives_one_answer_is_mended() -> None:
    """Its answers are in the right order behind a bias that hides it; float32 rows, as in score files."""
    rng = np.random.default_rng(1)
    good = rng.normal(size=(200, 3))
    groups = []
    for row in good:
        stuck = row + np.array([12.0, 0.0, 0.0])
        both = {"en": row - np.log(np.exp(row).sum()), "xx": stuck - np.log(np.exp(stuck).sum())}
        groups.append({language: values.astype(np.float32) for language, values in both.items()})
    assert {int(np.argmax(g["xx"])) for g in groups} == {0}
    biases = languages.marginal_biases(groups, "en")
    assert biases["xx"] == pytest.approx(np.array([-8.0, 4.0, 4.0]), abs=1e-2)
    for g in groups:
        assert np.exp(languages.calibrate(g, biases)["xx"]) == pytest.approx(np.exp(g["en"]), abs=2e-3)


def test_calibrated_rows_are_normalised_and_others_are_left_alone() -> None:
    rows = group(a=[0.2, 0.8], b=[0.5, 0.5])
    calibrated = languages.calibrate(rows, {"b": np.array([math.log(3), 0.0])})
    assert np.exp(calibrated["b"]) == pytest.approx(np.array([0.75, 0.25]))
    assert calibrated["a"] is rows["a"]


def test_a_language_that_shares_no_group_with_the_source_is_not_calibrated() -> None:
    groups = [group(a=[0.2, 0.8], b=[0.5, 0.5]), group(c=[0.5, 0.5], b=[0.3, 0.7])]
    assert sorted(languages.marginal_biases(groups, "a")) == ["a", "b"]
    assert sorted(languages.marginal_biases(groups, None)) == ["a", "b", "c"]


def test_different_numbers_of_candidates_have_no_common_bias() -> None:
    groups = [group(a=[0.2, 0.8]), group(a=[0.2, 0.3, 0.5])]
    with pytest.raises(ValueError, match=r"same candidates everywhere, found \[2, 3\]"):
        languages.marginal_biases(groups, "a")


# --- the loss of frozen teachers -----------------------------------------------------------------------------------

# Teachers: everywhere, in some groups, in none of the groups; group 4 has no teacher, group 5 only one.
TAUGHT_GROUPS = [
    group(a=[0.7, 0.2, 0.1], b=[0.2, 0.5, 0.3], c=[0.3, 0.3, 0.4], d=[0.1, 0.1, 0.8]),
    group(a=[0.1, 0.8, 0.1], c=[0.6, 0.2, 0.2], d=[0.3, 0.4, 0.3]),
    group(b=[0.3, 0.1, 0.6], d=[0.9, 0.05, 0.05]),
    group(c=[0.4, 0.4, 0.2], d=[0.2, 0.2, 0.6]),
    group(a=[0.5, 0.25, 0.25]),
]
EQUAL = {"a": 1 / 3, "b": 1 / 3, "zz": 1 / 3}
UNEQUAL = {"a": 0.6, "b": 0.3, "zz": 0.1}


class Logits(torch.nn.Module):
    """A model whose answers to the rows of all groups are free parameters."""

    def __init__(self, num_rows: int, num_candidates: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(num_rows, num_candidates))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.weight[indices], dim=-1)


class Indices:
    """Rows of a micro-batch, in the place of token ids."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def to(self, device: Any) -> tuple[torch.Tensor]:
        return (torch.tensor(self.indices),)


def loss_of_training(groups: Groups, weights: Mapping[str, float], mode: str, micro_batch_size: int) -> Any:
    """Mean loss and its gradient as training makes them: rows of all groups, normalised weights, sum over size."""
    found = {str(index): languages.targets(g, weights, mode) for index, g in enumerate(groups)}
    rows = [(str(index), language) for index, g in enumerate(groups) for language in sorted(g)]
    num_pairs = sum(target.weight for targets in found.values() for target in targets.values())
    examples = [
        train._distill_example(
            EncodedText(key, language, None, [], 0, False), found, num_pairs / len(rows), Path("scores")
        )
        for key, language in rows
    ]
    module = Logits(len(rows), 3)
    total = torch.zeros(())
    for start in range(0, len(rows), micro_batch_size):
        part = list(range(start, min(start + micro_batch_size, len(rows))))
        loss = train.AnswerLoss(Indices(part), [examples[index] for index in part], 3, torch.device("cpu"))
        total = total + loss(module)
    mean = total / len(rows)
    mean.backward()
    return rows, module, mean.item(), module.weight.grad


def divergence(teacher: np.ndarray, log_q: torch.Tensor) -> torch.Tensor:
    p = torch.from_numpy(np.exp(teacher))
    return (p * (p.log() - log_q)).sum()


def check_against(
    pairs: list[tuple[float, torch.Tensor]], module: Logits, value: float, gradient: torch.Tensor
) -> None:
    """``pairs``: (weight, KL). Their weighted mean must have this value and gradient."""
    expected = sum(weight * kl for weight, kl in pairs) / sum(weight for weight, _ in pairs)  # type: ignore[operator]
    assert isinstance(expected, torch.Tensor)
    (expected_gradient,) = torch.autograd.grad(expected, module.weight)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert value > 0.1 and gradient.abs().max() > 0.01


@pytest.mark.parametrize("micro_batch_size", [100, 3])
def test_closed_form_equals_the_mean_over_all_pairs(micro_batch_size: int) -> None:
    rows, module, value, gradient = loss_of_training(TAUGHT_GROUPS, EQUAL, "others", micro_batch_size)
    log_q = dict(zip(rows, torch.log_softmax(module.weight.double(), dim=-1), strict=True))
    pairs = [
        (1.0, divergence(g[teacher], log_q[str(index), other]))
        for index, g in enumerate(TAUGHT_GROUPS)
        for teacher in EQUAL
        for other in g
        if teacher in g and other != teacher
    ]
    assert len(pairs) == 6 + 2 + 1
    check_against(pairs, module, value, gradient)


def test_with_weights_a_pair_counts_by_the_teachers_share_of_its_group() -> None:
    rows, module, value, gradient = loss_of_training(TAUGHT_GROUPS, UNEQUAL, "others", 100)
    log_q = dict(zip(rows, torch.log_softmax(module.weight.double(), dim=-1), strict=True))
    pairs = []
    for index, g in enumerate(TAUGHT_GROUPS):
        for other in g:
            teachers = [teacher for teacher in UNEQUAL if teacher in g and teacher != other]
            share = sum(UNEQUAL[teacher] for teacher in teachers)
            for teacher in teachers:
                kl = divergence(g[teacher], log_q[str(index), other])
                pairs.append((len(teachers) * UNEQUAL[teacher] / share, kl))
    check_against(pairs, module, value, gradient)


@pytest.mark.parametrize("mode", ["ensemble", "anchor"])
def test_every_language_counts_once_and_learns_from_the_weighted_teachers(mode: str) -> None:
    """A teacher learns from the ensemble with itself in it, or, anchored, from itself alone."""
    rows, module, value, gradient = loss_of_training(TAUGHT_GROUPS, UNEQUAL, mode, 100)
    log_q = dict(zip(rows, torch.log_softmax(module.weight.double(), dim=-1), strict=True))
    pairs = []
    for index, g in enumerate(TAUGHT_GROUPS):
        present = [teacher for teacher in UNEQUAL if teacher in g]
        for other in g:
            teachers = [other] if mode == "anchor" and other in present else present
            share = sum(UNEQUAL[teacher] for teacher in teachers)
            for teacher in teachers:
                pairs.append((UNEQUAL[teacher] / share, divergence(g[teacher], log_q[str(index), other])))
    assert sum(weight for weight, _ in pairs) == pytest.approx(4 + 3 + 2 + 1)
    check_against(pairs, module, value, gradient)


def test_nobody_teaches_the_only_teacher_of_a_group_unless_it_may_teach_itself() -> None:
    lone = TAUGHT_GROUPS[4]
    assert languages.targets(lone, EQUAL, "others") == {}
    assert sorted(languages.targets(lone, EQUAL, "ensemble")) == ["a"]
    assert sorted(languages.targets(TAUGHT_GROUPS[1], EQUAL, "others")) == ["c", "d"]
    for mode in ("others", "ensemble", "anchor"):
        assert languages.targets(TAUGHT_GROUPS[3], EQUAL, mode) == {}


def test_targets_by_hand() -> None:
    rows = group(a=[0.5, 0.5], b=[0.9, 0.1], c=[0.2, 0.8])
    weights = {"a": 0.75, "b": 0.25}
    others = languages.targets(rows, weights, "others")
    assert others["a"].probabilities == pytest.approx(np.array([0.9, 0.1]))
    assert others["c"].probabilities == pytest.approx(np.array([0.6, 0.4]))
    assert {language: target.weight for language, target in others.items()} == {"a": 1.0, "b": 1.0, "c": 2.0}
    mixed = 0.75 * math.log(2) + 0.25 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert others["c"].entropy == pytest.approx(mixed)
    ensemble = languages.targets(rows, weights, "ensemble")
    assert all(target.probabilities == pytest.approx(np.array([0.6, 0.4])) for target in ensemble.values())
    anchor = languages.targets(rows, weights, "anchor")
    assert anchor["b"].probabilities == pytest.approx(np.array([0.9, 0.1]))
    assert anchor["c"].probabilities == pytest.approx(np.array([0.6, 0.4]))
    assert {target.weight for target in (*ensemble.values(), *anchor.values())} == {1.0}


def test_calibrated_float32_scores_make_targets_that_are_distributions() -> None:
    groups = [{language: row.astype(np.float32) for language, row in g.items()} for g in random_groups(30, 5)]
    biases = languages.marginal_biases(groups, "a")
    for g in groups:
        for target in languages.targets(languages.calibrate(g, biases), {"a": 0.5, "b": 0.5}, "others").values():
            assert target.probabilities.sum() == pytest.approx(1, abs=1e-6)
            assert target.probabilities.min() >= 0


@pytest.mark.filterwarnings("ignore:invalid value")
def test_teachers_whose_weights_vanish_beside_the_best_still_teach_where_it_is_missing() -> None:
    weights = languages.score_weights({"a": 0.9, "b": 0.2, "c": 0.1}, "abc", beta=2000.0)
    for target in languages.targets(group(b=[0.9, 0.1], c=[0.2, 0.8]), weights, "ensemble").values():
        assert np.isfinite(target.probabilities).all()


def test_scored_against_the_source_noise_of_the_others_does_not_matter() -> None:
    """Three languages that agree on wrong answers outvote the source, but not where the source is what counts."""
    wrong, right = np.log(np.array([0.1, 0.9])), np.log(np.array([0.8, 0.2]))
    groups = [{"en": right, "de": wrong, "fr": wrong, "ru": wrong}, {"de": wrong, "fr": wrong}]
    assert languages.language_scores(groups)["de"] == pytest.approx(0.9)
    against_source = languages.language_scores(groups, source="en")
    assert against_source == pytest.approx({"de": 0.1, "en": 0.8, "fr": 0.1, "ru": 0.1})
