"""What people are warned of, and what ends a training that has diverged."""

from typing import Any

import numpy as np
import pytest
import torch

from alsace_dist.errors import UserError, heard_by
from alsace_dist.monitor import health
from alsace_dist.monitor.health import Health, LeadCheck, bf16_slowdown, check_bf16, check_loss
from alsace_dist.monitor.observed import ANSWERS, TARGET_ANSWERS
from alsace_dist.ranks import job
from alsace_dist.ranks.group import Ranks, StopFlag


def test_a_lead_that_is_too_short_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(job.LEAD_SECONDS, "60")
    check = LeadCheck()
    check(59.0, "a step and a checkpoint")
    assert capsys.readouterr().err == ""
    check(90.0, "a step and a checkpoint")
    check(95.0, "a step and a checkpoint")
    assert capsys.readouterr().err == (
        "warning: a step and a checkpoint took 90 s, but the signal to stop comes 60 s before a job's end: "
        "set lead_seconds in the site profile to 180, or work is lost\n"
    )


def test_outside_a_job_no_lead_is_too_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(job.LEAD_SECONDS, raising=False)
    LeadCheck()(1e9, "a step")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_refused_with_what_to_do(loss: float) -> None:
    check_loss(1e30, 6, "distill", "run/distill")
    with pytest.raises(
        UserError, match=r"^distill: the loss is -?\w+ at step 7; lower distill\.learning_rate, and delete run/distill$"
    ):
        check_loss(loss, 7, "distill", "run/distill")


def test_a_cpu_that_is_slow_in_bf16_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "bf16_slowdown", lambda: 2.0)
    check_bf16()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(health, "bf16_slowdown", lambda: 51.4)
    check_bf16()
    assert capsys.readouterr().err == (
        "warning: this CPU has no bf16 of its own: a product takes 51 times float32's; set engine.dtype: fp32\n"
    )


def test_what_bf16_costs_is_measured() -> None:
    """Without AVX-512 torch has no fast product of bf16, with it it has."""
    capability = torch.backends.cpu.get_cpu_capability()
    threads, slowdown = torch.get_num_threads(), bf16_slowdown()
    assert 0.05 < slowdown < 1000 and torch.get_num_threads() == threads
    if capability in ("DEFAULT", "AVX2"):
        assert slowdown > health.MOST_BF16_SLOWDOWN


# --- readings of a training ----------------------------------------------------------------------------------------

STEADY = {
    "loss": 0.5,
    "tokens_per_second": 1000.0,
    "data_wait_share": 0.01,
    "forward_seconds_least": 0.1,
    "forward_seconds_most": 0.11,
}


def said(readings: list[dict[str, float]], sums: dict[str, Any] | None = None) -> list[str]:
    """What a training is warned of, whose readings differ so from steady ones. ``sums``: observed in each reading."""
    alone = Ranks(0, 1, 0, torch.device("cpu"), None, StopFlag())
    check, heard = Health("distill", alone, num_steps=5, warmup_ratio=0.4), list[str]()
    with heard_by(heard.append):
        for step, values in enumerate(readings, start=1):
            check(step, STEADY | values, sums or {}, ["de", "en"], 0.1)
    return heard


def test_a_steady_training_is_warned_of_nothing() -> None:
    answers = {ANSWERS: np.array([[30, 20], [25, 25]]), TARGET_ANSWERS: np.array([[25, 25], [25, 25]])}
    assert said([{"loss": 0.5 + 0.1 * (step % 3), "vote_agreement": 0.7} for step in range(40)], answers) == []


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([{}] * 6 + [{"loss": 2.0}] * 3, "distill: step 7: the loss is 2, and was 0.5; if it stays there lower"),
        (
            [{}] * 6 + [{"tokens_per_second": 400.0}] * 3,
            "distill: step 9: 400 tokens a second, and before 1,000: look for other work on the nodes",
        ),
        ([{"data_wait_share": 0.5}] * 9, "distill: step 3: ranks wait for data 50% of the time; put the data on a"),
        (
            [{"vote_agreement": 0.8}] * 2 + [{"vote_agreement": 0.65}] * 4,
            "distill: step 5: 65% of the answers are their group's vote, and 80% were: the teachers drift",
        ),
    ],
)
def test_what_goes_wrong_is_said_once_with_what_to_do(readings: list[dict[str, float]], expected: str) -> None:
    (text,) = said(readings)
    assert text.startswith(expected)


@pytest.mark.parametrize(
    "readings",
    [
        [{"loss": 1e-3}] * 6 + [{"loss": 0.05}] * 3,  # of a training that is all but done
        [{"forward_seconds_least": 0.004, "forward_seconds_most": 0.015}] * 9,  # of a tiny model
    ],
)
def test_what_is_small_is_noise(readings: list[dict[str, float]]) -> None:
    assert said(readings) == []


def test_one_slow_reading_is_chance() -> None:
    assert said([{}] * 6 + [{"tokens_per_second": 400.0, "data_wait_share": 0.9}] * 2 + [{}] * 3) == []


def test_a_language_that_answers_one_class_is_named_if_its_targets_do_not() -> None:
    wanted = np.array([[30, 70], [50, 50]])
    (text,) = said([{}] * 5, {ANSWERS: np.array([[100, 0], [60, 40]]), TARGET_ANSWERS: wanted})
    assert text.startswith("distill: step 5: in 'de' 100% of the answers are candidate 1, and 30% of the targets")
    assert said([{}] * 5, {ANSWERS: np.array([[100, 0], [60, 40]]), TARGET_ANSWERS: np.array([[95, 5], [1, 1]])}) == []
    assert said([{}] * 5, {ANSWERS: np.array([[99, 1], [60, 40]]), TARGET_ANSWERS: np.array([[86, 14], [1, 1]])}) == []
    assert said([{}] * 5, {ANSWERS: np.array([[9, 0], [6, 4]]), TARGET_ANSWERS: np.array([[3, 6], [5, 5]])}) == []
