"""Live teachers: by hand on three languages, against frozen ones where the two agree, and through real training."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from alsace_dist.config import NO_TEACHERS
from alsace_dist.config_file import load_config
from alsace_dist.data.rows import Answers, Candidates, EncodedRow
from alsace_dist.errors import UserError
from alsace_dist.files.reader import ShardReader
from alsace_dist.files.shards import Dataset
from alsace_dist.method.targets import MODES, num_pairs, targets
from alsace_dist.models.batches import Inputs
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.stages.distill import example_of
from alsace_dist.training.examples import GroupExamples
from alsace_dist.training.losses import Divergence, FrozenTargetLoss
from alsace_dist.training.tokens import Tokens

CPU = torch.device("cpu")
LANGUAGES = ("en", "de", "sw")
# log P(candidate) of three languages in two groups; the second lacks de.
P = {
    ("g0", "en"): [0.7, 0.2, 0.1],
    ("g0", "de"): [0.5, 0.3, 0.2],
    ("g0", "sw"): [0.2, 0.2, 0.6],
    ("g1", "en"): [0.1, 0.8, 0.1],
    ("g1", "sw"): [0.3, 0.4, 0.3],
}
GROUPS = [[place for place in P if place[0] == key] for key in ("g0", "g1")]
WEIGHTS = {"en": 0.75, "de": 0.25}  # en ranks first


class Table(torch.nn.Module):
    """A model whose log-probabilities are free parameters, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(list(P.values())).log())

    def forward(self, indices: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.weight[indices], dim=-1)


class FakeModel:
    """Stands in for a family where no token is looked at: a row's only token is its number."""

    answers = Answers({}, (), "", 1, labels=("a", "b", "c"))

    def collate(self, rows: list[EncodedRow]) -> Inputs:
        numbers = torch.tensor([row.input_ids[0] for row in rows])
        return Inputs(numbers, torch.ones(len(rows), 1), num_candidates=3)


def rows_of(group: list[tuple[str, str]]) -> list[EncodedRow]:
    numbers = {place: number for number, place in enumerate(P)}
    return [EncodedRow(key, name, None, [numbers[key, name]], Candidates(()), 0, False) for key, name in group]


def examples_of(mode: str, kind: str, through: bool, temperature: float, biases: Any = None) -> GroupExamples:
    pairs = num_pairs(Counter(tuple(name for _, name in group) for group in GROUPS), WEIGHTS, mode)
    dataset = Dataset("nowhere", (), LANGUAGES, ("a", "b", "c"), "", ShardReader("nowhere"))
    divergence = Divergence(kind, through, temperature)
    fake: Any = FakeModel()
    return GroupExamples(
        Tokens(dataset, None, LANGUAGES, fake),  # type: ignore[arg-type]
        [2],
        WEIGHTS,
        biases or {},
        mode,
        pairs / len(GROUPS),
        divergence,
        fake,
        CPU,
    )


def loss_of(examples: GroupExamples, parts: list[list[list[tuple[str, str]]]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient as training makes them: sums of micro-batches, divided by the number of groups."""
    module = Table()
    total = torch.zeros(())
    for part in parts:
        total = total + examples.collate([rows_of(group) for group in part]).sums(module)["loss"]
    (total / len(GROUPS)).backward()
    assert module.weight.grad is not None
    return (total / len(GROUPS)).item(), module.weight.grad


def by_hand(kind: str, through: bool, temperature: float, mode: str) -> tuple[float, torch.Tensor]:
    """The mean over pairs, one pair after the other, in float64."""
    module = Table().double()
    log = {place: torch.log_softmax(module.weight[number] / temperature, -1) for number, place in enumerate(P)}
    ranking = list(WEIGHTS)
    values = []
    for (key, learner), log_q in log.items():
        for teacher in ranking:
            if teacher == learner or (key, teacher) not in log:
                continue
            if mode == "ranked" and learner in ranking and ranking.index(teacher) > ranking.index(learner):
                continue
            log_p = log[key, teacher] if through else log[key, teacher].detach()
            forward, reverse = (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
            middle = ((log_p.exp() + log_q.exp()) / 2).log()
            jensen = ((log_p.exp() * (log_p - middle)).sum() + (log_q.exp() * (log_q - middle)).sum()) / 2
            share = {"en": 0.75, "de": 0.25}[teacher]
            both = learner == "sw" and key == "g0"  # two teachers, which count by their weights, twice in all
            values.append((2 * share if both else 1.0, {"forward": forward, "reverse": reverse}.get(kind, jensen)))
    mean = temperature**2 * sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
    assert isinstance(mean, torch.Tensor)
    mean.backward()
    assert module.weight.grad is not None
    return mean.item(), module.weight.grad


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("through", [False, True], ids=["stopped", "through"])
@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "others"), (2.0, "others"), (1.0, "ranked")])
def test_value_and_gradient_by_hand(kind: str, through: bool, temperature: float, mode: str) -> None:
    value, gradient = loss_of(examples_of(mode, kind, through, temperature), [GROUPS])
    expected, expected_gradient = by_hand(kind, through, temperature, mode)
    assert value == pytest.approx(expected, rel=1e-5) and value > 0.05
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[0].abs().max() > 1e-3) == (through or mode == "others")  # en, the best teacher, of g0


def test_two_numbers_on_paper() -> None:
    """en teaches sw in g1: KL of (.1, .8, .1) from (.3, .4, .3) is .8 ln 2 - .2 ln 3."""
    examples = examples_of("ranked", "forward", False, 1.0)
    sums = examples.collate([rows_of(GROUPS[1])]).sums(Table())
    on_paper = 0.8 * math.log(2) - 0.2 * math.log(3)
    assert sums["loss"].item() * examples.mean_pairs == pytest.approx(on_paper, rel=1e-5)
    reverse = examples_of("ranked", "reverse", False, 1.0).collate([rows_of(GROUPS[1])]).sums(Table())
    assert reverse["loss"].item() * examples.mean_pairs == pytest.approx(
        0.6 * math.log(3) - 0.4 * math.log(2), rel=1e-5
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in NO_TEACHERS])
def test_before_the_first_step_live_teachers_pull_as_frozen_ones_do(mode: str) -> None:
    """Frozen teachers said what the weights say now, and biases are added on both sides alike."""
    bias = {"de": np.array([0.4, -0.1, -0.3])}
    _, live = loss_of(examples_of(mode, "forward", False, 1.0, bias), [GROUPS])
    found, module = {}, Table()
    for group in GROUPS:
        scores = {name: np.log(np.array(P[key, name])) for key, name in group}
        if "de" in scores:
            shifted = scores["de"] + bias["de"]
            scores["de"] = shifted - np.log(np.exp(shifted).sum())
        found[group[0][0]] = targets(scores, WEIGHTS, mode)
    rows = [row for group in GROUPS for row in rows_of(group)]
    weight = num_pairs(Counter(tuple(name for _, name in group) for group in GROUPS), WEIGHTS, mode) / len(rows)
    frozen = [example_of(row, found[row.key], weight) for row in rows]
    fake: Any = FakeModel()
    (FrozenTargetLoss(fake.collate(rows), frozen, CPU)(module)["loss"] / len(rows)).backward()
    assert module.weight.grad is not None
    torch.testing.assert_close(live, module.weight.grad, rtol=1e-4, atol=1e-6)


def test_how_groups_are_split_into_micro_batches_does_not_matter() -> None:
    examples = examples_of("ensemble", "symmetric", True, 1.5)
    whole, parts = loss_of(examples, [GROUPS]), loss_of(examples, [[GROUPS[1]], [GROUPS[0]]])
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-5, atol=1e-7)


def test_candidates_that_a_row_lacks_leave_value_and_gradient_finite() -> None:
    class Lacking(Table):
        def forward(self, indices: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            lacks = torch.tensor([False, False, True])
            return torch.log_softmax(self.weight[indices].masked_fill(lacks, -torch.inf), dim=-1)

    for kind in ("forward", "reverse", "symmetric"):
        module = Lacking()
        loss = examples_of("others", kind, True, 2.0).collate([rows_of(GROUPS[0])]).sums(module)["loss"]
        loss.backward()
        assert module.weight.grad is not None
        assert loss.item() > 0 and bool(torch.isfinite(module.weight.grad).all())


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"temperature": 2.0}, "temperature: 2.0 is only for teachers: live"),
        ({"divergence": "reverse"}, "divergence: reverse is only for teachers: live"),
        ({"teacher_gradient": True}, "teacher_gradient: True is only for teachers: live"),
    ],
)
def test_what_frozen_teachers_would_ignore_is_refused(world: Path, tmp_path: Path, distill: Any, said: str) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, distill=distill))
    with pytest.raises(UserError, match=said):
        load_config(path)
    load_config(path, {"distill.teachers": "live"})


# --- real training -------------------------------------------------------------------------------------------------


def distilled(world: Path, directory: Path, **engine: Any) -> list[float]:
    """Losses of what the authors' code does, on real ranks."""
    value = tiny.make_config(world, run_dir=str(directory / "run"), engine=engine, finetune=None, method="authors")
    value["select"] = {"teachers": ["en", "fr"]}
    value["data"] = {"directory": str(world / "run/data"), "source_language": "en"}
    path = tiny.write_config(directory / "c.yaml", value)
    tiny.do("score", path)
    tiny.alsace("select", str(path))
    tiny.do("distill", path, 1)
    manifest = json.loads((directory / "run/round1/distill/manifest.json").read_text())
    assert manifest["details"]["num_steps"] == 12
    return [row["loss"] for row in read_scalars(directory / "run/round1/distill/metrics.jsonl") if "loss" in row]


def test_the_authors_way_trains_alike_whatever_the_zero_stage_and_number_of_ranks(world: Path, tmp_path: Path) -> None:
    one = distilled(world, tmp_path / "one", num_processes=2, zero_stage=0)
    assert len(one) == 12 and one[-1] < one[0]
    for name, engine in {"two": {"num_processes": 2, "zero_stage": 3}, "three": {"num_processes": 3}}.items():
        assert distilled(world, tmp_path / name, **engine) == pytest.approx(one, rel=2e-4)
