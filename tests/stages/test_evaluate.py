"""Stage evaluate on real Parquet score directories, against metrics computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import load_manifest, write_json, write_manifest
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.stages.evaluate import evaluate, fingerprint

Row = tuple[str, str, list[float], int | None]  # key, language, probabilities, label


def make_config(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
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


def select_dir(directory: Path, biases: dict[str, list[float]], **more: Any) -> Path:
    value = {
        "teachers": ["en"],
        "students": ["de", "sw"],
        "scores": {"en": 0.9, "de": 0.7},
        "weights": {"en": 1.0},
        "biases": biases,
        "threshold": 0.8,
        "rule": "threshold",
    }
    write_json(directory / "teachers.json", value | more)
    write_manifest(directory, "teachers", {}, [directory / "teachers.json"])
    return directory


RIGHT, WRONG = [0.9, 0.1], [0.1, 0.9]  # for label 0


def rows(**answers: str) -> list[Row]:
    """Language -> one letter per group: r(ight), w(rong), or - where the group lacks the language."""
    return [
        (f"g{i}", language, RIGHT if letters[i] == "r" else WRONG, 0)
        for i in range(len(next(iter(answers.values()))))
        for language, letters in answers.items()
        if letters[i] != "-"
    ]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return score_dir(tmp_path / "before", rows(en="rrrrrrrr", de="rrwwwwww", sw="rw-w--ww"))


@pytest.fixture
def after(tmp_path: Path) -> Path:
    return score_dir(tmp_path / "after", rows(en="rrrrrrrw", de="rrrrrrrr", sw="rr-r--ww"))


def test_metrics_by_hand(tmp_path: Path, before: Path, after: Path) -> None:
    teachers = select_dir(tmp_path / "select", {})
    metrics = evaluate(make_config(), before, after, teachers, tmp_path / "out")
    assert set(metrics) == {
        "source_language", "teachers", "students", "languages", "average", "gap", "std", "worst"
    }  # fmt: skip
    assert (metrics["source_language"], metrics["teachers"], metrics["students"]) == ("en", ["en"], ["de", "sw"])
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
    for part in (average, gap):
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


def test_what_is_written_is_what_is_returned(tmp_path: Path, before: Path, after: Path) -> None:
    config, out = make_config(), tmp_path / "out"
    metrics = evaluate(config, before, after, None, out)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (metrics["teachers"], metrics["students"]) == ([], [])
    assert {row["score"] for row in metrics["languages"].values()} == {None}
    manifest = load_manifest(out, "evaluation")
    assert manifest.fingerprint == fingerprint(config, before, after, None)
    assert manifest.details == {"num_groups": 8}
    assert list(manifest.files) == ["metrics.json"]
    assert not (out / "started.json").exists()


def test_a_complete_evaluation_is_not_made_again_and_another_one_is_refused(
    tmp_path: Path, before: Path, after: Path
) -> None:
    out = tmp_path / "out"
    metrics = evaluate(make_config(), before, after, None, out)
    written = (out / "metrics.json").stat().st_mtime_ns
    assert evaluate(make_config(), before, after, None, out) == metrics
    assert (out / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"evaluate.num_resamples: 2000 -> 50"):
        evaluate(make_config(evaluate={"num_resamples": 50}), before, after, None, out)
    (out / "metrics.json").write_text((out / "metrics.json").read_text().replace("0.875", "0.975"))
    with pytest.raises(UserError, match=r"metrics\.json"):
        evaluate(make_config(), before, after, None, out)


def test_the_fingerprint_holds_what_the_metrics_depend_on(tmp_path: Path, before: Path, after: Path) -> None:
    teachers = select_dir(tmp_path / "select", {})
    base = fingerprint(make_config(), before, after, teachers)
    others = [
        fingerprint(make_config(seed=4), before, after, teachers),
        fingerprint(make_config(), before, after, teachers, teachers),
        fingerprint(make_config(data={"directory": "x", "source_language": "de"}), before, after, teachers),
        fingerprint(make_config(), after, after, teachers),
        fingerprint(make_config(), before, before, teachers),
        fingerprint(make_config(), before, after, None),
        fingerprint(make_config(), before, after, select_dir(tmp_path / "other", {"en": [0.0, 1.0]})),
    ]
    assert all(other != base for other in others)
    assert base == fingerprint(make_config(task=make_config().task), before, after, teachers)
    with pytest.raises(UserError, match="not complete"):
        fingerprint(make_config(), before, tmp_path / "absent", None)
    with pytest.raises(UserError, match="not complete"):
        fingerprint(make_config(), before, after, tmp_path / "absent")


def test_rows_are_joined_by_key_whatever_their_order_and_shards(tmp_path: Path, before: Path, after: Path) -> None:
    shuffled = rows(en="rrrrrrrw", de="rrrrrrrr", sw="rr-r--ww")
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    other = score_dir(tmp_path / "shuffled", shuffled[:9], shuffled[9:])
    expected = evaluate(make_config(), before, after, None, tmp_path / "one")
    assert evaluate(make_config(), before, other, None, tmp_path / "two") == expected


def test_answers_are_the_argmax_with_ties_to_the_lowest_index_and_any_number_of_candidates(tmp_path: Path) -> None:
    # en: a tie of 0 and 1 counts as 0; de: candidates differ in number from group to group.
    scored: list[Row] = [
        ("g0", "en", [0.5, 0.5], 0),
        ("g1", "en", [0.5, 0.5], 1),
        ("g0", "de", [0.1, 0.2, 0.3, 0.4], 3),
        ("g1", "de", [0.2, 0.5, 0.3], 1),
    ]
    directory = score_dir(tmp_path / "scores", scored)
    metrics = evaluate(make_config(), directory, directory, None, tmp_path / "out")
    assert {language: row["after"] for language, row in metrics["languages"].items()} == {"en": 0.5, "de": 1.0}
    assert metrics["average"]["ci95"] == [0.0, 0.0]


def test_biases_calibrate_the_answers_after_and_only_those(tmp_path: Path) -> None:
    directory = score_dir(tmp_path / "scores", [("g0", "en", RIGHT, 0), ("g0", "de", [0.4, 0.6], 0)])
    teachers = select_dir(tmp_path / "select", {"en": [0.0, 0.0], "de": [1.0, 0.0]})
    calibrated = evaluate(
        make_config(evaluate={"calibrate": True}), directory, directory, None, tmp_path / "with", bias_dir=teachers
    )
    assert (calibrated["languages"]["de"]["before"], calibrated["languages"]["de"]["after"]) == (0.0, 1.0)
    assert (calibrated["languages"]["en"]["before"], calibrated["languages"]["en"]["after"]) == (1.0, 1.0)
    plain = evaluate(make_config(), directory, directory, teachers, tmp_path / "without")
    assert plain["languages"]["de"]["after"] == 0.0


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        (None, "evaluate.calibrate: needs the biases"),
        ({}, "holds no biases"),
        ({"en": [0.0, 0.0]}, "'g0', language 'de': teachers.json has no biases"),
        ({"en": [0.0, 0.0], "de": [0.0, 0.0, 0.0]}, "2 candidates but 3 biases"),
    ],
)
def test_biases_that_do_not_fit_are_errors(
    tmp_path: Path, before: Path, biases: dict[str, list[float]] | None, message: str
) -> None:
    teachers = None if biases is None else select_dir(tmp_path / "select", biases)
    with pytest.raises(UserError, match=message):
        evaluate(make_config(evaluate={"calibrate": True}), before, before, None, tmp_path / "out", bias_dir=teachers)
    assert not (tmp_path / "out").exists()


def replaced(row: int, **changes: Any) -> list[Row]:
    """The rows of `before` with one of them changed."""
    scored = rows(en="rrrrrrrr", de="rrwwwwww", sw="rw-w--ww")
    names = ("key", "language", "probabilities", "label")
    scored[row] = tuple(changes.get(name, value) for name, value in zip(names, scored[row], strict=True))  # type: ignore
    return scored


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (rows(en="rrrrrrrr", de="rrwwwwww", sw="rw-w--w-"), r"after: lacks 1 of .*before.* 'g7', language 'sw'"),
        (rows(en="rrrrrrrr", de="rrwwwwww", sw="rwrw--ww"), r"before: lacks 1 of .*after.* 'g2', language 'sw'"),
        (rows(en="rrrrrrrr", de="rrwwwwww"), r"after: lacks 5 of .*before"),
        (replaced(4, label=1), r"after: group 'g1', language 'de': label 1 where .*before has 0"),
        (replaced(0, label=None), r"after: group 'g0', language 'en': has no label"),
        (replaced(0, label=2), r"label 2 is not one of its 2 candidates"),
        (replaced(1, language="en"), r"group 'g0', language 'en': is there twice"),
        (replaced(0, probabilities=[float("nan"), 0.5]), r"not numbers \(NaN\)"),
    ],
)
def test_mismatches_are_errors_that_name_the_example(
    tmp_path: Path, before: Path, scored: list[Row], message: str
) -> None:
    after = score_dir(tmp_path / "after", scored)
    with pytest.raises(UserError, match=message):
        evaluate(make_config(), before, after, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_or_an_unfinished_directory_is_an_error(tmp_path: Path, before: Path, after: Path) -> None:
    file = after / "shard-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000.parquet: content differs"):
        evaluate(make_config(), before, after, None, tmp_path / "out")
    (after / "manifest.json").unlink()
    with pytest.raises(UserError, match="after: not complete"):
        evaluate(make_config(), before, after, None, tmp_path / "out")


def test_one_language_has_no_gap(tmp_path: Path) -> None:
    directory = score_dir(tmp_path / "scores", rows(en="rrww"))
    metrics = evaluate(make_config(), directory, directory, None, tmp_path / "out")
    assert metrics["gap"] == {"before": None, "after": None, "ci95": None}
    assert metrics["average"] == {"before": 0.5, "after": 0.5, "ci95": [0.0, 0.0]}
