"""What people are warned of, and what ends a training that has diverged."""

import pytest
import torch

from alsace_dist.errors import UserError
from alsace_dist.monitor import health
from alsace_dist.monitor.health import LeadCheck, bf16_slowdown, check_bf16, check_loss
from alsace_dist.ranks import job


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
