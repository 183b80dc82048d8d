"""Training on real ranks: kills, stops and other world sizes leave no trace in the losses; broken checkpoints are said.

The loss of every step is logged, so a trace is compared step by step.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist

from alsace_dist.errors import EXIT_STOPPED
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.ranks.group import Ranks


def make_run(world: Path, directory: Path, **sections: Any) -> Path:
    directory.mkdir(parents=True)
    sections = {"data": {"inputs": [], "splits": {}, "directory": str(world / "run/data")}} | sections
    return tiny.write_config(directory / "c.yaml", tiny.make_config(world, run_dir=str(directory / "run"), **sections))


def losses(directory: Path) -> list[tuple[int, float]]:
    rows = read_scalars(directory / "run/finetune/metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on two ranks under ZeRO-2, a checkpoint every four."""
    directory = tmp_path_factory.mktemp("training") / "undisturbed"
    tiny.do("finetune", make_run(world, directory))
    return directory


def test_training_learns_and_leaves_a_complete_directory(undisturbed: Path) -> None:
    trace = losses(undisturbed)
    assert [step for step, _ in trace] == list(range(1, 13))
    assert trace[-1][1] < trace[0][1]
    assert (undisturbed / "run/finetune/manifest.json").exists()
    assert not (undisturbed / "run/finetune/checkpoints").exists()


def undisturbed_of(scorer: str, world: Path, tmp_path: Path, undisturbed: Path) -> Path:
    """What ``undisturbed`` is of mT5, of another scorer."""
    if scorer == "mt5":
        return undisturbed
    tiny.do("finetune", make_run(world, tmp_path / "undisturbed", **tiny.of_scorer(world, scorer)))
    return tmp_path / "undisturbed"


@pytest.mark.parametrize(
    ("moment", "scorer"),
    [
        ("after a checkpoint", "mt5"),
        ("during a checkpoint", "mt5"),
        ("after a checkpoint", "cloze"),
        ("during a checkpoint", "new head"),
    ],
)
def test_a_rank_killed_while_training_leaves_no_trace(
    world: Path, tmp_path: Path, undisturbed: Path, moment: str, scorer: str
) -> None:
    undisturbed = undisturbed_of(scorer, world, tmp_path, undisturbed)
    config = make_run(world, tmp_path / "x", **tiny.of_scorer(world, scorer))
    finetune = tmp_path / "x/run/finetune"
    pattern = "step-*/manifest.json" if moment == "after a checkpoint" else "step-*/.*.tmp"
    # A checkpoint of this model is written within milliseconds: one after each step, and quick eyes, to meet one.
    with tiny.started("finetune", str(config), "--finetune.checkpoint_every_steps=1") as process:
        tiny.wait_for((finetune / "started.json").exists)
        ranks = tiny.ranks_of(process)
        tiny.wait_for(lambda: any(finetune.glob(f"checkpoints/{pattern}")), every_seconds=0.001)
        assert tiny.kill_one(ranks)
        process.wait(timeout=60)
        assert process.returncode != 0
        assert process.stderr is not None
        assert "was killed by SIGKILL" in process.stderr.read().strip().splitlines()[-1]
    tiny.alsace("finetune", str(config))
    assert losses(tmp_path / "x") == losses(undisturbed)
    expected = tiny.state_of(undisturbed / "run/finetune/model")
    assert all(
        torch.equal(value, expected[key]) for key, value in tiny.state_of(tmp_path / "x/run/finetune/model").items()
    )


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "scorer"),
    [
        (0, "fp32", "mt5"),
        (1, "fp32", "mt5"),
        (1, "bf16", "mt5"),
        (2, "fp32", "mt5"),
        (3, "fp32", "mt5"),
        (1, "bf16", "cloze"),
        (3, "fp32", "cloze"),
        (2, "fp32", "new head"),
    ],
)
def test_ranks_with_unequal_numbers_of_micro_batches_train_the_same(
    world: Path, tmp_path: Path, undisturbed: Path, zero_stage: int, dtype: str, scorer: str
) -> None:
    """Of the 10 examples of a step 4, 3 and 3 go to three ranks: two micro-batches of at most 3, and one, and one."""
    undisturbed = undisturbed_of(scorer, world, tmp_path, undisturbed)
    sections = tiny.of_scorer(world, scorer) | {"finetune": {"micro_batch_size": 3}}
    settings = {"num_processes": 3, "zero_stage": zero_stage, "dtype": dtype}
    tiny.do("finetune", make_run(world, tmp_path / "x", engine=settings, **sections))
    got, wanted = losses(tmp_path / "x"), losses(undisturbed)
    tolerance = 2e-4 if dtype == "fp32" else 0.02
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in wanted], rel=tolerance)


def count_exchanges(group: Ranks, paths: list[str]) -> list[list[int]]:
    """How often the ranks exchange numbers beside those of DeepSpeed in the finetuning of each config: waiting for
    them, and going on meanwhile."""
    found, all_reduce = list[list[int]](), dist.all_reduce

    def counting(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        found[-1][async_op] += group is control
        return all_reduce(tensor, op, group=group, async_op=async_op)

    control, dist.all_reduce = group.control, counting
    try:
        for path in paths:
            found.append([0, 0])
            tiny.stage_on_rank(group, path, "finetune", 0, "")
    finally:
        dist.all_reduce = all_reduce
    return found


def test_a_step_waits_for_no_exchange(world: Path, tmp_path: Path) -> None:
    """Of whether to stop, whether a checkpoint is written, and who has most micro-batches: one, while a step is
    computed."""
    rare = {"log_every_steps": 1000, "checkpoint_every_steps": 1000}
    paths = [str(make_run(world, tmp_path / str(steps), finetune={"num_steps": steps} | rare)) for steps in (3, 10)]
    few, many = tiny.run_ranks(count_exchanges, 2, paths=paths)[0]
    assert [after - before for before, after in zip(few, many, strict=True)] == [0, 7]


def test_a_frozen_vocabulary_is_exported_as_it_was(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x", engine={"zero_stage": 3, "gradient_checkpointing": True})
    tiny.alsace("finetune", str(config), "--finetune.freeze_vocabulary=true")
    before, after = tiny.state_of(world / "model"), tiny.state_of(tmp_path / "x/run/finetune/model")
    assert before.keys() == after.keys()
    assert torch.equal(after["shared.weight"], before["shared.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert losses(tmp_path / "x")[-1][1] < losses(tmp_path / "x")[0][1]


def test_a_stop_before_the_ranks_are_ready_is_not_forgotten(world: Path, tmp_path: Path) -> None:
    """Importing torch takes seconds; what comes in meanwhile reaches a rank as soon as it can take it."""
    config = make_run(world, tmp_path / "x", finetune={"num_steps": 400, "checkpoint_every_steps": 1000})
    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(lambda: len(tiny.ranks_of(process)) >= 2)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=60) == EXIT_STOPPED
    assert not (tmp_path / "x/run/finetune/manifest.json").exists()


def test_a_stop_too_late_for_a_stage_keeps_the_next_from_starting(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x")
    with tiny.started("run", str(config)) as process:
        tiny.wait_for((tmp_path / "x/run/finetune/model").exists, every_seconds=0.001)  # it is writing its result
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED
    assert (tmp_path / "x/run/finetune/manifest.json").exists()
    assert not (tmp_path / "x/run/scores").exists()


def test_a_checkpoint_that_does_not_verify_takes_no_good_ones_place(world: Path, tmp_path: Path) -> None:
    """The newest of two is broken, and only one is kept: that must be the one written after going on from the good."""
    config = make_run(world, tmp_path / "x", finetune={"num_steps": 400, "checkpoint_every_steps": 2})
    with tiny.started("finetune", str(config), "--finetune.keep_checkpoints=2") as process:
        tiny.wait_for(lambda: len(list((tmp_path / "x/run/finetune/checkpoints").glob("*/manifest.json"))) >= 2)
        process.send_signal(signal.SIGUSR2)
        process.wait(timeout=60)
    older, newest = sorted(path.parent for path in (tmp_path / "x/run/finetune/checkpoints").glob("*/manifest.json"))
    next(newest.glob("rank00001-*.safetensors")).unlink()
    copy = shutil.copytree(older, older.parent / "step-00000002-best")  # a person's
    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(lambda: not newest.exists() and not older.exists())
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=60) == EXIT_STOPPED
    (kept,) = {path.parent for path in older.parent.glob("*/manifest.json")} - {copy}
    assert kept.name > older.name
    with tiny.started("finetune", str(config)) as process:  # and it is one to go on from
        tiny.wait_for(lambda: not kept.exists())


def test_a_loss_that_is_no_number_ends_training(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x", finetune={"learning_rate": 1e30, "max_gradient_norm": 0.0})
    failed = tiny.alsace("finetune", str(config), check=False)
    assert failed.returncode == 2, failed.stderr
    assert "lower finetune.learning_rate" in failed.stderr.strip().splitlines()[-1]


def stop_after_first_step(config: Path, run: Path) -> None:
    metrics = run / "finetune/metrics.jsonl"
    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=60) == EXIT_STOPPED
        assert process.stderr is not None
        assert "stopped after step" in process.stderr.read().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("first", "second", "scorer"),
    [((2, 2), (1, 2), "mt5"), ((3, 2), (0, 1), "mt5"), ((0, 1), (3, 3), "mt5"), ((3, 2), (1, 1), "cloze")],
)
def test_a_stopped_run_goes_on_with_other_ranks_and_another_zero_stage(
    world: Path, tmp_path: Path, first: tuple[int, int], second: tuple[int, int], scorer: str
) -> None:
    sections = tiny.of_scorer(world, scorer) | {"finetune": {"num_steps": 40, "checkpoint_every_steps": 1000}}
    config, expected = (make_run(world, tmp_path / name, **sections) for name in ("x", "y"))

    def set_engine(path: Path, stage: int, ranks: int) -> Path:
        value = tiny.yaml.safe_load(path.read_text())
        value["engine"] |= {"zero_stage": stage, "num_processes": ranks}
        return tiny.write_config(path, value)

    stop_after_first_step(set_engine(config, *first), tmp_path / "x/run")
    (checkpoint,) = (tmp_path / "x/run/finetune/checkpoints").iterdir()
    tiny.do("finetune", set_engine(config, *second))
    tiny.do("finetune", set_engine(expected, *first))
    got, wanted = losses(tmp_path / "x"), losses(tmp_path / "y")
    assert [step for step, _ in got] == [step for step, _ in wanted] == list(range(1, 41))
    assert 1 <= int(checkpoint.name.removeprefix("step-")) < 40
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in wanted], rel=2e-4)


def test_what_a_person_keeps_beside_ours_outlives_the_training(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x", finetune={"num_steps": 40, "checkpoint_every_steps": 1000})
    finetune = tmp_path / "x/run/finetune"
    stop_after_first_step(config, tmp_path / "x/run")
    (checkpoint,) = (finetune / "checkpoints").iterdir()
    shutil.copytree(checkpoint, finetune / "checkpoints/before-lr-change")
    theirs = [finetune / name for name in ("checkpoints/notes.txt", "model/notes.txt", "hang/rank-notes.txt")]
    stale = finetune / "model/part-00007.safetensors"
    for path in [*theirs, stale]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("theirs")
    tiny.do("finetune", config)
    assert all(path.read_text() == "theirs" for path in theirs)
    assert (finetune / "checkpoints/before-lr-change/manifest.json").exists()
    assert not checkpoint.exists()
    assert not stale.exists()
    assert "model/notes.txt" not in json.loads((finetune / "manifest.json").read_text())["files"]


def test_a_checkpoint_that_lacks_a_file_is_an_error(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x", finetune={"num_steps": 400, "checkpoint_every_steps": 1000})
    stop_after_first_step(config, tmp_path / "x/run")
    (checkpoint,) = (tmp_path / "x/run/finetune/checkpoints").iterdir()
    part = next(checkpoint.glob("rank00001-*.safetensors"))
    content = part.read_bytes()
    for damage in (None, content[:-5] + b"abcde"):
        part.unlink() if damage is None else part.write_bytes(damage)
        failed = tiny.alsace("finetune", str(config), check=False)
        assert failed.returncode == 2
        last = failed.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: {part}: ")
        assert "restore the file, or delete" in last
        assert "Traceback" not in failed.stderr


def test_a_full_disk_ends_training_and_keeps_what_was_there(world: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Room for one checkpoint and not for two. With more room the same command finishes, with the same losses."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=True)
    try:
        config = make_run(world, tmp_path / "x")
        failed = tiny.alsace("finetune", str(config), f"--run_dir={disk / 'run'}", check=False)
        assert failed.returncode == 2, failed.stderr
        last = failed.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "step-00000008: a checkpoint takes" in last and "; free space" in last, failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (disk / "run/finetune/manifest.json").exists()
        kept = [path.parent.name for path in (disk / "run/finetune").glob("checkpoints/*/manifest.json")]
        assert kept == ["step-00000004"]
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        tiny.alsace("finetune", str(config), f"--run_dir={disk / 'run'}")
        assert losses(disk) == losses(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_memory_is_one_line_that_says_what_takes_less(world: Path, tmp_path: Path) -> None:
    """Matrices of 40 GB each, with a limit of 20 GB for machines that promise more than they have."""
    splits = {"pretrain": 15, "labeled": 30, "unlabeled": 40, "test": 30}
    value = tiny.make_config(
        world,
        run_dir=str(tmp_path / "run"),
        model={"nano": {"vocab_size": 140, "d_model": 100_000, "d_ff": 100_000}},
        data={"splits": splits},
    )
    del value["model"]["path"]
    config = tiny.write_config(tmp_path / "c.yaml", value)
    tiny.alsace("prepare", str(config))
    command = f"ulimit -v {2 * 10**7}; exec {sys.executable} -m alsace_dist pretrain-nano {config}"
    failed = subprocess.run(
        ["bash", "-c", command], env=tiny.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert re.match(
        r"error: rank \d: out of memory \(tried to allocate \d+ bytes\); lower tokens_per_micro_batch", last
    ), last
    assert "Traceback" not in failed.stderr


def test_an_unwritable_directory_is_an_error(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x")
    (tmp_path / "file").write_text("in the way")
    failed = tiny.alsace("finetune", str(config), f"--run_dir={tmp_path / 'file' / 'run'}", check=False)
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'file'}")
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_changed_setting_is_refused_and_named(world: Path, tmp_path: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "x")
    config = tiny.yaml.safe_load((tmp_path / "x/c.yaml").read_text()) | {"run_dir": str(tmp_path / "x/run")}
    path = tiny.write_config(tmp_path / "x/c.yaml", config)
    assert "complete, skipped" in tiny.alsace("finetune", str(path)).stderr
    failed = tiny.alsace("finetune", str(path), "--finetune.learning_rate=0.5", check=False)
    assert failed.returncode == 2
    assert "section.learning_rate: 0.001 -> 0.5" in failed.stderr.strip().splitlines()[-1]
