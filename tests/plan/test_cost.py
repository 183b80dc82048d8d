"""Seconds and bytes of a forecast against figures worked out by hand, and its memory against the memory formulas."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alsace_dist.config import EngineConfig, LoraConfig, TrainConfig
from alsace_dist.config_file import load_config
from alsace_dist.models.family import Parameters
from alsace_dist.models.footprint import Activations
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.cost import (
    Collective,
    backward_share,
    forward_seconds,
    pass_seconds,
    training_traffic,
    update_seconds,
)
from alsace_dist.plan.estimate import (
    TOKEN_BUDGETS,
    Estimate,
    Forecast,
    estimate,
    estimate_scoring,
    forecast,
    gathered_bytes,
    num_sharing,
)
from alsace_dist.plan.memory import scoring_memory, training_memory
from alsace_dist.plan.model import planned_model
from alsace_dist.plan.work import Counts, Work, work_of

CONFIGS = Path(__file__).parents[2] / "configs"
# 2 nodes of 4 GPUs, 10 GB/s for each to the other node, 1,000 TFLOPS.
SMALL = Cluster(2, 4, 80e9, 10e9, 1000e12)
PARAMETERS = Parameters(body=1_100_000_000, embedding=200_000_000, whole_head=0, kept_head=100_000_000)
SECTION = TrainConfig(num_steps=1, learning_rate=1e-3, freeze_vocabulary=True)  # of 1.2e9 parameters 1e9 are trained


def engine(stage: int, **settings: Any) -> EngineConfig:
    return EngineConfig.model_validate({"zero_stage": stage} | settings)


# --- communication -------------------------------------------------------------------------------------------------


def test_a_ring_by_hand() -> None:
    one = Collective(8e9, num_calls=1)
    assert one.moved(SMALL) == 7e9
    # 7 GB pass each GPU at 300 GB/s; 4 GB enter each node through 4 adapters of 10 GB/s, which takes longer. Of the
    # ring's 7 hops 2 are between nodes.
    assert one.seconds(SMALL) == pytest.approx(4e9 / 40e9 + 5 * 1.5e-6 + 2 * 5e-6)
    assert replace(one, num_calls=1000).seconds(SMALL) == pytest.approx(0.1 + 0.0175)
    near = replace(one, within_node=True)
    assert near.moved(SMALL) == 6e9 and near.seconds(SMALL) == pytest.approx(6e9 / 300e9 + 3 * 1.5e-6)
    # Eight nodes of a GPU: all of it comes through the GPU's own adapter, over seven hops between nodes.
    assert one.seconds(Cluster(8, 1, 80e9, 10e9)) == pytest.approx(7e9 / 10e9 + 7 * 5e-6)
    assert one.seconds(Cluster(1, 1, 80e9)) == 0 and one.moved(Cluster(1, 1, 80e9)) == 0


@pytest.mark.parametrize(
    ("settings", "each_pass", "each_step"),
    [
        ({"zero_stage": 0}, [], [4e9, 4e9]),
        ({"zero_stage": 1}, [], [4e9, 4e9, 2e9]),
        ({"zero_stage": 2}, [4e9, 4e9], [2e9]),
        ({"zero_stage": 2, "dtype": "fp32"}, [4e9, 4e9], [4e9]),
        ({"zero_stage": 3}, [2.4e9, 2.4e9, 4e9], []),
        ({"zero_stage": 3, "gradient_checkpointing": True}, [2.4e9, 2.4e9, 2.4e9, 4e9], []),
    ],
)
def test_what_each_zero_stage_sends(settings: dict[str, Any], each_pass: list[float], each_step: list[float]) -> None:
    traffic = training_traffic(PARAMETERS, SECTION, EngineConfig.model_validate(settings))
    assert [one.num_bytes for one in traffic.each_pass] == each_pass
    assert [one.num_bytes for one in traffic.each_step] == each_step


def test_with_hpz_only_the_first_gather_leaves_the_node() -> None:
    raw = {"zero_optimization": {"zero_hpz_partition_size": 4}}
    traffic = training_traffic(PARAMETERS, SECTION, engine(3, gradient_checkpointing=True, deepspeed=raw))
    assert [one.within_node for one in traffic.each_pass] == [False, True, True, False]
    # A second copy shared by 4 ranks, beside the billion weights alive at a time and 50 million gathered ahead.
    assert gathered_bytes(PARAMETERS, engine(3, deepspeed=raw)) == 2 * (1_050_000_000 + 300_000_000)
    assert gathered_bytes(PARAMETERS, engine(3)) == 2 * 1_050_000_000
    few = {"zero_optimization": {"stage3_max_live_parameters": 1000, "stage3_prefetch_bucket_size": 7}}
    assert gathered_bytes(PARAMETERS, engine(3, deepspeed=few)) == 2 * (200_000_000 + 7)  # the embedding, whole


# --- computing -----------------------------------------------------------------------------------------------------


def test_a_pass_by_hand() -> None:
    about = Activations(num_layers=10, layers=7 * 10**9, largest_layer=1, working=1, between=1, ends=0)
    kernels = 65e12 / 650e12 + 1.7 * 7e9 / 2.8e12  # products, and traffic
    assert forward_seconds(65e12, about, False, SMALL) == pytest.approx(kernels) == pytest.approx(0.10425)
    assert pass_seconds(65e12, about, engine(1), SMALL) == pytest.approx(3 * kernels)
    assert pass_seconds(65e12, about, engine(1, gradient_checkpointing=True), SMALL) == pytest.approx(4 * kernels)
    # One prompt: launching 10 layers takes longer than computing them, with ZeRO-3 twice as long.
    tiny = replace(about, layers=1)
    adapters = SECTION.model_copy(update={"lora": LoraConfig()})
    assert (backward_share(SECTION), backward_share(adapters)) == (2, 1)
    assert pass_seconds(65e12, about, engine(1), SMALL, backward=1) == pytest.approx(2 * kernels)
    assert pass_seconds(1e6, tiny, engine(1), SMALL) == pytest.approx(10 * (60 + 112) * 5e-6)
    assert pass_seconds(1e6, tiny, engine(3), SMALL) == pytest.approx(2 * 10 * (60 + 112) * 5e-6)


def test_an_update_by_hand() -> None:
    assert update_seconds(PARAMETERS, SECTION, engine(0), 8) == pytest.approx(30e9 / 2.8e12)
    assert update_seconds(PARAMETERS, SECTION, engine(1), 8) == pytest.approx(30e9 / 8 / 2.8e12)
    offloaded = engine(2, offload_optimizer=True, num_threads=2)
    # Gradients of 4 bytes come, weights of 2 go; two threads of 0.3e9 parameters a second.
    assert update_seconds(PARAMETERS, SECTION, offloaded, 8) == pytest.approx(1e9 / 8 * (6 / 25e9 + 1 / 0.6e9))


# --- stages --------------------------------------------------------------------------------------------------------


def about_large(cluster: Cluster, **changes: Any) -> tuple[Forecast, list[Work]]:
    config = load_config(CONFIGS / "xnli-mt5-large.yaml", changes)
    model = planned_model(config)
    return forecast(config, model, cluster, None), work_of(config, model.mode, Counts(1000, 15))


def named(works: list[Work], name: str) -> Work:
    return next(one for one in works if one.name == name)


def test_a_stage_is_put_together_of_its_parts(tmp_path: Path) -> None:
    about, works = about_large(
        SMALL, run_dir=str(tmp_path), **{"distill.num_epochs": 1, "distill.tokens_per_micro_batch": 1024}
    )
    work = named(works, "distill")
    assert (work.num_examples, work.num_steps, work.times) == (15000, 31, 1)  # 15,000 / 480 = 31.25
    one = estimate(about, work)
    # 480 prompts of 64 tokens on 8 GPUs are 60 each, in micro-batches of 16: four passes of 15. Of the longest, of 256
    # tokens, a micro-batch holds 4.
    assert (one.num_passes, one.prompts) == (4, 15)
    assert work.section is not None
    assert one.memory == training_memory(about.parameters, work.section, work.engine, 8)
    assert one.activations == about.activations(4, 256, work.engine).most(False, True)
    assert one.device_bytes == one.memory.states + one.activations and one.fits
    compute = 4 * pass_seconds(about.flops(15), about.activations(15, 64, work.engine), work.engine, SMALL)
    wait = sum(part.seconds(SMALL) for part in training_traffic(about.parameters, work.section, work.engine).each_step)
    update = update_seconds(about.parameters, work.section, work.engine, 8)
    assert (one.compute_seconds, one.communication_seconds) == pytest.approx((compute, wait))
    assert one.step_seconds == pytest.approx(compute + wait + update)
    assert one.seconds == pytest.approx(31 * one.step_seconds) and one.node_hours == one.seconds / 1800
    assert one.mfu == pytest.approx(3 * about.flops(480) / (one.step_seconds * 8 * 1000e12))
    # A trained embedding, and few prompts: its three gradients of 250,112 x 1,024 are what counts.
    assert about.activations(1, 256, work.engine).most(False, False) == 3 * 2 * 250112 * 1024
    assert one.checkpoint == 12 * about.parameters.trained(SECTION)


def test_under_zero_3_passes_and_collectives_overlap(tmp_path: Path) -> None:
    about, works = about_large(SMALL, run_dir=str(tmp_path), **{"engine.zero_stage": 3})
    work = named(works, "distill")
    one = estimate(about, work)
    assert work.section is not None
    update = update_seconds(about.parameters, work.section, work.engine, 8)
    assert one.step_seconds == pytest.approx(max(one.compute_seconds, one.communication_seconds) + update)
    assert one.gathered > 0 and one.memory.weights == estimate_weights(about, one)


def estimate_weights(about: Forecast, one: Estimate) -> int:
    return training_memory(about.parameters, SECTION, one.work.engine, 8).weights


def test_scoring_replicated_waits_for_nobody_and_sharded_needs_less(tmp_path: Path) -> None:
    about, works = about_large(SMALL, run_dir=str(tmp_path))
    work = named(works, "score test")
    assert (work.num_examples, work.times) == (15000, 2)  # before and after distillation; variants do not count
    whole, part = (estimate_scoring(about, work, work.engine, sharding) for sharding in ("replicated", "zero3"))
    assert whole.moved == whole.communication_seconds == 0 and part.moved > 0
    # Two nodes of 4 GPUs, each of which has room for the weights: they travel within a node.
    assert whole.memory.weights == 4 * part.memory.weights == scoring_memory(about.parameters, work.engine.dtype, 1)
    # 1,875 prompts a rank in batches of 16,384 / 64 = 256.
    assert whole.num_steps == 8 and whole.prompts == pytest.approx(1875 / 8)


def test_weights_are_shared_out_while_scoring_as_far_as_they_must(tmp_path: Path) -> None:
    """1.0e9 parameters of mT5-large in bf16, of which a GPU may hold half of its memory."""
    about, works = about_large(SMALL, run_dir=str(tmp_path))
    weights = 2 * about.parameters.kept
    work, sizes = named(works, "score test"), []
    for memory in (2.1 * weights, 1.9 * weights, 0.4 * weights):
        one = about._replace(cluster=replace(SMALL, gpu_memory=memory))
        sizes.append([num_sharing(one, work.engine, sharding) for sharding in ("auto", "zero3", "replicated")])
    assert sizes == [[1, 4, 1], [4, 4, 1], [8, 8, 1]]


def test_auto_is_the_fastest_budget_that_fits(tmp_path: Path) -> None:
    about, works = about_large(SMALL, run_dir=str(tmp_path))
    work = named(works, "distill")
    assert work.section is not None and work.section.tokens_per_micro_batch == "auto"
    found = estimate(about, work)
    assert found.fits and found.work.section is not None and found.num_passes == 1
    cramped = about._replace(cluster=replace(SMALL, gpu_memory=1.3 * found.memory.states + 4e9))
    less = estimate(cramped, work)
    assert less.fits and less.num_passes > 1
    nothing = estimate(about._replace(cluster=replace(SMALL, gpu_memory=4e9)), work)
    assert not nothing.fits and nothing.work.section is not None
    assert nothing.work.section.tokens_per_micro_batch == TOKEN_BUDGETS[0]


def test_nothing_known_of_activations_is_said(tmp_path: Path) -> None:
    from models import small_t5gemma2

    from alsace_dist.errors import UserError

    small_t5gemma2.make_config(100).save_pretrained(tmp_path / "model")
    changes = {"model.path": str(tmp_path / "model"), "run_dir": str(tmp_path), "task.decoder_prefix": ""}
    about, works = about_large(SMALL, **changes)
    with pytest.raises(UserError, match="no formula for activations of T5Gemma 2"):
        estimate(about, works[0])
