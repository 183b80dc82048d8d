"""The presets of configs/engine, laid over a config as people do it: each trains what plain training trains."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from alsace_dist.config import EngineConfig
from alsace_dist.config_file import OVER, load_config
from alsace_dist.errors import UserError
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.settings import deepspeed_settings

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/engine").glob("*.yaml"))
NEEDS_GPU = ("zeropp",)
OF_TWO_RANKS = {"engine.deepspeed.zero_optimization.zero_hpz_partition_size": 2}


def config_over(directory: Path, world: Path, name: str, **more: Any) -> Path:
    """A config of one short distillation whose learning rate, given after the preset, no preset changes."""
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    steps = {"num_steps": 4, "learning_rate": 1e-3, "checkpoint_every_steps": 9}
    value = tiny.make_config(world, data=data, engine={"zero_stage": 1}, finetune=None, distill=steps)
    source = tiny.write_config(directory / f"{name}-plain.yaml", value | {"run_dir": str(directory / name)})
    settings = {OVER: name, "distill.learning_rate": 1e-3} | (OF_TWO_RANKS if name == "hpz" else {}) | more
    over = load_config(source, settings).model_dump(mode="json", exclude_unset=True)
    return tiny.write_config(directory / f"{name}.yaml", over)


def trained(path: Path) -> dict[str, torch.Tensor]:
    """The distilled model's tensors."""
    tiny.run_all(path)
    return tiny.state_of(Path(load_config(path).run_dir) / "round1/distill/model")


def refusal(group: Ranks, settings: dict[str, Any]) -> str:
    """Why this rank's device cannot do what is asked for."""
    with pytest.raises(UserError) as caught:
        deepspeed_settings(EngineConfig(**settings), None, group)
    return str(caught.value)


@pytest.fixture(scope="module")
def plain(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What ZeRO-1 alone makes."""
    return trained(config_over(tmp_path_factory.mktemp("plain"), world, ""))


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in (*NEEDS_GPU, "lora")])
def test_a_preset_trains_what_plain_training_trains(
    world: Path, tmp_path: Path, plain: dict[str, torch.Tensor], name: str
) -> None:
    """In float32 on two ranks, within 1e-5, but for single elements: Adam makes a step of what is no more than rounding
    of a gradient near 0. With a frozen vocabulary (test_engine) it is another training."""
    found = trained(config_over(tmp_path, world, name))
    assert found.keys() == plain.keys()
    if name == "frozen-vocabulary":
        start = tiny.state_of(world / "model")
        assert [key for key in start if "shared" in key and torch.equal(found[key], start[key])] == ["shared.weight"]
        assert not torch.equal(plain["shared.weight"], start["shared.weight"])
        return
    for key, value in found.items():
        difference = (value - plain[key]).abs()
        assert (difference > 1e-5).float().mean() <= 1e-3 and difference.max() <= 1e-4, key


def test_adapters_are_laid_over_too(world: Path, tmp_path: Path) -> None:
    """What they train is held by test_lora."""
    config = load_config(config_over(tmp_path, world, "lora"))
    assert config.distill.lora is not None and config.distill.lora.rank == 16
    assert config.finetune is None  # what the config leaves out stays out


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_what_only_gpus_can_do_is_said(world: Path, tmp_path: Path, name: str) -> None:
    engine = load_config(config_over(tmp_path, world, name)).engine
    assert engine.deepspeed["zero_optimization"]["zero_hpz_partition_size"] == 8
    message = "engine.deepspeed.zero_optimization.zero_quantized_weights: DeepSpeed packs numbers on GPUs only"
    said = tiny.run_ranks(refusal, 2, settings=engine.model_dump(mode="json"))
    assert all(one.startswith(message) for one in said)


def test_a_section_that_is_left_out_stays_out_and_files_and_names_may_be_given(world: Path, tmp_path: Path) -> None:
    own = tiny.write_config(tmp_path / "own.yaml", {"finetune": {"num_epochs": 7}, "distill": {"num_steps": 2}})
    source = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, finetune=None))
    config = load_config(source, {OVER: f"lora,{own}", "distill.lora.rank": 3})
    assert config.finetune is None and config.distill.num_steps == 2
    assert config.distill.lora is not None and config.distill.lora.rank == 3
    with pytest.raises(UserError, match=r"nowhere: no such file.*--over takes the path of a YAML file, or one of froz"):
        load_config(source, {OVER: "nowhere"})
    assert "hpz" in tiny.alsace("distill", "--help").stdout
