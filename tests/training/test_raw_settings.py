"""Raw settings of DeepSpeed that may be given change speed and memory alone: weights, as loaded and stepped, stay."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from training import test_engine

from alsace_dist.config import EngineConfig
from alsace_dist.config.engine import CHANGES_RESULTS, ZeroOptimization
from alsace_dist.errors import UserError
from alsace_dist.ranks.group import Ranks

FLAGS = ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions")
FLAGS += ("overlap_comm", "memory_efficient_linear", "log_trace_cache_warnings")
SIZES = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
SIZES += ("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
ELSEWHERE = {"offload_param", "zero_hpz_partition_size"}  # presets, which test_presets trains


def settings() -> list[dict[str, Any]]:
    """One of each, away from its default."""
    flags: list[dict[str, Any]] = [{name: value} for name in FLAGS for value in (False, True)]
    return [*flags, *({name: 1000} for name in SIZES), {"overlap_comm": True, "reduce_bucket_size": 1000}]


def test_every_setting_that_may_be_given_is_looked_at() -> None:
    changing = {key.removeprefix("zero_optimization.") for key in CHANGES_RESULTS}
    assert set(ZeroOptimization.model_fields) == {*FLAGS, *SIZES, *ELSEWHERE} | (changing - set(CHANGES_RESULTS))


def differences(group: Ranks, world: str, stage: int) -> dict[str, float]:
    """Of each setting, how far weights are from those without it: as loaded, and after a step without learning rate and
    one with."""
    found: dict[str, float] = {}
    plain: list[Any] = []
    for raw in ({}, *settings()):
        if stage < 3 and any(name.startswith("stage3_") or name == "sub_group_size" for name in raw):
            continue
        given = {"zero_stage": stage, "dtype": "fp32", "deepspeed": {"zero_optimization": raw} if raw else {}}
        trained, model = test_engine.load(group, world, "mt5", given)
        mine = test_engine.examples(model)[group.rank :: group.world_size]
        states = []
        for rate in (None, 0.0, 1e-2):
            if rate is not None:
                trained.step([test_engine.loss_of(model, mine, group)], rate)
            states.append({name: trained.state(name)["weight"] for name in trained.parameters})
        if not raw:
            plain = states
            continue
        pairs = [(state[name], other) for state, at in zip(states, plain, strict=True) for name, other in at.items()]
        found[str(raw)] = max(float((one - other).abs().max()) for one, other in pairs)
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_they_change_no_weight(world: Path, stage: int) -> None:
    for found in tiny.run_ranks(differences, 2, world=str(world), stage=stage):
        assert len(found) >= 14 and {raw: value for raw, value in found.items() if value > 1e-5} == {}


def test_a_setting_that_puts_weights_elsewhere_is_refused() -> None:
    """DeepSpeed gives parameters another order in its flat tensors, and tells where they are as if it had not."""
    with pytest.raises(ValueError, match="round_robin_gradients"):
        EngineConfig(zero_stage=2, deepspeed={"zero_optimization": {"round_robin_gradients": True}})


def refusal(group: Ranks, world: str) -> str:
    raw = {"data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(UserError) as caught:
        test_engine.load(group, world, "mt5", {"zero_stage": 0, "dtype": "bf16", "deepspeed": raw})
    return str(caught.value)


def test_what_deepspeed_does_not_know_how_to_do_is_one_line(world: Path) -> None:
    for said in tiny.run_ranks(refusal, 2, world=str(world)):
        assert said.startswith("engine.deepspeed: DeepSpeed refuses these settings: ") and "\n" not in said
