"""The world that the fuzz benchmark edits: data, a model, a config and a run with every stage done; and how each stage
is done once more."""

import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from forked import Done, Forked

CONFIG, DATA, TABLE, MODEL, RUN = "run.yaml", "data.jsonl", "data.csv", "model", "run"
NANO, NANO_RUN = "nano.yaml", "nano-run"  # a run that makes its model from nothing, with its data prepared
PROFILE = "cluster.yaml"
STOPPED = "stopped"  # beside the world: stages that were stopped after a checkpoint, by the name of their step
SECONDS = 60  # in which a command must have ended, whatever it was given


@dataclass(frozen=True)
class Step:
    """A command that does a stage of the world's run, or looks at it. ``output``: the directory that it writes, below
    the run; ``parts``: the directories in there that it completes."""

    words: tuple[str, ...]
    output: str = ""
    on_ranks: bool = False
    parts: tuple[str, ...] = ("",)
    run: str = RUN


STEPS = {
    "prepare": Step(("prepare", CONFIG), "data", parts=("", "labeled", "unlabeled", "test")),
    "finetune": Step(("finetune", CONFIG), "finetune", True),
    "score": Step(("score", CONFIG), "scores", True, ("unlabeled", "test")),
    "select": Step(("select", CONFIG), "round1/selection"),
    "distill": Step(("distill", CONFIG), "round1/distill", True),
    "score 1": Step(("score", CONFIG, "--round=1"), "round1/scores", True, ("unlabeled", "test")),
    "calibrate": Step(("calibrate", CONFIG), "calibration"),
    "evaluate": Step(("evaluate", CONFIG), "evaluation"),
    "select paper": Step(("select", CONFIG, "--variant=paper"), "variants/paper/round1/selection"),
    "distill paper": Step(("distill", CONFIG, "--variant=paper"), "variants/paper/round1/distill", True),
    "pretrain": Step(("pretrain-nano", NANO), "pretrain", True, run=NANO_RUN),
    "report": Step(("report", RUN)),
    "status": Step(("status", RUN)),
    "plan": Step(("plan", CONFIG)),
    "dry run": Step(("run", CONFIG, "--dry-run")),
    "submit": Step(("submit", CONFIG, f"--cluster={PROFILE}", "--dry-run")),
}
LOOKS = ("report", "status", "plan", "dry run")

# What is read by which steps: the beginning of a path in the world -> steps. The first that fits counts.
READERS = {
    CONFIG: ("prepare", "finetune", "score", "select", "evaluate", "plan", "dry run"),
    NANO: ("pretrain",),
    PROFILE: ("submit",),
    f"{NANO_RUN}/data/pretrain": ("pretrain",),
    DATA: ("prepare",),
    MODEL: ("finetune",),
    f"{RUN}/data/labeled": ("finetune",),
    f"{RUN}/data/unlabeled": ("score", "distill", "score 1", "distill paper"),
    f"{RUN}/data/test": ("score", "score 1"),
    f"{RUN}/data": ("report", "dry run"),
    f"{RUN}/finetune": ("score", "distill", "distill paper"),
    f"{RUN}/scores/unlabeled": ("select", "distill", "select paper", "distill paper"),
    f"{RUN}/variants/paper/round1/selection": ("distill paper",),
    f"{RUN}/scores": ("evaluate",),
    f"{RUN}/round1/selection": ("distill", "evaluate"),
    f"{RUN}/round1/distill": ("score 1",),
    f"{RUN}/round1/scores/unlabeled": ("calibrate",),
    f"{RUN}/round1/scores": ("evaluate",),
    f"{RUN}/calibration": ("evaluate",),
    f"{RUN}/evaluation": ("report",),
    f"{RUN}/config.yaml": ("report", "status", "select", "finetune"),
    RUN: ("report", "status", "dry run"),
}


def readers(path: str) -> tuple[str, ...]:
    """Steps that read a file or directory of the world."""
    return next((steps for start, steps in READERS.items() if path.startswith(start)), LOOKS)


def build(directory: Path, forked: Forked) -> None:
    """Write ``world`` and ``stopped`` into a directory. A command of it that fails ends this program."""
    world = directory / "world"
    world.mkdir()
    tiny.write_world(world)
    write_table(world)
    training = {"num_steps": 4, "checkpoint_every_steps": 2}
    value = tiny.make_config(
        Path(),
        engine={"num_processes": 1, "zero_stage": 1},
        finetune=training,
        distill=training,
        evaluate={"calibrate": True, "num_resamples": 50},
        variants={"paper": {"method": "paper", "evaluate": {"calibrate": False}}},
    )
    tiny.write_config(world / CONFIG, value)
    write_nano(world, value)
    (world / PROFILE).write_text("partition: main\ngpus_per_node: 2\ntime: {default: '2:00:00'}\nsmall: {cpus: 2}\n")
    (world / RUN / "notes").mkdir(parents=True)
    (world / RUN / "notes/mine.txt").write_text("a person's own\n")
    (world / MODEL / "README.md").write_text("a person's own\n")
    forked.alsace("prepare", NANO, directory=world)
    for name, step in STEPS.items():
        if step.on_ranks and name in ("finetune", "distill"):
            stop(step, world, forked)
            shutil.copytree(world / RUN / step.output, directory / STOPPED / name)
        done = do(step, world, forked)
        if done.code:
            sys.exit(f"{name} failed in a sound world: {done.stderr}")


def write_nano(world: Path, value: dict[str, Any]) -> None:
    """A config for a model from nothing, over the same data."""
    nano = {"vocab_size": 150, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1}
    value = value | {
        "run_dir": NANO_RUN,
        "model": {"nano": nano},
        "data": value["data"] | {"splits": {"pretrain": 45, "labeled": 20, "unlabeled": 25, "test": 25}},
        "pretrain": {"num_steps": 3, "global_batch_size": 8},
    }
    tiny.write_config(world / NANO, value)


def write_table(world: Path) -> None:
    """The data as CSV in long form."""
    with (world / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "language", "label", "text"))
        for line in (world / DATA).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for language, fields in record["texts"].items():
                writer.writerow((record["id"], language, record["label"], fields["text"]))


def do(step: Step, world: Path, forked: Forked, **options: Any) -> Done:
    """Run a step's command in a world."""
    return forked.alsace(*step.words, directory=world, as_rank=step.on_ranks, seconds=SECONDS, **options)


def stop(step: Step, world: Path, forked: Forked) -> None:
    """Begin a training and stop it after a checkpoint."""
    output = world / RUN / step.output
    lock = world / RUN / ".locks" / ("finetune" if step.output == "finetune" else "distill-round-1")

    def ask() -> None:
        while not (output / "tokens/manifest.json").exists():  # what comes now is training
            time.sleep(0.001)
        os.kill(int(lock.read_text().split()[1]), signal.SIGTERM)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    done = do(step, world, forked)
    if done.code != 75 or not list(output.glob("checkpoints/step-*/manifest.json")):
        sys.exit(f"{step.words}: was not stopped after a checkpoint: {done.stderr}")
