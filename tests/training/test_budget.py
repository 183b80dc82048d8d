"""How large micro-batches are: what is extrapolated from small passes, and that trying the largest leaves no trace."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from training import test_engine

from alsace_dist.config import DistillConfig, EngineConfig
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.budget import Measured, cut_rule, fitting_tokens, pass_cost
from alsace_dist.training.examples import TargetExamples
from alsace_dist.training.tokens import Tokens

GIB = 1 << 30


def test_what_fits_grows_with_the_memory_that_is_left() -> None:
    """1,000 tokens take 2 GiB beside 10 GiB, so a GiB holds 500 tokens."""
    small, large = Measured(1000, 12 * GIB, 0.02), Measured(4000, 18 * GIB, 0.05)
    assert fitting_tokens(small, large, 74 * GIB) == 32_000 // 4096 * 4096 == 28_672
    assert fitting_tokens(small, large, 10 * GIB) == 1
    near = [fitting_tokens(small, large, share * GIB) for share in (73.0, 74.0, 75.0)]
    assert len(set(near)) == 1, "a rerun that finds a little more or less cuts the same"


def test_the_cost_of_a_pass_is_what_no_token_takes() -> None:
    """10 ms a thousand tokens and 20 ms beside: as much as 2,000 tokens."""
    assert pass_cost(Measured(1000, 0, 0.030), Measured(4000, 0, 0.060)) == 2048
    assert pass_cost(Measured(1000, 0, 0.030), Measured(4000, 0, 0.030)) == 2**20  # no time for tokens: noise
    assert pass_cost(Measured(1000, 0, 0.010), Measured(4000, 0, 0.060)) == 1


def dry_and_not(group: Ranks, world: str, scorer: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of an engine after two steps with dry passes before them, and without; how they were."""
    states, shapes = [], []
    for is_dry in (False, True):
        trained, model = test_engine.load(group, world, scorer, settings)
        if is_dry:
            section = DistillConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2, tokens_per_micro_batch=600)
            languages = sorted({one.row.language for one in test_engine.examples(model)})
            tokens = Tokens(None, None, languages, model)  # type: ignore[arg-type]
            given = TargetExamples(tokens, [], None, model, group.device)  # type: ignore[arg-type]
            example = test_engine.examples(model)[group.rank]
            seen = trained.engine.module.register_forward_pre_hook(lambda _, args: shapes.append(list(args[0].shape)))
            rule = cut_rule("distill", section, EngineConfig(**settings), given, example, trained)
            seen.remove()
            assert (rule.most_tokens, rule.most_examples) == (600, None)
            trained.load_initial(model)
        mine = test_engine.examples(model)[group.rank :: group.world_size]
        for _ in range(2):
            trained.step([test_engine.loss_of(model, mine, group)], 1e-3)
        states.append({name: trained.state(name) for name in trained.parameters})
    before, after = states
    equal = all(torch.equal(value, after[name][key]) for name in before for key, value in before[name].items())
    return {"equal": equal and before.keys() == after.keys(), "shapes": shapes}


@pytest.mark.parametrize(
    ("scorer", "dtype", "stage"),
    [("mt5", "bf16", 0), ("mt5", "fp32", 0), ("mt5", "bf16", 1), ("mt5", "fp32", 2), ("mt5", "bf16", 3)]
    + [(scorer, "fp32", 3) for scorer in tiny.SCORERS if scorer != "mt5"],
)
def test_dry_passes_leave_no_trace(world: Path, scorer: str, dtype: str, stage: int) -> None:
    settings = {"dtype": dtype, "zero_stage": stage}
    for found in tiny.run_ranks(dry_and_not, 2, world=str(world), scorer=scorer, settings=settings):
        assert found["equal"]
        (rows, longest), last = found["shapes"][0], found["shapes"][-1]
        assert longest == max(length for _, length in found["shapes"])
        assert rows == min(5, 600 // longest) and last[0] == 5, "a rank's share of 10 examples is 5"


def dry_with_unequal_examples(group: Ranks, world: str, settings: dict[str, Any]) -> float:
    """Rank 0's first example is as long as any may be, that of rank 1 short; a sum over both after the dry passes."""
    trained, model = test_engine.load(group, world, "mt5", settings)
    tokens = Tokens(None, None, ["en"], model)  # type: ignore[arg-type]
    given = TargetExamples(tokens, [], None, model, group.device)  # type: ignore[arg-type]
    (example,) = test_engine.examples(model)[:1]
    example = given.stretched(example) if group.is_main else example
    most = given.length(given.stretched(example)) * 3 // 2  # one long example, or more short ones
    section = DistillConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2, tokens_per_micro_batch=most)
    cut_rule("distill", section, EngineConfig(**settings), given, example, trained)
    trained.load_initial(model)
    trained.step([test_engine.loss_of(model, [example], group)], 1e-3)
    return group.sum(1.0)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_with_examples_of_other_lengths_take_as_many_dry_passes(world: Path, stage: int) -> None:
    settings = {"dtype": "fp32", "zero_stage": stage}
    assert tiny.run_ranks(dry_with_unequal_examples, 2, world=str(world), settings=settings) == [2.0, 2.0]


def test_a_pass_that_no_memory_holds_comes_before_the_first_step(world: Path, tmp_path: Path) -> None:
    """Examples of 4,000 tokens, of which attention holds the square; the texts themselves are short."""
    config = tiny.make_config(
        world,
        run_dir=str(tmp_path / "run"),
        data={"inputs": [], "splits": {}, "directory": str(world / "run/data")},
        task={"max_tokens": 4000},
        engine={"num_processes": 1, "dtype": "fp32", "zero_stage": 0},
        finetune={"tokens_per_micro_batch": 1_200_000, "global_batch_size": 300},
    )
    path = tiny.write_config(tmp_path / "c.yaml", config)
    command = f"ulimit -v {12 * 10**6}; exec {sys.executable} -m alsace_dist finetune {path}"
    failed = subprocess.run(
        ["bash", "-c", command], env=tiny.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    last = failed.stderr.strip().splitlines()[-1]
    said = (
        r"error: finetune.tokens_per_micro_batch: rank 0 has no memory for a pass of 1,200,000 tokens, 300 times 4,000 "
    )
    assert re.match(said + r"\(tried to allocate \d+ bytes\); lower it, to half or less, or set", last), failed.stderr
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run/finetune/metrics.jsonl").exists()
