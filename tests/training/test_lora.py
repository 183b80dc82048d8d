"""Low-rank adapters through the engine: against plain training without one, exported without a trace, resumed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from alsace_dist.config import EngineConfig, FinetuneConfig, LoraConfig, TaskConfig, TrainConfig
from alsace_dist.data.rows import Example, Part, Row, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.family import Family, Options, open_model
from alsace_dist.models.lora import LoraModel
from alsace_dist.models.weights import Weights
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training import checkpoint, engine
from alsace_dist.training.export import export
from alsace_dist.training.losses import FrozenTargetLoss
from alsace_dist.training.saving import Saver

LORA = LoraConfig(rank=4, alpha=24)
SECTION = FinetuneConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2, max_gradient_norm=0.5)
RATE = 1e-2
# The decoder sees its start token alone: a softmax over one position is constant.
NO_GRADIENT = {f"decoder.block.0.layer.0.SelfAttention.{name}.weight" for name in ("q", "k")}
FAMILIES = pytest.mark.parametrize("scorer", ["mt5", "cloze", "new head", "t5gemma2"])
SETTINGS: list[dict[str, Any]] = [
    *({"zero_stage": stage, "dtype": "fp32"} for stage in range(4)),
    {"zero_stage": 3, "dtype": "fp32", "gradient_checkpointing": True},
    {"zero_stage": 2, "dtype": "fp32", "offload_optimizer": True},
]


def opened(world: str, scorer: str) -> Family:
    """The small model of this kind."""
    sections = tiny.of_scorer(Path(world), scorer)
    task = {"fields": ["text"], "template": "{text}", "labels": tiny.LABELS} | sections.get("task", {})
    options = Options(pooling=sections["model"].get("pooling"), seed=7)
    return open_model(Path(sections["model"]["path"]), answers_of(TaskConfig(**task), ["en"]), options)


def adapted(world: str, scorer: str, lora: LoraConfig = LORA) -> tuple[Family, LoraModel]:
    model = opened(world, scorer)
    model.check_weights(may_be_new=True)
    return model, LoraModel(model, lora, 3, "finetune.lora")


def examples(model: Family) -> list[Example]:
    """Ten weighted examples of different lengths."""
    words, answers, found = tiny.WORDS["en"], model.answers.fixed["en"], []
    generator = torch.Generator().manual_seed(5)
    for number in range(10):
        prompt = [
            Part(" ".join(words[: 1 + number % 7]), True),
            *([Part(" <mask>", False)] if model.mode == "cloze" else []),
        ]
        (row,) = model.encode([Row(f"g{number}", "en", None, tuple(prompt), answers)])
        target = torch.rand(3, generator=generator)
        found.append(Example(row, (target / target.sum()).numpy(), 0.5 + number / 10, 0.1))
    return found


def loss_of(model: Family, chunk: list[Example], device: torch.device) -> FrozenTargetLoss:
    return FrozenTargetLoss(model.collate([example.row for example in chunk]), chunk, device)


def plainly(world: str, scorer: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Merged weights by their names on disk, and losses, of three steps of torch's own AdamW on whole batches."""
    model, lora = adapted(world, scorer)
    with torch.device("meta"):
        module = lora.build(0.0, gradient_checkpointing=False)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(lora.initial_value(name))
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, examples(model), torch.device("cpu"))(module)["loss"] / 10
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), SECTION.max_gradient_norm)
        optimizer.step()
        losses.append(float(loss))
    found = {}
    for unit in lora.units({name: tuple(one.shape) for name, one in trained.items()}):
        for name, value in lora.merged({name: trained[name].detach() for name in unit.names}).items():
            found |= lora.exported(name, value)
    return found, losses


def train(group: Ranks, world: str, scorer: str, runs: list[dict[str, Any]], out: str) -> list[dict[str, Any]]:
    """Three steps with each of these engines, whose models are exported; losses, and what else is to be known."""
    results = []
    for number, settings in enumerate(runs):
        model, lora = adapted(world, scorer)
        config = EngineConfig(**settings)
        trained = engine.TrainEngine(engine.load_module(lora, 0.0, config, group), config, SECTION, group)
        trained.load_initial(lora)
        mine, losses = examples(model)[group.rank :: group.world_size], []
        for _ in range(3):
            parts = [loss_of(model, mine[start : start + 3], group.device) for start in (0, 3)]
            losses.append(group.sum(float(trained.step(parts, RATE)["loss"]))[0] / 10)
        export(Path(out, str(number)), trained, lora, max_bytes=6_000)
        trained.engine.eval()
        with torch.no_grad():
            log_probs = trained.engine(*model.collate([one.row for one in examples(model)]).to(group.device))
        results.append(
            {"losses": losses, "trained": sorted(trained.parameters), "log_probs": log_probs.flatten().tolist()}
        )
    return results


@FAMILIES
def test_every_stage_trains_adapters_as_plain_training_does(world: Path, tmp_path: Path, scorer: str) -> None:
    """Over two ranks and unequal micro-batches; and what is exported has no trace of them, and scores the same."""
    expected, losses = plainly(str(world), scorer)
    arguments = {"world": str(world), "scorer": scorer, "runs": SETTINGS, "out": str(tmp_path)}
    results = tiny.run_ranks(train, 2, **arguments)[0]
    start = Weights(opened(str(world), scorer).directory)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    for number, result in enumerate(results):
        assert result["losses"] == pytest.approx(losses, rel=1e-5), SETTINGS[number]
        stored = Weights(tmp_path / str(number))
        for key, value in expected.items():
            assert torch.allclose(stored.tensor(key), value, rtol=1e-4, atol=1e-5), (SETTINGS[number], key)
        for key in stored.keys() - expected.keys():
            assert torch.equal(stored.tensor(key), start.tensor(key).float()), key
        assert all("lora" not in key and "base_layer" not in key for key in stored)
        before = {key: start.tensor(key).float() for key in expected if key in start}  # a new head is not there
        still = {key for key, value in before.items() if torch.equal(stored.tensor(key), value)}
        assert still == NO_GRADIENT & before.keys() and len(still) < len(before)
        sections = tiny.of_scorer(world, scorer)
        task = {"fields": ["text"], "template": "{text}", "labels": tiny.LABELS} | sections.get("task", {})
        again = open_model(tmp_path / str(number), answers_of(TaskConfig(**task), ["en"]), Options(seed=7))
        module = again.build(0.0, gradient_checkpointing=False)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(again.initial_value(name))
            log_probs = module(*again.collate([one.row for one in examples(again)]).to(torch.device("cpu")))
        assert log_probs.flatten().tolist() == pytest.approx(result["log_probs"], rel=1e-3, abs=1e-4), SETTINGS[number]


@FAMILIES
@pytest.mark.parametrize("only_two", [False, True], ids=["all layers", "two kinds of layers"])
def test_the_plan_counts_what_is_trained(world: Path, scorer: str, only_two: bool) -> None:
    """Adapters of all linear layers but the head's; of a head that is new, all."""
    names = {"mt5": ["q", "v"], "t5gemma2": ["q_proj", "v_proj"]}.get(scorer, ["query", "value"])
    lora = LoraConfig(rank=3, modules=names if only_two else None)
    model, made = adapted(str(world), scorer, lora)
    with torch.device("meta"):
        module = made.build(0.0, gradient_checkpointing=False)
    trained = {name: one.numel() for name, one in module.named_parameters() if one.requires_grad}
    assert any(".lora_A." in name for name in trained)
    assert all(".lora_" in name or (scorer == "new head" and name.startswith("head.")) for name in trained)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name} >= set(names)
    section = TrainConfig(num_steps=1, learning_rate=1.0, lora=lora)
    assert model.count_parameters(model.config, model.num_head_rows, model.mode).trained(section) == sum(
        trained.values()
    )


def interrupted(group: Ranks, world: str, out: str, first: int, second: int) -> dict[str, Any]:
    """Of three steps, two at one ZeRO stage and after a checkpoint one at another: losses, and sizes of the state."""
    losses: list[float] = []
    for stage, steps in ((first, 2), (second, 1)):
        model, lora = adapted(world, "mt5")
        config = EngineConfig(zero_stage=stage, dtype="fp32")
        trained = engine.TrainEngine(engine.load_module(lora, 0.0, config, group), config, SECTION, group)
        if losses:
            found = checkpoint.newest(Path(out), {}, group)
            assert found is not None
            checkpoint.load(found[0], trained, found[1])
        else:
            trained.load_initial(lora)
        mine = examples(model)[group.rank :: group.world_size]
        for _ in range(steps):
            losses.append(group.sum(float(trained.step([loss_of(model, mine, group.device)], RATE)["loss"]))[0] / 10)
        if steps == 2:
            saver = Saver(Path(out), trained, {}, 1, Watchdog(group, Path(out), None), lambda *_: None)
            saver.begin(2)
            saver.finish()
    norms = [float(trained.state(name, ["weight"])["weight"].norm()) for name in sorted(trained.parameters)]
    return {"losses": losses, "norms": norms}


def test_a_checkpoint_of_adapters_alone_goes_on_at_another_stage(world: Path, tmp_path: Path) -> None:
    found = []
    for first, second in ((1, 1), (1, 3), (3, 0)):
        arguments = {"out": str(tmp_path / f"{first}{second}"), "first": first, "second": second}
        found.append(tiny.run_ranks(interrupted, 2, world=str(world), **arguments)[0])
    for one in found[1:]:
        assert one["losses"] == pytest.approx(found[0]["losses"], rel=1e-6)
        assert one["norms"] == pytest.approx(found[0]["norms"], rel=1e-6)
    size = sum(path.stat().st_size for path in (tmp_path / "13").rglob("*.safetensors"))
    _, lora = adapted(str(world), "mt5")
    with torch.device("meta"):
        module = lora.build(0.0, gradient_checkpointing=False)
    numel = sum(one.numel() for one in module.parameters() if one.requires_grad)
    assert 12 * numel <= size < 12 * numel + 4096  # weight and both moments in float32, and headers


def test_unknown_layers_and_a_missing_package_are_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"finetune\.lora\.modules: the model has no linear layer query; it has k, o, q"
    ):
        adapted(str(world), "mt5", LoraConfig(modules=["q", "query"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"finetune\.lora: needs the package peft; pip install 'alsace_dist\[lora\]'"):
        adapted(str(world), "mt5")


def test_a_run_with_adapters_from_its_config_to_its_report(world: Path, tmp_path: Path) -> None:
    """On two ranks of ZeRO-3; the model that is scored in the end is a whole one."""
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    sections: dict[str, Any] = {"data": data, "engine": {"zero_stage": 3, "dtype": "bf16"}}
    for name in ("finetune", "distill"):
        sections[name] = {"num_steps": 4, "learning_rate": 1e-2, "lora": {"rank": 2, "modules": ["q", "wo"]}}
    config = tiny.make_config(world, **sections) | {"run_dir": str(tmp_path / "run")}
    path = tiny.write_config(tmp_path / "c.yaml", config)
    tiny.run_all(path)
    start, end = tiny.state_of(world / "model"), tiny.state_of(tmp_path / "run/round1/distill/model")
    assert start.keys() == end.keys()
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved and all(key.endswith((".q.weight", ".wo.weight")) for key in moved)
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics["average"]["before"] != metrics["average"]["after"]
