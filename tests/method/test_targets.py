"""Targets by hand, and that the loss in its closed form is the mean over all pairs of a teacher and a language."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from alsace_dist.data.rows import Candidates, EncodedRow
from alsace_dist.method.selection import score_weights
from alsace_dist.method.targets import MODES, learners, num_pairs, targets
from alsace_dist.models.batches import Inputs
from alsace_dist.stages.distill import example_of
from alsace_dist.training.losses import FrozenTargetLoss

Groups = list[dict[str, np.ndarray]]


def group(**probabilities: list[float]) -> dict[str, np.ndarray]:
    return {language: np.log(np.array(row)) for language, row in probabilities.items()}


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

    def forward(self, indices: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.weight[indices], dim=-1)


def inputs_of(indices: list[int], num_candidates: int) -> Inputs:
    """Rows of a micro-batch by their indices, in the place of token ids."""
    return Inputs(torch.tensor(indices), torch.ones(len(indices)), num_candidates=num_candidates)


def loss_of_training(groups: Groups, weights: Mapping[str, float], mode: str, micro_batch_size: int) -> Any:
    """Mean loss and its gradient as training makes them: rows of all groups, normalised weights, sum over size."""
    found = {str(index): targets(g, weights, mode) for index, g in enumerate(groups)}
    rows = [(str(index), language) for index, g in enumerate(groups) for language in sorted(g)]
    pairs = sum(target.weight for one in found.values() for target in one.values())
    examples = [
        example_of(EncodedRow(key, language, None, [], Candidates(()), 0, False), found[key], pairs / len(rows))
        for key, language in rows
    ]
    module = Logits(len(rows), 3)
    total = torch.zeros(())
    for start in range(0, len(rows), micro_batch_size):
        part = list(range(start, min(start + micro_batch_size, len(rows))))
        loss = FrozenTargetLoss(inputs_of(part, 3), [examples[index] for index in part], torch.device("cpu"))
        total = total + loss(module)["loss"]
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
    expected = sum(weight * kl for weight, kl in pairs) / sum(weight for weight, _ in pairs)
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
    assert targets(lone, EQUAL, "others") == {}
    assert sorted(targets(lone, EQUAL, "ensemble")) == ["a"]
    assert sorted(targets(TAUGHT_GROUPS[1], EQUAL, "others")) == ["c", "d"]
    for mode in ("others", "ensemble", "anchor"):
        assert targets(TAUGHT_GROUPS[3], EQUAL, mode) == {}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "labels"])
@pytest.mark.parametrize("weights", [{"a": 1.0}, EQUAL, UNEQUAL], ids=["one", "equal", "unequal"])
def test_pairs_and_learners_are_told_without_making_targets(weights: dict[str, float], mode: str) -> None:
    made = [targets(g, weights, mode) for g in TAUGHT_GROUPS]
    expected = sum(target.weight for one in made for target in one.values())
    assert num_pairs(Counter(map(tuple, TAUGHT_GROUPS)), weights, mode) == expected > 0
    assert learners("abcd", weights, mode) == sorted({language for one in made for language in one})


def test_targets_by_hand() -> None:
    rows = group(a=[0.5, 0.5], b=[0.9, 0.1], c=[0.2, 0.8])
    weights = {"a": 0.75, "b": 0.25}
    others = targets(rows, weights, "others")
    assert others["a"].probabilities == pytest.approx(np.array([0.9, 0.1]))
    assert others["c"].probabilities == pytest.approx(np.array([0.6, 0.4]))
    assert {language: target.weight for language, target in others.items()} == {"a": 1.0, "b": 1.0, "c": 2.0}
    mixed = 0.75 * math.log(2) + 0.25 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert others["c"].entropy == pytest.approx(mixed)
    ranked = targets(rows, weights, "ranked")  # a before b
    assert ranked.keys() == {"b", "c"}
    assert ranked["b"].probabilities == pytest.approx(np.array([0.5, 0.5]))
    assert {language: target.weight for language, target in ranked.items()} == {"b": 1.0, "c": 2.0}
    ensemble = targets(rows, weights, "ensemble")
    assert all(target.probabilities == pytest.approx(np.array([0.6, 0.4])) for target in ensemble.values())
    anchor = targets(rows, weights, "anchor")
    assert anchor["b"].probabilities == pytest.approx(np.array([0.9, 0.1]))
    assert anchor["c"].probabilities == pytest.approx(np.array([0.6, 0.4]))
    assert {target.weight for target in (*ensemble.values(), *anchor.values())} == {1.0}
    votes = targets(rows, weights, "votes")  # a tie of a and b against c, by summed probability
    assert all(target.probabilities.tolist() == [1.0, 0.0] for target in votes.values())
    assert {(target.weight, target.entropy) for target in votes.values()} == {(1.0, 0.0)}


def test_the_logarithmic_pool_by_hand() -> None:
    rows = group(a=[0.5, 0.5], b=[0.9, 0.1], c=[0.2, 0.8])
    pooled = targets(rows, {"a": 0.25, "b": 0.75}, "ensemble", log_pool_mass=2.0)
    product = np.array([0.5**0.5 * 0.9**1.5, 0.5**0.5 * 0.1**1.5])
    expected = product / product.sum()
    for target in pooled.values():
        assert target.probabilities == pytest.approx(expected)
        assert target.entropy == pytest.approx(-(expected * np.log(expected)).sum())
    others = targets(rows, {"a": 0.25, "b": 0.75}, "others", log_pool_mass=1.0)
    assert others["a"].probabilities == pytest.approx(np.array([0.9, 0.1]))  # of one teacher: its own distribution


@pytest.mark.filterwarnings("ignore:invalid value")
def test_teachers_whose_weights_vanish_beside_the_best_still_teach_where_it_is_missing() -> None:
    weights = score_weights({"a": 0.9, "b": 0.2, "c": 0.1}, "abc", beta=2000.0)
    for target in targets(group(b=[0.9, 0.1], c=[0.2, 0.8]), weights, "ensemble").values():
        assert np.isfinite(target.probabilities).all()


@pytest.mark.parametrize(
    ("mode", "masses"),
    [
        # b and c are there of a (0.5), b (0.3), c (0.2); b learns from itself, or of a and c from c alone.
        ("ensemble", {"b": 0.5, "c": 0.5, "d": 0.5}),
        ("anchor", {"b": 1.0, "c": 1.0, "d": 0.5}),
        ("others", {"b": 0.2 / 0.7, "c": 0.3 / 0.8, "d": 0.5 * 2}),  # d: of two pairs
        ("ranked", {"c": 0.3 / 0.8, "d": 0.5 * 2}),  # nobody is left to teach b
    ],
)
def test_by_presence_a_group_without_the_strong_teachers_counts_less(mode: str, masses: dict[str, float]) -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    rows = group(b=[0.7, 0.3], c=[0.4, 0.6], d=[0.5, 0.5])
    found = targets(rows, weights, mode, by_presence=True)
    assert {language: target.weight for language, target in found.items()} == pytest.approx(masses)
    whole = rows | group(a=[0.9, 0.1])
    assert targets(whole, weights, mode, by_presence=True).keys() == targets(whole, weights, mode).keys()
    for language, target in targets(whole, weights, mode, by_presence=True).items():
        assert target.weight == targets(whole, weights, mode)[language].weight
    for language, target in targets(rows, weights, mode).items():
        assert np.array_equal(target.probabilities, found[language].probabilities)
