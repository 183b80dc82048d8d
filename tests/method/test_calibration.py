"""Calibration: every language gets the mean prediction of the reference, and nothing else changes."""

import math

import numpy as np
import pytest

from alsace_dist.method.calibration import calibrate, marginal_biases
from alsace_dist.method.targets import targets

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


def mean_prediction(groups: Groups, language: str, wanted: str | None = None) -> np.ndarray:
    rows = [g[language] for g in groups if language in g and (wanted is None or wanted in g)]
    mean: np.ndarray = np.exp(np.stack(rows)).mean(axis=0)
    return mean


def test_calibrated_languages_predict_the_sources_marginal_where_both_are_there() -> None:
    groups = random_groups(60, 4)
    biases = marginal_biases(groups, "a")
    calibrated = [calibrate(g, biases) for g in groups]
    assert set(biases) == set("abcd")
    assert np.array_equal(biases["a"], np.zeros(4))
    for language in "bcd":
        aim = mean_prediction(groups, "a", wanted=language)
        assert np.abs(mean_prediction(groups, language, wanted="a") - aim).max() > 0.05  # there was something to mend
        assert mean_prediction(calibrated, language, wanted="a") == pytest.approx(aim, abs=1e-5)
        assert biases[language].mean() == pytest.approx(0, abs=1e-12)


def test_calibrated_languages_predict_the_pooled_marginal_of_their_groups() -> None:
    groups = random_groups(60, 4)
    biases = marginal_biases(groups, None)
    calibrated = [calibrate(g, biases) for g in groups]
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
    biases = marginal_biases(groups, "en")
    assert biases["xx"] == pytest.approx(np.array([-8.0, 4.0, 4.0]), abs=1e-2)
    for g in groups:
        assert np.exp(calibrate(g, biases)["xx"]) == pytest.approx(np.exp(g["en"]), abs=2e-3)


def test_calibrated_rows_are_normalised_and_others_are_left_alone() -> None:
    rows = group(a=[0.2, 0.8], b=[0.5, 0.5])
    calibrated = calibrate(rows, {"b": np.array([math.log(3), 0.0])})
    assert np.exp(calibrated["b"]) == pytest.approx(np.array([0.75, 0.25]))
    assert calibrated["a"] is rows["a"]


def test_a_language_that_shares_no_group_with_the_source_is_not_calibrated() -> None:
    groups = [group(a=[0.2, 0.8], b=[0.5, 0.5]), group(c=[0.5, 0.5], b=[0.3, 0.7])]
    assert sorted(marginal_biases(groups, "a")) == ["a", "b"]
    assert sorted(marginal_biases(groups, None)) == ["a", "b", "c"]


def test_different_numbers_of_candidates_have_no_common_bias() -> None:
    groups = [group(a=[0.2, 0.8]), group(a=[0.2, 0.3, 0.5])]
    with pytest.raises(ValueError, match=r"same candidates everywhere, found \[2, 3\]"):
        marginal_biases(groups, "a")


def test_calibrated_float32_scores_make_targets_that_are_distributions() -> None:
    groups = [{language: row.astype(np.float32) for language, row in g.items()} for g in random_groups(30, 5)]
    biases = marginal_biases(groups, "a")
    for g in groups:
        for target in targets(calibrate(g, biases), {"a": 0.5, "b": 0.5}, "others").values():
            assert target.probabilities.sum() == pytest.approx(1, abs=1e-6)
            assert target.probabilities.min() >= 0
