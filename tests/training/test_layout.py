"""Where the weights are while a model scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from training import test_engine

from alsace_dist.config import EngineConfig
from alsace_dist.ranks.group import Ranks
from alsace_dist.stages import score
from alsace_dist.training import layout
from alsace_dist.training.engine import inference_module, load_module

RAW = {"zero_optimization": {"stage3_max_live_parameters": 7, "zero_quantized_weights": True}}
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def layouts(group: Ranks, world: str) -> dict[str, Any]:
    """ZeRO stages and raw settings of scoring, as what is asked for, the training's stage and the memory say."""
    model = test_engine.opened(world, "mt5")
    engines = [EngineConfig(zero_stage=0), EngineConfig(zero_stage=3, deepspeed=RAW, offload_optimizer=True)]
    found: dict[str, Any] = {"bytes": [layout.weight_bytes(model, dtype) for dtype in ("bf16", "fp32")]}
    usual = layout.memory_of_a_rank
    found["memory"] = usual(group, 1)

    def of(name: Any, engine: EngineConfig, hosts: str = "aa", memory: int = 10**9) -> list[Any]:
        layout.memory_of_a_rank = lambda ranks, num_local: memory  # type: ignore[assignment]
        scoring, together = layout.scoring_layout(name, engine, model, group, hosts)
        return [scoring.zero_stage, scoring.offload_optimizer, scoring.deepspeed, together.world_size]

    try:
        for name in ("replicated", "zero3", "auto"):
            found[name] = [of(name, engine) for engine in engines]
        least = 2 * found["bytes"][0]  # what it takes to hold all weights in bf16, of which half is for weights
        found["just room"] = [of("auto", engines[0], hosts, least)[::3] for hosts in ("aa", "ab")]
        found["no room"] = [of("auto", engines[0], hosts, least - 1)[::3] for hosts in ("aa", "ab")]
        own = least if group.rank == 0 else least - 1
        found["no room on one"] = of("auto", engines[0], "aa", own)[::3]
        found["machines of one rank"] = of("zero3", engines[0], "ab", least)[::3]
    finally:
        layout.memory_of_a_rank = usual
    return found


def test_scoring_has_its_own_layout_that_all_ranks_agree_on(world: Path) -> None:
    one, other = tiny.run_ranks(layouts, 2, world=str(world))
    assert one == other
    assert one["bytes"][1] == 2 * one["bytes"][0] > 0
    assert one["memory"] > 1e8
    nothing: dict[str, Any] = {"zero_optimization": {}}
    assert one["replicated"] == one["auto"] == [[0, False, nothing, 2]] * 2
    kept = {"zero_optimization": {"stage3_max_live_parameters": 7}}  # but no quantised weights
    assert one["zero3"] == [[3, False, nothing, 2], [3, False, kept, 2]]
    assert one["just room"] == [[0, 2], [0, 2]]
    assert one["no room"] == [[3, 2], [3, 2]]
    assert one["no room on one"] == [3, 2]
    assert one["machines of one rank"] == [3, 1]


def scores_of(group: Ranks, world: str) -> dict[str, Any]:
    """Log-probabilities of a batch by whole weights, and by weights that the ranks of a machine share out."""
    model = test_engine.opened(world, "mt5")
    engine = EngineConfig(zero_stage=3, dtype="fp32", deepspeed=SHARD_ALL)
    inputs = model.collate([example.row for example in test_engine.examples(model)])
    found = []
    for name in ("replicated", "zero3"):
        scoring, together = layout.scoring_layout(name, engine, model, group, ["a", "b", "a"])  # type: ignore[arg-type]
        module = inference_module(load_module(model, 0.0, scoring, together), scoring, together)
        parts = [getattr(parameter, "ds_tensor", parameter).numel() for parameter in module.parameters()]
        times = score.PASSES_OF_ALL + (3 if name == "zero3" and group.rank == 1 else 0)  # machine b waits for no other
        with torch.inference_mode():
            for _ in range(times):
                log_probs = module(*inputs.to(group.device))
        found.append(log_probs.tolist())
    return {"log_probs": found, "numel": sum(parts), "size": together.world_size}


def test_the_ranks_of_a_machine_share_out_the_weights_where_that_is_enough(world: Path) -> None:
    """Ranks 0 and 2 of one machine, rank 1 of another."""
    results = tiny.run_ranks(scores_of, 3, world=str(world))
    assert [result["size"] for result in results] == [2, 1, 2]
    assert results[1]["numel"] == pytest.approx(2 * results[0]["numel"], rel=0.01)
    for result in results:
        whole, divided = result["log_probs"]
        assert whole == results[0]["log_probs"][0]
        assert np.allclose(whole, divided, atol=1e-6)
