"""A gradient that is not finite changes nothing, at any ZeRO stage; a training stops there, or counts it and goes on;
and its examples can be looked at."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training import test_engine

from alsace_dist.errors import EXIT_USER_ERROR
from alsace_dist.files.shards import open_dataset, read_shards
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.ranks.group import Ranks

POISON = "красный"  # no English text holds it but one


def trained_with_and_without(
    group: Ranks, world: str, scorer: str, settings: dict[str, Any], bad_rank: int
) -> dict[str, Any]:
    """The state after two steps, and after two with one between them whose gradient is not finite on one rank."""
    states, applied, skipped = [], [], []
    for with_bad in (False, True):
        trained, model = test_engine.load(group, world, scorer, settings)
        mine = test_engine.examples(model)[group.rank :: group.world_size]
        loss = test_engine.loss_of(model, mine, group)

        def bad(module: nn.Module, loss: Any = loss) -> dict[str, torch.Tensor]:
            sums: dict[str, torch.Tensor] = loss(module)
            return {"loss": sums["loss"] * (torch.inf if group.rank == bad_rank else 1.0)}

        for losses in ([loss], [bad], [loss]) if with_bad else ([loss], [loss]):
            trained.step(losses, 1e-3)
            applied.append(trained.is_applied)
        skipped.append(trained.num_skipped)
        states.append({name: trained.state(name) for name in trained.parameters})
    before, after = states
    equal = all(torch.equal(value, after[name][key]) for name in before for key, value in before[name].items())
    return {"equal": equal and before.keys() == after.keys(), "applied": applied, "skipped": skipped}


@pytest.mark.parametrize(
    ("stage", "dtype", "scorer", "more"),
    [
        (0, "fp32", "mt5", {}),
        (0, "bf16", "mt5", {}),
        (1, "fp32", "cloze", {}),
        (1, "bf16", "mt5", {}),
        (2, "fp32", "mt5", {}),
        (2, "bf16", "head", {}),
        (3, "fp32", "mt5", {}),
        (3, "bf16", "t5gemma2", {}),
        (2, "fp32", "mt5", {"offload_optimizer": True}),
        (3, "fp32", "mt5", {"offload_optimizer": True}),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    world: Path, stage: int, dtype: str, scorer: str, more: dict[str, Any]
) -> None:
    settings = {"zero_stage": stage, "dtype": dtype} | more
    found = tiny.run_ranks(trained_with_and_without, 2, world=str(world), scorer=scorer, settings=settings, bad_rank=1)
    expected = {"equal": True, "applied": [True, True, True, False, True], "skipped": [0, 1]}
    assert found == [expected, expected]


@pytest.fixture(scope="module")
def poisoned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world, but one labelled English text holds a word whose embedding is so large that twice
    as much is infinite; and its key."""
    directory = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(world / "model", directory / "model")
    labeled = [group.key for groups in read_shards(open_dataset(world / "run/data/labeled")) for group in groups]
    key = sorted(labeled)[7]
    records = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    for record in records:
        if record["id"] == key:
            record["texts"]["en"]["text"] += f" {POISON}"
    (directory / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(directory / "model").encode(POISON, add_special_tokens=False)
    tensors = load_file(directory / "model/model.safetensors")
    tensors["shared.weight"][token[-1]] = 3e38
    save_file(tensors, directory / "model/model.safetensors", {"format": "pt"})
    tiny.alsace("prepare", str(tiny.write_config(directory / "prepare.yaml", tiny.make_config(directory))))
    (directory / "key").write_text(key)
    return directory


def make_run(poisoned: Path, directory: Path, **finetune: Any) -> Path:
    sections = {"data": {"inputs": [], "splits": {}, "directory": str(poisoned / "run/data")}}
    value = tiny.make_config(poisoned, run_dir=str(directory / "run"), finetune=finetune, **sections)
    directory.mkdir(exist_ok=True)
    return tiny.write_config(directory / "c.yaml", value)


def test_a_training_that_is_to_skip_counts_and_goes_on(poisoned: Path, tmp_path: Path) -> None:
    """Also after a stop and a start: Adam has taken fewer steps than the loop."""
    config = make_run(poisoned, tmp_path / "whole", on_nonfinite="skip")
    found = tiny.alsace("finetune", str(config))
    assert len(re.findall(r"^warning: finetune: step \d+ is skipped", found.stderr, re.MULTILINE)) == 1
    rows = read_scalars(tmp_path / "whole/run/finetune/metrics.jsonl")
    assert len(rows) == 12 and rows[-1]["skipped_steps"] == 3  # of 12 steps of 10 of 40 examples, each has three
    config = make_run(
        poisoned, tmp_path / "stopped", on_nonfinite="skip", checkpoint_every_steps=1, keep_checkpoints=50
    )
    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(
            lambda: any((tmp_path / "stopped").glob("run/finetune/checkpoints/step-0000000[4-9]/manifest.json"))
        )
        process.terminate()
        process.wait(timeout=60)
    tiny.alsace("finetune", str(config))
    other = read_scalars(tmp_path / "stopped/run/finetune/metrics.jsonl")
    assert [(row["step"], row["loss"], row["skipped_steps"]) for row in other] == [
        (row["step"], row["loss"], row["skipped_steps"]) for row in rows
    ]


def test_a_training_that_is_to_stop_says_where_and_its_examples_can_be_looked_at(
    poisoned: Path, tmp_path: Path
) -> None:
    config = make_run(poisoned, tmp_path)
    run = tmp_path / "run"
    for _ in range(2):  # the second start meets it at once
        found = tiny.alsace("finetune", str(config), check=False)
        assert found.returncode == EXIT_USER_ERROR
        (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
        said = re.fullmatch(
            r"error: finetune: the gradient is no finite number, at step (\d+) \(listed in "
            rf"{re.escape(str(run))}/finetune/not-finite\.json\); the state before it is kept, and `alsace replay "
            rf"{re.escape(str(run))} --stage=finetune --step=(\d+)` shows its examples; "
            r"set finetune\.on_nonfinite: skip to go on from there; a lower finetune\.learning_rate means to start "
            r"over: delete \S+/finetune",
            line,
        )
        assert said and said[1] == said[2]
    step, key = int(said[1]), (poisoned / "key").read_text()
    kept = json.loads((run / f"finetune/checkpoints/step-{step - 1:08d}/manifest.json").read_text())["details"]
    assert kept == {"step": step - 1}  # the step that is not kept was not skipped
    listed = json.loads((run / "finetune/not-finite.json").read_text())
    assert listed["step"] == step and [key, "en"] in listed["examples"] and len(listed["examples"]) == 10
    shown = tiny.alsace("replay", str(run), "--stage=finetune", f"--step={step}").stdout.splitlines()
    weights = f"after step {step - 1}" if step > 1 else "at the start"
    assert shown[0].strip() == f"Examples of step {step}, with the weights {weights}"
    rows = [line.split() for line in shown[2:] if line.strip()]
    assert rows[0][:2] == [key, "en"] and rows[0][-1] == "inf"
    assert sorted(row[0] for row in rows) == sorted(key for key, _ in listed["examples"])
    assert all(float(row[-1]) > 0 for row in rows[1:]) and "inf" not in {row[-1] for row in rows[1:]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step=0"], "--step=0: which step? They count from 1"),
        (["--step=2", "--stage=score"], "--stage=score: replay is for finetune and distill"),
        (["--step=2", "--stage=finetune"], "finetune: has not begun in "),
        (["--step=2", "--round=7"], "has no stage 'distill' with round 7"),
    ],
)
def test_what_cannot_be_replayed_is_said(poisoned: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(make_run(poisoned, tmp_path).read_text())
    found = tiny.alsace("replay", str(tmp_path / "run"), *arguments, check=False)
    assert found.returncode == EXIT_USER_ERROR and said in found.stderr.splitlines()[-1]
