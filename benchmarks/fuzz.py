"""Edit a sound world at random, run the command that reads the edit, and see that it succeeds or says why in one line.

    python benchmarks/fuzz.py --trials=200 --seed=1
    python benchmarks/fuzz.py --trials=200 --seed=1 --only=17

A trial copies a small run with every stage done, edits one thing (the config, inputs, what stages wrote, signed again
or not, a checkpoint, the environment, the words of the command, what a path is) and runs one or two commands. Each must
end within a minute with exit code 0 or one ``error:`` line, leave a person's files as they were and what is complete
verifiable, and complete nothing that makes no sense. The same seed and number make the same trial.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fuzz_oracle as oracle
import fuzz_trials
from forked import Done, Forked
from fuzz_world import RUN, SECONDS, Step, build

STOP_SECONDS = 10  # after which a command that may take long is asked to stop
MOST_BYTES = 3 << 30
PASSING = re.compile(r"/step-|/tokens$")  # what goes when a training is complete
SHOWN = 4_000  # characters of a command's output in the details of a fault


@dataclass
class Result:
    """How a trial ended. ``codes``: exit codes of its commands."""

    number: int
    kind: str
    edit: str
    codes: list[int]
    faults: list[str]
    details: dict[str, Any]


def main() -> None:
    """Run the trials, print the table, and exit with 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one trial, and print what its commands print")
    parser.add_argument("--kind", help="only trials of this class of edit")
    parser.add_argument("--out", type=Path, default=Path("fuzz-faults.json"), help="where details of faults go")
    flags = parser.parse_args()
    numbers = range(flags.trials) if flags.only is None else [flags.only]
    results = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder, Forked() as forked:
        base = Path(folder)
        build(base, forked)
        console = Console(stderr=True)
        for number in track(numbers, "trials", console=console, disable=not console.is_terminal):
            result = run_trial(flags.seed, number, base, forked, flags.kind)
            if result is None:
                continue
            results.append(result)
            if result.faults:
                faulty = [vars(result) for result in results if result.faults]
                flags.out.write_text(json.dumps(faulty, indent=1), encoding="utf-8")
            if result.faults or flags.only is not None:
                console.print(f"trial {number}: {result.kind}: {result.edit}: {result.faults}", markup=False)
            if flags.only is not None:
                print(json.dumps(result.details, indent=1, ensure_ascii=False))
    Console().print(table_of(results))
    sys.exit(any(result.faults for result in results))


def run_trial(seed: int, number: int, base: Path, forked: Forked, kind: str | None = None) -> Result | None:
    """Do one trial; None if it is not of that kind."""
    rng = random.Random(f"{seed}/{number}")
    home = base / "trial"
    world = home / "world"
    shutil.copytree(base / "world", world, symlinks=True)
    try:
        drawn, trial = fuzz_trials.make(fuzz_trials.Scene(rng, world, base))
        if kind not in (None, drawn):
            return None
        found: list[str] = []
        commands = []
        for step in trial.steps:
            done, problems = run_step(trial, step, world, forked)
            found += problems
            commands.append(
                {"words": [word[:300] for word in step.words], "environment": trial.environment} | shown(done)
            )
        codes = [command["code"] for command in commands]
        return Result(number, drawn, trial.edit, codes, found, {"seed": seed, "commands": commands})
    finally:
        os.chdir(Path(__file__).parent)
        remove(home)


def run_step(trial: fuzz_trials.Trial, step: Step, world: Path, forked: Forked) -> tuple[Done, list[str]]:
    """Run one command of a trial; how it ended, and what is wrong with it."""
    run = world / step.run
    files, complete = oracle.snapshot(world), oracle.complete(run)
    done = start(trial, step, world, forked)
    now = oracle.complete(run)
    problems = [*oracle.faults(trial, step, done), *oracle.lost(files, oracle.snapshot(world), trial)]
    problems += [f"no longer verifiable: {name}" for name in complete if name not in now and not PASSING.search(name)]
    if done.code == 0 and step.output and not trial.is_free:
        wanted = [f"{step.output}/{part}".rstrip("/") for part in step.parts]
        missing = [f"exit code 0, and {name} is not complete" for name in wanted if name not in now]
        problems += missing
        if trial.is_same and not missing:
            problems += oracle.differs(step, world, world.parents[1] / "world")
    if done.code == 0 and trial.num_rows and step.words[0] == "prepare":
        problems += oracle.too_few(run if step.output else world / f"{RUN}-of-table", trial.num_rows)
    return done, problems + list(oracle.nonsense(run, complete, now))


def start(trial: fuzz_trials.Trial, step: Step, world: Path, forked: Forked) -> Done:
    """Run a command in a forked process, or in one that Python starts."""
    environment = {"HOME": str(world.parent), "HF_ENDPOINT": "http://127.0.0.1:9"} | trial.environment
    if trial.in_new_process:
        begin = time.monotonic()
        words = [sys.executable, "-m", "alsace_dist", *step.words]
        try:
            done = subprocess.run(
                words,
                cwd=world,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
                capture_output=True,
                timeout=2 * SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Done(137, "", "", 2.0 * SECONDS, is_late=True)
        # Whatever PYTHONIOENCODING says, what is printed begins with ASCII.
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return Done(done.returncode, out, err, time.monotonic() - begin, is_late=False)
    return forked.alsace(
        *step.words,
        directory=world,
        seconds=SECONDS,
        as_rank=step.on_ranks,
        environment=environment,
        stop_after=STOP_SECONDS if trial.is_free else None,
        most_bytes=MOST_BYTES,
        as_person=trial.as_person,
    )


def shown(done: Done) -> dict[str, Any]:
    """How a command ended, for the details of a fault."""
    return {
        "code": done.code,
        "seconds": round(done.seconds, 1),
        "stdout": done.stdout[-SHOWN:],
        "stderr": done.stderr[-SHOWN:],
    }


def remove(home: Path) -> None:
    """Remove a trial's world, whatever it has become."""
    for folder, names, _ in os.walk(home):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755)
    shutil.rmtree(home)


def table_of(results: list[Result]) -> Table:
    """The classes of edits, and how their trials ended."""
    table = Table("class of edit", "trials", "succeeded", "one line", "faults")
    for kind in sorted({result.kind for result in results}):
        table.add_row(kind, *counts([result for result in results if result.kind == kind]))
    table.add_section()
    table.add_row("all", *counts(results))
    return table


def counts(results: list[Result]) -> Iterator[str]:
    """Trials, those that succeeded, those that ended with one line, and those with a fault."""
    found = Counter("faults" if one.faults else "one line" if any(one.codes) else "succeeded" for one in results)
    yield str(len(results))
    for name in ("succeeded", "one line", "faults"):
        yield str(found[name])


if __name__ == "__main__":
    main()
