"""Where the weights are while a model scores."""

from pathlib import Path
from typing import Any

import tiny
from training import test_engine

from alsace_dist.config import EngineConfig
from alsace_dist.ranks.group import Ranks
from alsace_dist.training import layout

RAW = {"zero_optimization": {"stage3_max_live_parameters": 7, "zero_quantized_weights": True}}


def layouts(group: Ranks, world: str) -> dict[str, Any]:
    """ZeRO stages and raw settings of scoring, as what is asked for, the training's stage and the memory say."""
    model = test_engine.opened(world, "mt5")
    engines = [EngineConfig(zero_stage=0), EngineConfig(zero_stage=3, deepspeed=RAW, offload_optimizer=True)]
    found: dict[str, Any] = {"bytes": [layout.weight_bytes(model, dtype) for dtype in ("bf16", "fp32")]}
    for name in ("replicated", "zero3", "auto"):
        scoring = [layout.scoring_engine(name, engine, model, group) for engine in engines]  # type: ignore[arg-type]
        found[name] = [(one.zero_stage, one.offload_optimizer, one.deepspeed) for one in scoring]
    found["memory"] = layout.memory_of_a_rank(group)
    share, layout.WEIGHTS_SHARE = layout.WEIGHTS_SHARE, 0.0 if group.rank == 1 else layout.WEIGHTS_SHARE
    found["too large for rank 1"] = layout.scoring_engine("auto", engines[0], model, group).zero_stage
    layout.WEIGHTS_SHARE = share
    return found


def test_scoring_has_its_own_layout_that_all_ranks_agree_on(world: Path) -> None:
    one, other = tiny.run_ranks(layouts, 2, world=str(world))
    assert one == other
    assert one["bytes"][1] == 2 * one["bytes"][0] > 0
    nothing: dict[str, Any] = {"zero_optimization": {}}
    assert one["replicated"] == one["auto"] == [[0, False, nothing], [0, False, nothing]]
    kept = {"zero_optimization": {"stage3_max_live_parameters": 7}}  # but no quantised weights
    assert one["zero3"] == [[3, False, nothing], [3, False, kept]]
    assert one["too large for rank 1"] == 3
    assert one["memory"] > 1e8
