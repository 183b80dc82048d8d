"""The speed benchmark, tiny: its contenders compute the same, take their turns, and its table is whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import speed  # noqa: E402
from speed_contenders import Contender  # noqa: E402

ROWS = (
    "scoring: time of ours / of a bare PyTorch loop",
    "scoring: time of `generate",
    "training: time of ours / of a bare PyTorch loop",
    "training: time of `transformers.Trainer`",
    "distillation: time of the pairwise algorithm / of ours",
    "training: padding tokens with batches of 64 |",
    "training: padding tokens with batches of 64, the default |",
    "scoring: padding tokens",
    "training: time waiting for data",
    "resuming",
)


def test_the_table_has_every_row_and_the_contenders_agree(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), "--tiny"],
        env=tiny.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for row in ROWS:
        assert done.stdout.count(f"| {row}") == 1, done.stdout
    # Scores with two others, losses with three, gradients with one: before anything is timed, and while it is.
    assert done.stderr.count(": agree within") == 2 * 9
    assert not list((tmp_path / "runs").iterdir())


def test_contenders_that_differ_are_not_compared() -> None:
    speed.require_agreement("equal", [1.0, 100.0], [1.0, 100.05], 1e-3)
    with pytest.raises(SystemExit, match="losses: differ by"):
        speed.require_agreement("losses", [1.0, 100.0], [1.0, 100.2], 1e-3)
    with pytest.raises(SystemExit):
        speed.require_agreement("losses", [1.0], [float("nan")], 1e-3)


def test_contenders_run_in_turns_and_pass_their_errors_on() -> None:
    trace: list[str] = []

    def loop(name: str, pause: object) -> None:
        for step in range(2):
            trace.append(f"{name}{step}")
            assert callable(pause)
            pause()
        raise ValueError("broken")

    first, second = (Contender(name, lambda pause, name=name: loop(name, pause)) for name in "ab")
    for contender in (first, second, second, first):
        contender.advance()
    assert trace == ["a0", "b0", "b1", "a1"]
    with pytest.raises(ValueError, match="broken"):
        first.advance()
