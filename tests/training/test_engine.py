"""The engine on real ranks: gradients that no split of the batch changes, and mT5's separate head through ZeRO-3."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from alsace_dist.config import DistillConfig, EngineConfig, TaskConfig
from alsace_dist.data.rows import Example, Part, Row, answers_of
from alsace_dist.models.family import Family, open_model
from alsace_dist.ranks.group import Ranks
from alsace_dist.training import engine
from alsace_dist.training.export import export
from alsace_dist.training.losses import FrozenTargetLoss

ANSWERS = answers_of(TaskConfig(fields=["text"], template="{text}", labels=tiny.LABELS), ["en"])
EMBEDDING = "body.shared.weight"
# With the start token alone, self-attention of the decoder sees one position: its softmax is constant.
CONSTANT = {
    f"body.decoder.block.0.layer.0.SelfAttention.{name}.weight" for name in ("q", "k", "relative_attention_bias")
}


def load(
    group: Ranks, directory: str, settings: dict[str, Any], freeze_vocabulary: bool = False
) -> tuple[engine.TrainEngine, Family]:
    """A train engine over the small model, as the training loop makes it."""
    config = EngineConfig(**settings)
    model = open_model(Path(directory), ANSWERS)
    module = engine.load_module(model, 0.0, config, group)
    for name in model.vocabulary if freeze_vocabulary else ():
        module.get_parameter(name).requires_grad_(False)
    section = DistillConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2)
    trained = engine.TrainEngine(module, config, section, group)
    for name in trained.parameters:
        trained.load_weight(name, model.initial_value(name))
    return trained, model


def text_of(words: list[str]) -> tuple[Part, ...]:
    """A prompt of nothing but an example's text."""
    return (Part(" ".join(words), True),)


def examples(model: Family) -> list[Example]:
    """Ten weighted examples of different lengths."""
    words, answers = tiny.WORDS["en"], ANSWERS.fixed["en"]
    rows = [Row(f"g{number}", "en", None, text_of(words[: 1 + number % 7]), answers) for number in range(10)]
    generator = torch.Generator().manual_seed(5)
    found = []
    for number, row in enumerate(model.encode(rows)):
        target = torch.rand(3, generator=generator)
        found.append(Example(row, (target / target.sum()).numpy(), 0.5 + number / 10, 0.1))
    return found


def loss_of(model: Family, chunk: list[Example], group: Ranks) -> FrozenTargetLoss:
    return FrozenTargetLoss(model.collate([example.row for example in chunk]), chunk, group.device)


def train(
    group: Ranks,
    model: str,
    engine_settings: dict[str, Any],
    micro_batch_size: int,
    num_steps: int = 2,
    freeze_vocabulary: bool = False,
) -> dict[str, Any]:
    """Loss of every step and, afterwards, norms and sums of every parameter and of Adam's first moment.

    Also how often the encoder's first block was computed, and how far each parameter is from where it started.
    """
    trained, opened = load(group, model, engine_settings, freeze_vocabulary)
    mine = examples(opened)[group.rank :: group.world_size]
    chunks = [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]
    calls = []
    block = trained.engine.module.body.encoder.block[0]
    hook = block.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    losses = []
    for _ in range(num_steps):
        total = trained.step([loss_of(opened, chunk, group) for chunk in chunks], 1e-3)["loss"]
        losses.append(group.sum(float(total))[0] / 10)
    hook.remove()
    state = {}
    for name in trained.parameters:
        tensors = trained.state(name)
        state[name] = [float(tensors[key].norm()) for key in sorted(tensors)] + [float(tensors["weight"].sum())]
    moved = {}
    for name, parameter in trained.engine.module.named_parameters():
        with engine.gathered(parameter, EngineConfig(**engine_settings)):
            moved[name] = float((parameter.detach().float().cpu() - opened.initial_value(name)).abs().max())
    result = {"losses": losses, "state": state, "norm": trained.gradient_norm()}
    return result | {"moved": moved, "num_calls": len(calls)}


def train_each(group: Ranks, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``train`` with each of these arguments, one engine after the other on the same ranks."""
    return [train(group, model, **run) for run in runs]


def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(world: Path) -> None:
    """Adam's moments are running sums of gradients: equal moments after two steps mean equal gradients."""
    model = str(world / "model")
    splits = [(0, 5), (0, 1), (2, 5), (2, 1), (3, 5), (3, 1), (1, 2)]
    runs = [
        {"engine_settings": {"dtype": "fp32", "zero_stage": stage}, "micro_batch_size": micro}
        for stage, micro in [(0, 10), *splits]
    ]
    (expected,) = tiny.run_ranks(train_each, 1, model=model, runs=runs[:1])[0]
    results = tiny.run_ranks(train_each, 2, model=model, runs=runs[1:])[0]
    assert expected["losses"][1] < expected["losses"][0]
    for split, result in zip(splits, results, strict=True):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), split
        assert result["state"].keys() == expected["state"].keys()
        for name, values in expected["state"].items():
            assert result["state"][name] == pytest.approx(values, rel=2e-3, abs=1e-6), (split, name)


def test_bf16_and_offload_train_alike_at_every_stage(world: Path) -> None:
    settings = [
        {"zero_stage": 0, "dtype": "bf16"},
        {"zero_stage": 1, "dtype": "bf16"},
        {"zero_stage": 2, "dtype": "bf16", "offload_optimizer": True},
        {"zero_stage": 3, "dtype": "bf16", "offload_optimizer": True},
    ]
    runs = [{"engine_settings": one, "micro_batch_size": 5, "num_steps": 3} for one in settings]
    results = tiny.run_ranks(train_each, 2, model=str(world / "model"), runs=runs)[0]
    for one, result in zip(settings, results, strict=True):
        assert result["losses"] == pytest.approx(results[0]["losses"], rel=0.02), one
        assert result["losses"][2] < result["losses"][0]


@pytest.mark.parametrize("freeze_vocabulary", [False, True], ids=["all trained", "embedding frozen"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(world: Path, freeze_vocabulary: bool) -> None:
    """At every ZeRO stage; a frozen embedding stays as it is, without state, and all the rest is trained."""
    frozen = {EMBEDDING} if freeze_vocabulary else set()
    more = {"micro_batch_size": 3, "num_steps": 3, "freeze_vocabulary": freeze_vocabulary}
    runs = [
        {"engine_settings": {"dtype": "fp32", "zero_stage": stage, "gradient_checkpointing": checkpointing}} | more
        for stage in range(4)
        for checkpointing in (False, True)
    ]
    for results in tiny.run_ranks(train_each, 2, model=str(world / "model"), runs=runs):
        for stage in range(4):
            plain, checkpointed = results[2 * stage : 2 * stage + 2]
            assert plain["losses"][2] < plain["losses"][1] < plain["losses"][0]
            assert checkpointed["losses"] == pytest.approx(plain["losses"], rel=1e-6), stage
            assert checkpointed["norm"] == pytest.approx(plain["norm"], rel=1e-6, nan_ok=True), stage
            assert (plain["num_calls"], checkpointed["num_calls"]) == (3 * 2, 3 * 2 * 2), stage
            for name, values in plain["state"].items():
                assert checkpointed["state"][name] == pytest.approx(values, rel=1e-6, abs=1e-9), (stage, name)
            for result in (plain, checkpointed):
                assert result["state"].keys() == result["moved"].keys() - frozen, stage
                assert {name for name, distance in result["moved"].items() if distance == 0} == frozen | CONSTANT


def what_is_missing(group: Ranks) -> list[str]:
    """What is said when DeepSpeed's optimizers have lost each of the attributes that the layouts are built on."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])

    class Wrapped:
        fp16_groups = ()
        single_partition_of_fp32_groups = ()

    assert engine.private(Wrapped(), "gone", "fp16_groups") == ()
    said = []
    for layout in engine._STATES.values():
        with pytest.raises(RuntimeError) as caught:
            layout(Wrapped(), optimizer, {}, group)
        said.append(str(caught.value))
    return said


def test_a_deepspeed_without_what_is_built_on_is_named_with_its_version() -> None:
    whole, partitioned, sharded = tiny.run_ranks(what_is_missing, 1)[0]
    form = f"DeepSpeed {re.escape(version('deepspeed'))}: Wrapped has no {{}}; install a version in the range of "
    assert re.match(form.format("fp32_groups"), whole)
    assert re.match(form.format("_lazy_init_hp_params_optimizer_state"), partitioned)
    assert re.match(form.format("fp32_partitioned_groups_flat"), sharded)


def export_after_a_step(group: Ranks, model: str, out: str, stage: int) -> list[float]:
    """Load, take a step, export; the exported model's answer logits as the engine computes them."""
    trained, opened = load(group, model, {"dtype": "fp32", "zero_stage": stage})
    batch = examples(opened)
    trained.step([loss_of(opened, batch[group.rank :: group.world_size], group)], 1e-2)
    export(Path(out), trained, opened, max_bytes=20_000)
    trained.engine.eval()
    with torch.no_grad():
        inputs = opened.collate([example.row for example in batch])
        log_probs: list[float] = trained.engine(*inputs.to(group.device)).flatten().tolist()
    return log_probs


@pytest.mark.parametrize("stage", [2, 3])
def test_the_separate_head_survives_training_and_export(world: Path, tmp_path: Path, stage: int) -> None:
    from transformers import AutoTokenizer, MT5ForConditionalGeneration

    model, out = str(world / "model"), str(tmp_path / "out")
    scored = tiny.run_ranks(export_after_a_step, 2, model=model, out=out, stage=stage)
    assert scored[0] == scored[1]
    before = MT5ForConditionalGeneration.from_pretrained(model)
    plain = MT5ForConditionalGeneration.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tmp_path / "out/model.safetensors.index.json").exists()  # the small limit makes several files
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    rows = [tokenizer.convert_tokens_to_ids(label) for label in tiny.LABELS]
    others = [row for row in range(len(plain.lm_head.weight)) if row not in rows]
    assert torch.equal(plain.lm_head.weight[others], before.lm_head.weight[others])
    assert not torch.equal(plain.lm_head.weight[rows], before.lm_head.weight[rows])
    assert not torch.equal(plain.shared.weight, before.shared.weight)
    batch = [example.row.input_ids for example in examples(open_model(tmp_path / "out", ANSWERS))]
    logits = []
    with torch.no_grad():
        for ids in batch:
            output = plain(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]]))
            logits.append(output.logits[0, 0, rows].log_softmax(-1))
    assert torch.stack(logits).flatten().tolist() == pytest.approx(scored[0], abs=2e-5)
