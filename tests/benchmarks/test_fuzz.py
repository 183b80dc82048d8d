"""The fuzz benchmark: trials on a sound program find nothing, planted faults are found, and a trial can be repeated."""

import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import Done, Forked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fuzz  # noqa: E402
import fuzz_oracle  # noqa: E402
import fuzz_trials  # noqa: E402
from fuzz_world import RUN, STEPS, build  # noqa: E402

SEED, NUM_TRIALS = 7, 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Forked]]:
    """A world with every stage done, and the process that runs its commands."""
    directory = tmp_path_factory.mktemp("fuzz")
    with Forked() as forked:
        build(directory, forked)
        yield directory, forked


def trials(base: tuple[Path, Forked]) -> list[fuzz.Result]:
    found = [fuzz.run_trial(SEED, number, *base) for number in range(NUM_TRIALS)]
    return [result for result in found if result is not None]


def test_trials_find_nothing_and_planted_faults_are_found(
    base: tuple[Path, Forked], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = trials(base)
    assert len(sound) == NUM_TRIALS
    assert [result for result in sound if result.faults] == []
    assert len({result.kind for result in sound}) > 5
    assert {0, 2} <= {code for result in sound for code in result.codes}
    start = fuzz.start

    def careless(trial: Any, step: Any, world: Path, forked: Forked) -> Done:
        done = start(trial, step, world, forked)
        (world / "model/README.md").write_text("gone")
        return done

    monkeypatch.setattr(fuzz, "start", careless)
    again = fuzz.run_trial(SEED, 3, *base)
    assert again is not None
    assert again.faults[0] == "changed: model/README.md"
    assert (again.kind, again.edit, again.codes) == (sound[3].kind, sound[3].edit, sound[3].codes)


def test_a_command_that_does_nothing_is_found(base: tuple[Path, Forked], monkeypatch: pytest.MonkeyPatch) -> None:
    world = base[0] / "idle"
    shutil.copytree(base[0] / "world", world)
    shutil.rmtree(world / RUN / "scores")
    monkeypatch.setattr(fuzz, "start", lambda *_: Done(0, "", "", 0.1, False))
    _, found = fuzz.run_step(fuzz_trials.Trial(steps=[STEPS["score"]]), STEPS["score"], world, base[1])
    assert found == [f"exit code 0, and scores/{split} is not complete" for split in ("unlabeled", "test")]


SOUND = Done(2, "", "error: run.yaml: seed: a mistake; correct it\n", 0.1, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"is_late": True}, ["hang: it was killed"]),
        ({"code": 0}, ["an error with exit code 0", "nonsense was taken as it is"]),
        ({"code": 139}, ["exit code 139"]),
        ({"stderr": ""}, ["0 error lines"]),
        ({"stderr": SOUND.stderr * 2}, ["2 error lines"]),
        ({"stderr": f"error: {'x' * 2_000}\n"}, ["an error of 2,007 characters"]),
        ({"stderr": "error: \x1b[31m\n"}, ["an error with characters of control"]),
        ({"stderr": "UserWarning: casting\n" + SOUND.stderr}, ["foreign words: UserWarning: casting"]),
        ({"code": 0, "stderr": ""}, ["nonsense was taken as it is"]),
    ],
)
def test_ends_that_are_faults(changes: dict[str, Any], words: list[str]) -> None:
    trial = fuzz_trials.Trial(steps=[STEPS["select"]], must_fail=True)
    assert list(fuzz_oracle.faults(trial, STEPS["select"], replace(SOUND, **changes))) == words


def test_outputs_that_make_no_sense_are_found(base: tuple[Path, Forked]) -> None:
    world = base[0] / "nonsense"
    shutil.copytree(base[0] / "world", world)
    before = fuzz_oracle.complete(world / RUN)
    assert {"data/test", "scores/unlabeled", "round1/selection", "round1/distill", "evaluation"} <= before.keys()
    assert list(fuzz_oracle.nonsense(world / RUN, {}, before)) == []
    path = world / RUN / "scores/unlabeled/000000.parquet"
    fuzz_trials.edit_scores(_Fixed("a NaN"), path)
    assert "scores/unlabeled" not in fuzz_oracle.complete(world / RUN)
    fuzz_trials.sign(path, world / RUN)
    after = fuzz_oracle.complete(world / RUN)
    assert list(fuzz_oracle.nonsense(world / RUN, before, after)) == [
        "scores/unlabeled: log-probabilities that are none"
    ]


class _Fixed(random.Random):
    """Random numbers that choose one thing where they can."""

    def __init__(self, choice: str) -> None:
        super().__init__(1)
        self._choice = choice

    def choice(self, seq: Any) -> Any:
        return self._choice if self._choice in seq else super().choice(seq)
