"""Stage evaluate on real Parquet score directories, against metrics computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist import runner
from alsace_dist.config import Config
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.evaluation import METRICS, read_evaluation
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.files.selection import Selection, write_selection
from alsace_dist.stages import evaluate
from alsace_dist.stages.base import Output, Stage
from alsace_dist.stages.evaluate import compare

Row = tuple[str, str, list[float], int | None]  # key, language, probabilities, label


def make_config(tmp_path: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "seed": 3,
            "task": {"fields": ["text"], "template": "{text}", "labels": ["yes", "no"]},
            "data": {"directory": "unused", "source_language": "en"},
            "model": {"path": "unused"},
            **sections,
        }
    )


def score_dir(directory: Path, *shards: list[Row]) -> Path:
    """A complete score directory with these rows, shard by shard."""
    files = []
    for number, rows in enumerate(shards):
        keys, languages, probabilities, labels = (list(column) for column in zip(*rows, strict=True))
        with np.errstate(divide="ignore"):
            log_probs = [np.log(np.array(row, dtype=np.float32)) for row in probabilities]
        files.append(directory / f"shard-{number:05d}.parquet")
        write_scores(files[-1], Scores(keys, languages, log_probs, labels), {"format": "1"})
    write_manifest(directory, "scores", {"of": directory.name}, files, {"rows": sum(map(len, shards))})
    return directory


def selection_of(biases: dict[str, list[float]]) -> Selection:
    return Selection(
        rule="threshold",
        num_groups=8,
        teachers=["en"],
        students=["de", "sw"],
        scores={"en": 0.9, "de": 0.7},
        threshold=0.8,
        normalised_scores={"en": 0.6, "de": 0.4},
        weights={"en": 1.0},
        biases=biases,
        num_pairs={"others": 8.0, "ranked": 6.0, "ensemble": 8.0, "anchor": 8.0, "votes": 8.0, "labels": 8.0},
    )


NO_BIASES = selection_of({})


RIGHT, WRONG = [0.9, 0.1], [0.1, 0.9]  # for label 0


def rows(**answers: str) -> list[Row]:
    """Language -> one letter per group: r(ight), w(rong), or - where the group lacks the language."""
    return [
        (f"g{i}", language, RIGHT if letters[i] == "r" else WRONG, 0)
        for i in range(len(next(iter(answers.values()))))
        for language, letters in answers.items()
        if letters[i] != "-"
    ]


BEFORE, AFTER = "run/scores/test", "run/round1/scores/test"
FIRST, LAST = rows(en="rrrrrrrr", de="rrwwwwww", sw="rw-w--ww"), rows(en="rrrrrrrw", de="rrrrrrrr", sw="rr-r--ww")


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Where a run keeps the scores of its first model."""
    return score_dir(tmp_path / BEFORE, FIRST)


@pytest.fixture
def after(tmp_path: Path) -> Path:
    """Where a run of one round keeps those of its last."""
    return score_dir(tmp_path / AFTER, LAST)


def stage_of(
    tmp_path: Path, biases: Selection | None = None, teachers: Selection = NO_BIASES, **sections: Any
) -> Stage:
    """The evaluation of the run in which the scores lie, with its selection and, if any are given, its biases."""
    stage = Stage(evaluate, "evaluate", make_config(tmp_path, **sections))
    write_selection(stage.layout.selection(1), teachers, {})
    if biases is not None:
        write_selection(stage.layout.calibration, biases, {})
    return stage


def metrics_of(config: Config, before: Path, after: Path, calibration: Selection | None = None) -> dict[str, Any]:
    """The metrics without a selection."""
    return compare(config, before, after, [], calibration)[0].as_json()


def test_metrics_by_hand(tmp_path: Path, before: Path, after: Path) -> None:
    evaluation, num_groups = compare(make_config(tmp_path), before, after, [NO_BIASES], None)
    assert num_groups == 8
    metrics = evaluation.as_json()
    assert set(metrics) == {
        "source_language", "teachers", "students", "languages", "average", "gap", "paired_gap",
        "rounds", "std", "worst",
        "uses_labels"
    }  # fmt: skip
    assert (metrics["source_language"], metrics["teachers"], metrics["students"]) == ("en", ["en"], ["de", "sw"])
    changed = {name: (row.pop("num_gained"), row.pop("num_lost")) for name, row in metrics["languages"].items()}
    assert changed == {"en": (0, 1), "de": (6, 0), "sw": (2, 0)}
    intervals = {language: row.pop("ci95") for language, row in metrics["languages"].items()}
    assert intervals["en"][1] == 0.0 and intervals["de"][0] > 0 and intervals["sw"][0] == 0.0
    # Discordant pairs: en 0+1, de 6+0, sw 2+0. Exact p: 1, 2/64, 2/4; Holm over three: .09375, 1, 1.
    assert metrics["languages"] == {
        "en": {"before": 1.0, "after": 7 / 8, "num_examples": 8, "p_value": 1.0, "p_value_raw": 1.0, "score": 0.9},
        "de": {
            "before": 0.25,
            "after": 1.0,
            "num_examples": 8,
            "p_value": pytest.approx(3 / 32),
            "p_value_raw": pytest.approx(1 / 32),
            "score": 0.7,
        },
        "sw": {
            "before": 0.2,
            "after": 0.6,
            "num_examples": 5,
            "p_value": 1.0,
            "p_value_raw": pytest.approx(0.5),
            "score": None,
        },
    }
    # The average is over languages, not over the 21 examples (which would give 0.524 before).
    average, gap = metrics["average"], metrics["gap"]
    assert average["before"] == pytest.approx((1 + 0.25 + 0.2) / 3)
    assert average["after"] == pytest.approx((0.875 + 1 + 0.6) / 3)
    assert gap["before"] == pytest.approx(1 - 0.225)
    assert gap["after"] == pytest.approx(0.875 - 0.8)
    # On the five groups of sw English has 5 right before and 4 after, on the eight of de 8 and 7.
    paired = metrics["paired_gap"]
    assert paired["before"] == pytest.approx((0.75 + 0.8) / 2)
    assert paired["after"] == pytest.approx((-0.125 + 0.2) / 2)
    assert metrics["rounds"] == [{"teachers": ["en"], "scores": NO_BIASES.scores}]
    for part in (average, gap, paired):
        assert set(part) == {"before", "after", "ci95"}
        assert part["ci95"][0] < part["after"] - part["before"] < part["ci95"][1]
    assert metrics["std"] == {
        "before": pytest.approx(np.std([1, 0.25, 0.2])),
        "after": pytest.approx(np.std([0.875, 1, 0.6])),
    }
    assert metrics["worst"] == {
        "before": {"language": "sw", "accuracy": 0.2},
        "after": {"language": "sw", "accuracy": 0.6},
    }


def test_without_a_selection_nobody_teaches_and_no_language_has_a_score(
    tmp_path: Path, before: Path, after: Path
) -> None:
    metrics = metrics_of(make_config(tmp_path), before, after)
    assert (metrics["teachers"], metrics["students"]) == ([], [])
    assert {row["score"] for row in metrics["languages"].values()} == {None}


def test_what_is_written_is_what_is_compared(tmp_path: Path, before: Path, after: Path) -> None:
    stage, out = stage_of(tmp_path), tmp_path / "run/evaluation"
    assert stage.outputs == [Output(out, "evaluation")]
    runner.run_stage(stage)
    evaluation, _ = compare(stage.config, before, after, [NO_BIASES], None)
    assert json.loads((out / METRICS).read_text()) == evaluation.as_json()
    assert read_evaluation(out) == evaluation
    manifest = stage.outputs[0].manifest()
    assert manifest.fingerprint == stage.fingerprint(stage.outputs[0])
    assert manifest.details == {"num_groups": 8}
    assert list(manifest.files) == ["metrics.json"]
    assert not (out / "started.json").exists()


def test_a_complete_evaluation_is_not_made_again_and_another_one_is_refused(
    tmp_path: Path, before: Path, after: Path
) -> None:
    stage, out = stage_of(tmp_path), tmp_path / "run/evaluation"
    runner.run_stage(stage)
    evaluation = read_evaluation(out)
    written = (out / METRICS).stat().st_mtime_ns
    runner.run_stage(stage)
    assert read_evaluation(out) == evaluation
    assert (out / METRICS).stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"evaluate.num_resamples: 2000 -> 50"):
        runner.run_stage(stage_of(tmp_path, evaluate={"num_resamples": 50}))
    runner.run_stage(stage_of(tmp_path, evaluate={"alpha": 0.01}))  # only the report's wording: complete all the same
    assert (out / METRICS).stat().st_mtime_ns == written
    (out / METRICS).write_text((out / METRICS).read_text().replace("0.875", "0.975"))
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_evaluation(out)


def test_the_fingerprint_holds_what_the_metrics_depend_on(tmp_path: Path) -> None:
    def fingerprint(
        name: str,
        scored: tuple[list[Row], list[Row]] = (FIRST, LAST),
        teachers: Selection = NO_BIASES,
        biases: Selection | None = None,
        **sections: Any,
    ) -> dict[str, Any]:
        """Of a run in a directory of its own."""
        for place, rows_of_place in zip((BEFORE, AFTER), scored, strict=True):
            score_dir(tmp_path / name / place, rows_of_place)
        stage = stage_of(tmp_path / name, biases, teachers, **sections)
        return stage.fingerprint(stage.outputs[0])

    base = fingerprint("base")
    task = make_config(tmp_path).task.model_dump() | {"template": "Say: {text}"}
    assert fingerprint("equal", task=task, evaluate={"alpha": 0.01}) == base
    calibrated = {"evaluate": {"calibrate": True}}
    others = [
        fingerprint("seed", seed=4),
        fingerprint("source", data={"directory": "x", "source_language": "de"}),
        fingerprint("resamples", evaluate={"num_resamples": 50}),
        fingerprint("twice-last", (LAST, LAST)),
        fingerprint("twice-first", (FIRST, FIRST)),
        fingerprint("teachers", teachers=selection_of({"en": [0.0, 1.0]})),
        fingerprint("calibrated", biases=NO_BIASES, **calibrated),
        fingerprint("biases", biases=selection_of({"en": [0.0, 1.0]}), **calibrated),
        fingerprint("no-rounds", biases=NO_BIASES, rounds=0, **calibrated),
    ]
    assert all(other != base for other in others)
    assert len({json.dumps(other) for other in others}) == len(others)
    assert (base["biases"], others[-1]["teachers"]) == (None, [])


@pytest.mark.parametrize("missing", [BEFORE, AFTER, "run/round1/selection", "run/calibration"])
def test_an_evaluation_waits_for_all_that_it_reads(tmp_path: Path, before: Path, after: Path, missing: str) -> None:
    stage = stage_of(tmp_path, NO_BIASES, evaluate={"calibrate": True})
    assert {output.directory for output in stage.inputs} >= {tmp_path / missing}
    assert all(output.exists for output in stage.inputs)
    (tmp_path / missing / "manifest.json").unlink()
    with pytest.raises(NotReady, match=rf"{missing}: not complete"):
        stage.fingerprint(stage.outputs[0])
    with pytest.raises(NotReady, match=rf"{missing}: not complete"):
        stage.run(None)
    assert not stage.outputs[0].directory.exists()


def test_rows_are_joined_by_key_whatever_their_order_and_shards(tmp_path: Path, before: Path, after: Path) -> None:
    shuffled = list(LAST)
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    keys = sorted({row[0] for row in LAST}, reverse=True)[:3]
    first = [row for row in shuffled if row[0] in keys]
    other = score_dir(tmp_path / "shuffled", first, [row for row in shuffled if row[0] not in keys])
    assert len(first) > 3 and shuffled != LAST
    config = make_config(tmp_path)
    assert metrics_of(config, before, other) == metrics_of(config, before, after)


def test_answers_are_the_argmax_with_ties_to_the_lowest_index_and_any_number_of_candidates(tmp_path: Path) -> None:
    # en: a tie of 0 and 1 counts as 0; de: candidates differ in number from group to group.
    scored: list[Row] = [
        ("g0", "en", [0.5, 0.5], 0),
        ("g1", "en", [0.5, 0.5], 1),
        ("g2", "de", [0.1, 0.2, 0.3, 0.4], 3),
        ("g3", "de", [0.2, 0.5, 0.3], 1),
    ]
    directory = score_dir(tmp_path / "scores", scored)
    own = {"fields": ["text"], "template": "{text} ___", "labels": [], "candidates": "own", "gap": "___"}
    metrics = metrics_of(make_config(tmp_path, task=own), directory, directory)
    assert {language: row["after"] for language, row in metrics["languages"].items()} == {"en": 0.5, "de": 1.0}
    assert metrics["average"]["ci95"] == [0.0, 0.0]


def test_biases_calibrate_the_answers_after_and_only_those(tmp_path: Path) -> None:
    directory = score_dir(tmp_path / "scores", [("g0", "en", RIGHT, 0), ("g0", "de", [0.4, 0.6], 0)])
    biases = selection_of({"en": [0.0, 0.0], "de": [1.0, 0.0]})
    calibrated = metrics_of(make_config(tmp_path, evaluate={"calibrate": True}), directory, directory, biases)
    assert (calibrated["languages"]["de"]["before"], calibrated["languages"]["de"]["after"]) == (0.0, 1.0)
    assert (calibrated["languages"]["en"]["before"], calibrated["languages"]["en"]["after"]) == (1.0, 1.0)
    plain, _ = compare(make_config(tmp_path), directory, directory, [biases], None)
    assert plain.languages["de"].after == 0.0


def test_the_stage_reads_the_biases_of_calibrate_and_the_teachers_of_the_first_round(tmp_path: Path) -> None:
    for place in (BEFORE, AFTER):
        score_dir(tmp_path / place, [("g0", "en", RIGHT, 0), ("g0", "de", [0.4, 0.6], 0)])
    biases = selection_of({"en": [0.0, 0.0], "de": [1.0, 0.0]}).model_copy(
        update={"teachers": ["de"], "students": ["en"], "weights": {"de": 1.0}}
    )
    stage = stage_of(tmp_path, biases, evaluate={"calibrate": True})
    stage.run(None)
    found = read_evaluation(stage.outputs[0].directory)
    assert (found.teachers, found.languages["de"].before, found.languages["de"].after) == (["en"], 0.0, 1.0)


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        (None, "evaluate.calibrate: needs the biases"),
        ({}, "holds no biases"),
        ({"en": [0.0, 0.0]}, "'g0', language 'de': teachers.json has no biases"),
        ({"en": [0.0, 0.0, 0.0], "de": [0.0, 0.0, 0.0]}, "2 candidates but 3 biases"),
    ],
)
def test_biases_that_do_not_fit_are_errors(
    tmp_path: Path, before: Path, after: Path, biases: dict[str, list[float]] | None, message: str
) -> None:
    calibration = None if biases is None else selection_of(biases)
    stage = stage_of(tmp_path, calibration, evaluate={"calibrate": True})
    with pytest.raises(UserError, match=message):
        compare(stage.config, before, after, [], calibration)
    with pytest.raises(UserError, match="run/calibration: not complete" if biases is None else message):
        stage.run(None)
    assert not (tmp_path / "run/evaluation").exists()


def replaced(row: int, **changes: Any) -> list[Row]:
    """The first model's rows with one of them changed."""
    scored = list(FIRST)
    names = ("key", "language", "probabilities", "label")
    scored[row] = tuple(changes.get(name, value) for name, value in zip(names, scored[row], strict=True))  # type: ignore
    return scored


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (rows(en="rrrrrrrr", de="rrwwwwww", sw="rw-w--w-"), rf"{AFTER}: lacks 1 of .*{BEFORE}.* 'g7', language 'sw'"),
        (rows(en="rrrrrrrr", de="rrwwwwww", sw="rwrw--ww"), rf"{BEFORE}: lacks 1 of .*{AFTER}.* 'g2', language 'sw'"),
        (rows(en="rrrrrrrr", de="rrwwwwww"), rf"{AFTER}: lacks 5 of .*{BEFORE}"),
        (replaced(4, label=1), rf"{AFTER}: group 'g1', language 'de': has the label 1, where another language has 0"),
        (
            replaced(4, probabilities=[0.2, 0.7, 0.1]),
            rf"{AFTER}: group 'g1', language 'de': has scores of 3 candidates, and the task has 2",
        ),
        ([(*row[:3], 1) for row in FIRST], rf"{AFTER}: group 'g0', language 'en': label 1 where .*{BEFORE} has 0"),
        ([(*row[:3], 2) for row in FIRST], r"label 2 is not one of its 2 candidates"),
        (replaced(0, label=None), rf"{AFTER}: group 'g0', language 'en': has no label"),
        (replaced(1, language="en"), r"group 'g0', language 'en': is there twice"),
        (replaced(0, probabilities=[float("nan"), 0.5]), r"not numbers"),
    ],
)
def test_mismatches_are_errors_that_name_the_example(
    tmp_path: Path, before: Path, scored: list[Row], message: str
) -> None:
    score_dir(tmp_path / AFTER, scored)
    with pytest.raises(UserError, match=message):
        stage_of(tmp_path).run(None)
    assert not (tmp_path / "run/evaluation").exists()


def test_a_flipped_byte_or_an_unfinished_directory_is_an_error(tmp_path: Path, before: Path, after: Path) -> None:
    file = after / "shard-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000.parquet: content differs"):
        stage_of(tmp_path).run(None)
    (after / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{AFTER}: not complete"):
        stage_of(tmp_path).run(None)


def test_one_language_has_no_gap(tmp_path: Path) -> None:
    directory = score_dir(tmp_path / "scores", rows(en="rrww"))
    metrics = metrics_of(make_config(tmp_path), directory, directory)
    assert metrics["gap"] == {"before": None, "after": None, "ci95": None}
    assert metrics["average"] == {"before": 0.5, "after": 0.5, "ci95": [0.0, 0.0]}
