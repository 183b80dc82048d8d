"""The engine on real ranks: gradients that no split of the batch changes, and mT5's separate head through ZeRO-3."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from alsace_dist.config import DistillConfig, EngineConfig, TaskConfig
from alsace_dist.models import collate
from alsace_dist.models import mt5 as modeling
from alsace_dist.ranks.group import Runtime
from alsace_dist.stages.train import AnswerLoss, Example
from alsace_dist.tasks import base as tasks
from alsace_dist.training import checkpoint, engine


def load(group: Runtime, model: str, settings: dict[str, Any]) -> tuple[engine.TrainEngine, Any, Any, tasks.Answers]:
    """A train engine over the small model, its tokenizer and its answers."""
    config = EngineConfig(**settings)
    tokenizer = modeling.load_tokenizer(Path(model))
    task = TaskConfig(fields=["text"], template="{text}", labels=tiny.LABELS)
    answers = tasks.encode_answers(task, tokenizer, ["en"], 0)
    module, value = engine.load_scorer(Path(model), answers, config, 0.0, group)
    section = DistillConfig(num_steps=3, global_batch_size=10, learning_rate=1e-2)
    trained = engine.TrainEngine(module, config, section, group)
    for name in trained.parameters:
        trained.load_weight(name, value(name))
    return trained, tokenizer, value, answers


def examples(tokenizer: Any) -> list[Example]:
    """Ten weighted examples of different lengths."""
    words = tiny.WORDS["en"]
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(10):
        ids = tokenizer(" ".join(words[: 1 + number % 7]))["input_ids"]
        target = torch.rand(3, generator=generator)
        found.append(Example(ids, "en", (target / target.sum()).numpy(), 0.5 + number / 10, 0.1))
    return found


def train(
    group: Runtime, model: str, engine_settings: dict[str, Any], micro_batch_size: int, num_steps: int = 2
) -> dict[str, Any]:
    """Loss of every step and, afterwards, norms and sums of every parameter and of Adam's first moment."""
    trained, tokenizer, _, answers = load(group, model, engine_settings)
    collator = collate.AnswerCollator(answers, tokenizer.pad_token_id)
    mine = examples(tokenizer)[group.rank :: group.world_size]
    chunks = [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]

    def loss_of(chunk: list[Example]) -> AnswerLoss:
        inputs = collator([example.input_ids for example in chunk], ["en"] * len(chunk))
        return AnswerLoss(inputs, chunk, 3, group.device)

    losses = []
    for _ in range(num_steps):
        total = trained.step([loss_of(chunk) for chunk in chunks], 1e-3)
        losses.append(group.sum(float(total))[0] / 10)
    state = {}
    for name in trained.parameters:
        tensors = trained.state(name)
        state[name] = [float(tensors[key].norm()) for key in sorted(tensors)] + [float(tensors["weight"].sum())]
    return {"losses": losses, "state": state, "norm": trained.gradient_norm()}


def train_each(group: Runtime, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def export_after_a_step(group: Runtime, model: str, out: str, stage: int) -> list[float]:
    """Load, take a step, export; the exported model's answer logits as the engine computes them."""
    trained, tokenizer, _, answers = load(group, model, {"dtype": "fp32", "zero_stage": stage})
    collator = collate.AnswerCollator(answers, tokenizer.pad_token_id)
    batch = examples(tokenizer)
    inputs = collator([example.input_ids for example in batch], ["en"] * 10)
    mine = batch[group.rank :: group.world_size]
    own = collator([example.input_ids for example in mine], ["en"] * len(mine))
    trained.step([AnswerLoss(own, mine, 3, group.device)], 1e-2)
    checkpoint.export(Path(out), trained, Path(model), answers.vocabulary, max_bytes=20_000)
    trained.engine.eval()
    with torch.no_grad():
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
    batch = [example.input_ids for example in examples(tokenizer)]
    logits = []
    with torch.no_grad():
        for ids in batch:
            output = plain(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]]))
            logits.append(output.logits[0, 0, rows].log_softmax(-1))
    assert torch.stack(logits).flatten().tolist() == pytest.approx(scored[0], abs=2e-5)
