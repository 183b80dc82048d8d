"""What is logged of a training on two ranks that have unequal work: every sum, and who keeps the others waiting."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from training import test_engine

from alsace_dist.config import DistillConfig
from alsace_dist.config_file import load_config
from alsace_dist.data.rows import Row, answers_of
from alsace_dist.errors import heard_by
from alsace_dist.models.family import open_model
from alsace_dist.monitor.sinks import METRICS, Places, read_scalars
from alsace_dist.monitor.training import PHASES, TrainingMonitor
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.examples import GroupExamples
from alsace_dist.training.losses import Divergence, FrozenTargetLoss
from alsace_dist.training.observer import Observer

NUM_STEPS, SLOW_SECONDS, LATE_SECONDS = 6, 0.3, 0.2


def watched(group: Ranks, world: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Some steps of ten examples, of which rank 0 has seven, while rank 1 is slow, without any learning; what people
    are warned of, and what the model answers."""
    trained, model = test_engine.load(group, world, "mt5", settings)
    section = DistillConfig(num_steps=NUM_STEPS, global_batch_size=10, log_every_steps=2, max_gradient_norm=1e-9)
    every = test_engine.examples(model)
    mine = every[:7] if group.rank == 0 else every[7:]
    loss = FrozenTargetLoss(model.collate([one.row for one in mine]), mine, group.device, Observer(("en",), 3))

    def slow(module: nn.Module) -> dict[str, torch.Tensor]:
        time.sleep(SLOW_SECONDS if group.rank == 1 else 0.0)
        return loss(module)

    heard: list[str] = []
    places = Places(Path(out), Path(out) / "board")
    monitor = TrainingMonitor("distill", places, section, range(NUM_STEPS), group, trained, ("en",))
    tokens = sum(len(one.row.input_ids) for one in mine)
    with heard_by(heard.append), monitor:
        for step in range(NUM_STEPS):
            sums = trained.step([slow], 0.0)
            monitor.step(step + 1, sums, (tokens, tokens), 0.0)
    log_probs = trained.engine.module(*model.collate([one.row for one in every]).to(group.device)).detach().numpy()
    return {"heard": heard, "tokens": tokens, "answers": log_probs.argmax(-1).tolist(), "log_probs": log_probs.tolist()}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_sums_over_unequal_ranks_are_right_and_the_straggler_is_named(world: Path, tmp_path: Path, stage: int) -> None:
    settings = {"zero_stage": stage, "dtype": "fp32"}
    found = tiny.run_ranks(watched, 2, world=str(world), out=str(tmp_path), settings=settings)
    (text,) = found[0]["heard"]
    assert text.startswith("distill: step 6: rank 1 on ") and "all wait for it" in text
    assert found[1]["heard"] == []
    rows = read_scalars(tmp_path / METRICS)
    assert [row["step"] for row in rows] == [2, 4, 6]
    config = load_config(tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world)))
    examples = test_engine.examples(open_model(world / "model", answers_of(config.task, ["en"])))
    targets = np.stack([one.target for one in examples]).astype(np.float64)
    log_probs = np.array(found[0]["log_probs"])
    cross = -(targets * log_probs).sum(axis=1)
    entropy = -(targets * np.log(targets)).sum(axis=1)
    weights = np.array([one.weight for one in examples])
    given = np.array([one.entropy for one in examples])
    for row in rows:
        assert row["loss"] == pytest.approx((weights * (cross - given)).sum() / 10, rel=1e-4)
        assert row["divergence"] == row["divergence_of/en"] == pytest.approx((cross - entropy).mean(), rel=1e-4)
        assert row["target_entropy"] == pytest.approx(entropy.mean(), rel=1e-4)
        assert row["model_entropy"] == pytest.approx(-(np.exp(log_probs) * log_probs).sum(axis=1).mean(), rel=1e-4)
        assert row["target_agreement"] == pytest.approx(np.mean(log_probs.argmax(1) == targets.argmax(1)))
        assert row.get("clipped_share") == (1.0 if stage else None)  # DeepSpeed reports no norm at stage 0
        assert row["skipped_steps"] == 0
        assert row["tokens_per_second"] == pytest.approx(
            (found[0]["tokens"] + found[1]["tokens"]) / row["step_seconds"], rel=1e-3
        )
        assert row["sequences_per_second"] == pytest.approx(10 / row["step_seconds"], rel=1e-3)
        assert row["forward_seconds_most"] > SLOW_SECONDS > row["forward_seconds_least"]
        # The fast rank waits for the slow one in the first collective that comes, and the mean is over both.
        assert row["communication_seconds"] > SLOW_SECONDS * 0.4
        assert row["backward_seconds"] + row["optimizer_seconds"] < SLOW_SECONDS * 0.4
        # At the start one rank may compute already while the other opens its files.
        assert row["step"] == 2 or sum(row[f"{part}_seconds"] for part in PHASES) <= row["step_seconds"] * 1.01
        assert 0.05 < row["host_memory_gb"] < 20
        assert row["checkpoint_age_seconds"] >= 0


def coming_apart(group: Ranks, world: str, out: str) -> list[str]:
    """Live teachers that agree, and from the fifth step on know less and less, on ranks whose data come late; what
    people are warned of."""
    trained, model = test_engine.load(group, world, "mt5", {"zero_stage": 0, "dtype": "fp32"})
    words, answers = tiny.WORDS, model.answers.fixed["en"]
    groups = [
        [Row(f"g{number}", name, None, test_engine.prompt_of(words[name][number:], model), answers) for name in words]
        for number in range(8)
    ]
    tokens: Any = SimpleNamespace(languages=tuple(words))  # nothing is read
    divergence = Divergence("forward", teacher_gradient=False, temperature=1.0)
    examples = GroupExamples(tokens, [8], {"en": 1.0}, {}, "ensemble", 3.0, divergence, model, group.device)
    part = examples.collate([model.encode(rows) for rows in groups[group.rank :: group.world_size]])
    section = DistillConfig(num_steps=12, global_batch_size=8, log_every_steps=1)
    heard: list[str] = []
    places = Places(Path(out), Path(out) / "board")
    monitor = TrainingMonitor("distill", places, section, range(12), group, trained, sorted(words))
    generator = torch.Generator().manual_seed(7)  # the same on all ranks
    with heard_by(heard.append), monitor:
        for step in range(12):
            with monitor.waiting():
                time.sleep(LATE_SECONDS)
            sums = trained.step([part.sums], 0.3 if step < 4 else 0.0)
            monitor.step(step + 1, sums, (part.num_tokens, part.num_padded_tokens), 0.0)
            with torch.no_grad():
                for weight in trained.engine.module.parameters() if step >= 4 else ():
                    weight += torch.randn(weight.shape, generator=generator)
    return heard


def test_teachers_that_come_apart_and_data_that_come_late_are_said_once(world: Path, tmp_path: Path) -> None:
    heard, other = tiny.run_ranks(coming_apart, 2, world=str(world), out=str(tmp_path))
    agreement = [row["vote_agreement"] for row in read_scalars(tmp_path / METRICS)]
    assert min(agreement[3:5]) > 0.9 and max(agreement[7:]) < 0.9
    assert [text for text in heard if "the teachers drift" in text] == [text for text in heard if "were: " in text]
    late, drifting = (next(text for text in heard if what in text) for what in ("wait for data", "the teachers drift"))
    assert late.startswith("distill: step 3: ranks wait for data ") and "take distill.teachers: frozen" in drifting
    assert len(heard) == len(set(heard)) and other == []


def with_a_bad_step(group: Ranks, world: str, out: str) -> int:
    """Three steps, of which the second has an infinite loss on one rank, read one by one; how many were skipped."""
    trained, model = test_engine.load(group, world, "mt5", {"zero_stage": 1, "dtype": "fp32"})
    section = DistillConfig(num_steps=3, global_batch_size=10, log_every_steps=1, on_nonfinite="skip")
    mine = test_engine.examples(model)[group.rank :: group.world_size]
    loss = FrozenTargetLoss(model.collate([one.row for one in mine]), mine, group.device, Observer(("en",), 3))
    places = Places(Path(out), Path(out) / "board")
    with TrainingMonitor("distill", places, section, range(3), group, trained, ("en",)) as monitor:
        for step in range(3):
            factor = torch.inf if (step, group.rank) == (1, 1) else 1.0
            sums = trained.step([lambda module, by=factor: {n: v * by for n, v in loss(module).items()}], 1e-3)
            monitor.step(step + 1, sums, (1, 1), 1e-3)
    return trained.num_skipped


def test_the_loss_of_a_skipped_step_ends_nothing_and_is_left_out(world: Path, tmp_path: Path) -> None:
    assert tiny.run_ranks(with_a_bad_step, 2, world=str(world), out=str(tmp_path)) == [1, 1]
    rows = read_scalars(tmp_path / METRICS)
    assert [("loss" in row, row["skipped_steps"]) for row in rows] == [(True, 0), (False, 1), (True, 1)]
    assert ["divergence" in row for row in rows] == [True, False, True]
