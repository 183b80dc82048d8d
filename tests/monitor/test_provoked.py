"""Trainings that go wrong on purpose, through the command line: each is warned of once, with the remedy, where people
look."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import tiny

from alsace_dist.errors import EXIT_STOPPED


def make_run(world: Path, directory: Path, **sections: Any) -> Path:
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    value = tiny.make_config(world, run_dir=str(directory / "run"), data=data, **sections)
    return tiny.write_config(directory / "c.yaml", value)


def warnings(directory: Path) -> list[str]:
    path = directory / "run/warnings.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_learning_rate_far_too_high_is_seen_in_the_loss_and_in_the_answers(world: Path, tmp_path: Path) -> None:
    section = {"num_steps": 80, "learning_rate": 10.0, "warmup_ratio": 0.3, "global_batch_size": 100}
    config = make_run(world, tmp_path, finetune=section | {"log_every_steps": 1})
    said = tiny.alsace("finetune", str(config)).stderr
    shown = tiny.alsace("status", str(tmp_path / "run")).stdout
    for text in ("; if it stays there lower finetune.learning_rate", "in 'en' 100% of the answers are candidate"):
        assert said.count(text) == 1
        assert text in " ".join(shown.split())


def test_live_teachers_that_answer_one_class_like_all_others_are_seen(world: Path, tmp_path: Path) -> None:
    """Then the loss is 0, and every answer is the vote."""
    config = make_run(
        world,
        tmp_path,
        finetune={"num_steps": 60, "learning_rate": 1e-2},
        distill={
            "num_steps": 60,
            "teachers": "live",
            "learning_rate": 3.0,
            "global_batch_size": 100,
            "log_every_steps": 1,
        },
    )
    for command, round_ in (("finetune", 0), ("score", 0), ("select", 1)):
        tiny.do(command, config, round_)
    said = tiny.alsace("distill", str(config)).stderr
    assert said.count(" at first); lower distill.learning_rate") == 1


def test_ranks_that_are_held_up_are_seen_in_the_speed(world: Path, tmp_path: Path) -> None:
    section = {"num_steps": 100_000, "log_every_steps": 20, "checkpoint_every_steps": 100_000}
    config = make_run(world, tmp_path, finetune=section)
    metrics = tmp_path / "run/finetune/metrics.jsonl"
    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 8)
        ranks = [psutil.Process(rank) for rank in tiny.ranks_of(process)]
        end = time.monotonic() + 60
        while not [text for text in warnings(tmp_path) if "tokens a second, and before" in text]:
            assert time.monotonic() < end
            for rank in ranks:
                rank.suspend()
            time.sleep(0.1)
            for rank in ranks:
                rank.resume()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED
