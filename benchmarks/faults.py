"""Kill random ranks at random moments, run the same command again, compare with an undisturbed run.

    python benchmarks/faults.py --trials=50

A trial kills one rank of a scoring or a training group with SIGKILL at a random moment of the time that an undisturbed
run takes (training saves a checkpoint every other step, so many kills fall into one), up to three times, and then lets
the command finish. It fails if the score bytes or the losses differ from the undisturbed run's, or if a group outlives
its killed rank by 60 seconds.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny

from alsace_dist.monitor.sinks import METRICS, read_scalars

MAX_HANG_SECONDS = 60


def main() -> None:
    """Run the trials and print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        tiny.write_world(world)
        tiny.alsace("prepare", str(tiny.write_config(world / "c.yaml", tiny.make_config(world))))
        expected, seconds_of = {}, {}
        for command in ("score", "finetune"):
            config, run = make_run(command, world, f"undisturbed-{command}")
            begin = time.monotonic()
            tiny.alsace(command, str(config))
            seconds_of[command] = time.monotonic() - begin
            expected[command] = outcome(command, run)
        num_kills = num_failed = 0
        longest = 0.0
        for trial in range(flags.trials):
            command = ("score", "finetune")[trial % 2]
            config, run = make_run(command, world, f"trial{trial}")
            for _ in range(rng.randint(1, 3)):
                killed, seconds = disturb(command, config, rng.uniform(0.1, 1.0) * seconds_of[command], rng)
                num_kills += killed
                longest = max(longest, seconds)
            tiny.alsace(command, str(config))
            good = outcome(command, run) == expected[command] and longest < MAX_HANG_SECONDS
            num_failed += not good
            print(f"trial {trial + 1}/{flags.trials}: {command}: {'same' if good else 'DIFFERENT'}", flush=True)
            shutil.rmtree(run)
    print(
        f"{flags.trials} trials, {num_kills} ranks killed, {num_failed} trials failed, "
        f"longest end of a group after a kill {longest:.1f} s"
    )
    sys.exit(num_failed > 0)


def make_run(command: str, world: Path, name: str) -> tuple[Path, Path]:
    """Config file and run directory of one run over the world's shards."""
    run = world / name
    finetune = {"num_steps": 30, "checkpoint_every_steps": 2} if command == "finetune" else None
    value = tiny.make_config(
        world,
        run_dir=str(run),
        data={"inputs": [], "splits": {}, "directory": str(world / "run/data")},
        finetune=finetune,
        score={"tokens_per_batch": 40},
    )
    return tiny.write_config(world / f"{name}.yaml", value), run


def outcome(command: str, run: Path) -> object:
    """What must not differ: score bytes, or the loss of every step."""
    if command == "score":
        return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("scores/*/*.parquet")}
    return [(row["step"], row["loss"]) for row in read_scalars(run / "finetune" / METRICS)]


def disturb(command: str, config: Path, seconds: float, rng: random.Random) -> tuple[bool, float]:
    """Start the command and kill one of its ranks after so many seconds, or as soon as there is one; whether one was
    killed, and how long the group then took to end."""
    end = time.monotonic() + seconds
    with tiny.started(command, str(config)) as process:
        tiny.wait_for(lambda: tiny.ranks_of(process) or process.poll() is not None)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None or not tiny.kill_one(tiny.ranks_of(process), rng):
            return False, 0.0
        start = time.monotonic()
        process.wait(timeout=2 * MAX_HANG_SECONDS)
        return True, time.monotonic() - start


if __name__ == "__main__":
    main()
