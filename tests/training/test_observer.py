"""What a loss observes of its answers, against numbers made by hand."""

import numpy as np
import pytest
import torch
from training.test_live_teachers import CPU, GROUPS, LANGUAGES, FakeModel, P, Table, examples_of, rows_of

from alsace_dist.data.rows import Example
from alsace_dist.monitor.observed import ANSWERS, BY_LANGUAGE, TARGET_ANSWERS, VOTES, scalars
from alsace_dist.training.losses import FrozenTargetLoss
from alsace_dist.training.observer import Observer

TARGETS = {  # of the rows of both groups; the last teaches nothing
    ("g0", "en"): [0.6, 0.4, 0.0],
    ("g0", "de"): [0.0, 1.0, 0.0],
    ("g0", "sw"): [0.2, 0.2, 0.6],
    ("g1", "en"): [0.1, 0.8, 0.1],
    ("g1", "sw"): [0.0, 0.0, 0.0],
}


def entropy(values: list[float]) -> float:
    return -sum(value * np.log(value) for value in values if value > 0)


def frozen_sums(observer: Observer, places: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    rows = [row for group in GROUPS for row in rows_of(group) if (row.key, row.language) in places]
    examples = [
        Example(row, np.array(target := TARGETS[row.key, row.language], np.float32), float(sum(target) > 0), 0.0)
        for row in rows
    ]
    return FrozenTargetLoss(FakeModel().collate(rows), examples, CPU, observer)(Table())


@pytest.mark.parametrize("num_parts", [1, 2])
def test_frozen_targets_are_compared_language_by_language(num_parts: int) -> None:
    """As well if a batch is divided, as over micro-batches and ranks: all are sums."""
    observer, places = Observer(sorted(LANGUAGES), 3), list(P)
    parts = [frozen_sums(observer, places[start::num_parts]) for start in range(num_parts)]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    counted = [place for place in P if sum(TARGETS[place]) > 0]
    for number, language in enumerate(sorted(LANGUAGES)):
        own = [place for place in counted if place[1] == language]
        expected = [
            len(own),
            sum(
                sum(t * np.log(t / p) for t, p in zip(TARGETS[place], P[place], strict=True) if t > 0) for place in own
            ),
            sum(entropy(TARGETS[place]) for place in own),
            sum(entropy(P[place]) for place in own),
            sum(np.argmax(TARGETS[place]) == np.argmax(P[place]) for place in own),
        ]
        assert sums[BY_LANGUAGE][number].tolist() == pytest.approx(expected, abs=1e-5), language
        assert sums[ANSWERS][number].tolist() == [
            sum(int(np.argmax(P[place])) == answer for place in own) for answer in range(3)
        ]
        assert sums[TARGET_ANSWERS][number].tolist() == [
            sum(int(np.argmax(TARGETS[place])) == answer for place in own) for answer in range(3)
        ]
    found = scalars({name: value.numpy() for name, value in sums.items() if name != "loss"}, sorted(LANGUAGES))
    assert found["target_agreement"] == pytest.approx(3 / 4)
    assert (found["agreement_of/de"], found["agreement_of/en"], found["agreement_of/sw"]) == (0.0, 1.0, 1.0)
    assert "vote_agreement" not in found


def test_candidates_of_their_own_are_no_answers_to_count() -> None:
    sums = frozen_sums(Observer(sorted(LANGUAGES), 0), list(P))
    assert ANSWERS not in sums and BY_LANGUAGE in sums


def test_live_teachers_are_compared_with_the_vote_of_their_group() -> None:
    """g0: a, a, c, so a is the vote; g1: b, b. Of five rows four agree, sw in one of two."""
    examples = examples_of("others", "forward", False, 1.0)
    sums = examples.collate([rows_of(group) for group in GROUPS]).sums(Table())
    assert sums[VOTES].tolist() == [[1, 1], [2, 2], [2, 1]]  # de, en, sw
    pairs = sums[BY_LANGUAGE]
    # A pair counts by its weight: sw learns from en and de in g0, two pairs whose weights are as 3 to 1, and in g1 from
    # en alone, where it answers as en does.
    assert pairs[2, 4] / pairs[2, 0] == pytest.approx(1 / 3)
    kl = sum(
        weight * sum(p * np.log(p / q) for p, q in zip(P[key, teacher], P[key, "sw"], strict=True))
        for key, teacher, weight in (("g0", "en", 1.5), ("g0", "de", 0.5), ("g1", "en", 1.0))
    )
    assert pairs[2, 1] / pairs[2, 0] == pytest.approx(kl / 3, rel=1e-5)


def test_a_tie_of_votes_goes_to_the_more_probable_answer() -> None:
    log_probs = torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log()
    observer, ones = Observer(("de", "en"), 2), torch.ones(2)
    found = observer.votes(torch.tensor([0, 1]), torch.tensor([0, 0]), 1, ones, log_probs)
    assert found[VOTES].tolist() == [[1, 0], [1, 1]]
