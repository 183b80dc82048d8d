"""metrics.json: what is written comes back; what is not as listed, or is no evaluation, is one clear error."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.evaluation import KIND, METRICS, Evaluation, read_evaluation, write_evaluation
from alsace_dist.files.manifest import MANIFEST, load_manifest, write_manifest

VALUE: dict[str, Any] = {
    "source_language": "en",
    "teachers": ["en"],
    "students": ["de"],
    "languages": {
        "de": {
            "before": 0.25,
            "after": 1.0,
            "ci95": [0.5, 1.0],
            "num_examples": 8,
            "num_gained": 6,
            "num_lost": 0,
            "p_value": 2 / 32,
            "p_value_raw": 1 / 32,
            "score": 0.7,
        },
        "en": {
            "before": 1.0,
            "after": 7 / 8,
            "ci95": [-0.5, 0.0],
            "num_examples": 8,
            "num_gained": 0,
            "num_lost": 1,
            "p_value": 1.0,
            "p_value_raw": 1.0,
            "score": None,
        },
    },
    "average": {"before": 0.625, "after": 0.9375, "ci95": [0.0625, 0.1 + 0.2]},
    "gap": {"before": 0.75, "after": -0.125, "ci95": [-1.0, -0.5]},
    "paired_gap": {"before": 0.7, "after": -0.1, "ci95": [-1.0, -0.5]},
    "rounds": [{"teachers": ["en"], "scores": {"de": 0.7}}],
    "std": {"before": 0.375, "after": 0.0625},
    "uses_labels": False,
    "worst": {
        "before": {"language": "de", "accuracy": 0.25},
        "after": {"language": "en", "accuracy": 0.875},
    },
}
EVALUATION = Evaluation.model_validate(VALUE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete evaluation."""
    write_evaluation(tmp_path / "evaluation", EVALUATION, {"seed": 1}, 8)
    return tmp_path / "evaluation"


def sign_anew(directory: Path, value: Any) -> None:
    """Put another value into the file and list it, so that only its content can give it away."""
    (directory / METRICS).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    write_manifest(directory, KIND, {"seed": 1}, [directory / METRICS], {"num_groups": 8})


def test_what_is_written_comes_back(directory: Path) -> None:
    assert read_evaluation(directory) == EVALUATION
    assert json.loads((directory / METRICS).read_text(encoding="utf-8")) == EVALUATION.as_json() == VALUE
    manifest = load_manifest(directory, KIND)
    assert manifest.fingerprint == {"seed": 1} and manifest.details == {"num_groups": 8}
    assert list(manifest.files) == [METRICS]


def test_a_gap_that_is_not_defined_comes_back_as_none(directory: Path) -> None:
    undefined = {"before": None, "after": None, "ci95": None}
    worst = {when: {"language": "en", "accuracy": VALUE["languages"]["en"][when]} for when in ("before", "after")}
    average = {when: one["accuracy"] for when, one in worst.items()} | {"ci95": [-0.2, 0.0]}
    alone = {"languages": {"en": VALUE["languages"]["en"]}, "average": average, "worst": worst}
    lone = Evaluation.model_validate(VALUE | alone | {"gap": undefined, "paired_gap": undefined})
    write_evaluation(directory, lone, {"seed": 1}, 8)
    assert read_evaluation(directory) == lone
    assert read_evaluation(directory).gap.ci95 is None


def test_an_evaluation_without_its_manifest_is_not_ready(directory: Path, tmp_path: Path) -> None:
    (directory / MANIFEST).unlink()
    for place in (directory, tmp_path / "nowhere"):
        with pytest.raises(NotReady, match=rf"^{place}: not complete \(manifest\.json is missing\)"):
            read_evaluation(place)


def test_a_file_changed_after_the_manifest_is_refused(directory: Path) -> None:
    path = directory / METRICS
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.875", "0.975"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{path}: content differs from the sha256 in manifest\.json"):
        read_evaluation(directory)
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{path}: \d+ bytes where manifest\.json says \d+"):
        read_evaluation(directory)
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: missing, though manifest\.json lists it"):
        read_evaluation(directory)


def test_another_kind_of_directory_is_refused(directory: Path) -> None:
    write_manifest(directory, "selection", {}, [directory / METRICS])
    with pytest.raises(UserError, match="holds 'selection' where 'evaluation' is needed"):
        read_evaluation(directory)


def changed(key: str, value: Any) -> dict[str, Any]:
    """``VALUE`` with another value under a dotted key."""
    whole = copy.deepcopy(VALUE)
    *parents, last = key.split(".")
    section = whole
    for parent in parents:
        section = section[parent]
    section[last] = value
    return whole


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("source_language", None, "Input should be a valid string, not None"),
        ("students", "de", "Input should be a valid list, not 'de'"),
        ("languages.de", 0.5, "must be a mapping of keys to values, not 0.5"),
        ("languages.de.after", "much", "Input should be a valid number.*, not 'much'"),
        ("languages.de.before", float("nan"), "Input should be a finite number, not nan"),
        ("languages.de.num_examples", 7.5, "Input should be a valid integer.*, not 7.5"),
        ("languages.de.num_examples", True, "must be a number, not true"),
        ("languages.de.p", 0.5, "unknown key"),
        ("gap.after", float("inf"), "Input should be a finite number, not inf"),
        ("worst.after.accuracy", None, "Input should be a valid number, not None"),
        ("worst.best", {}, "unknown key; known here: after, before"),
        ("accuracy", 1.0, "unknown key; known here: average, gap, .*worst"),
    ],
)
def test_a_value_of_another_type_is_named_by_file_and_key(directory: Path, key: str, value: Any, words: str) -> None:
    sign_anew(directory, changed(key, value))
    with pytest.raises(UserError, match=rf"^{directory / METRICS}: {key}: {words}") as caught:
        read_evaluation(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("languages.de.after", 2.0, "languages.de.after: Input should be less than or equal to 1"),
        ("average.before", -0.5, "average.before: Input should be greater than or equal to 0"),
        ("languages.en.p_value", 3.0, "languages.en.p_value: Input should be less than or equal to 1"),
        ("languages.en.num_examples", 0, "languages.en.num_examples: Input should be greater than or equal to 1"),
        ("gap.after", -1.5, "gap.after: Input should be greater than or equal to -1"),
        ("worst.after.language", "xx", "worst.after.language: 'xx' is none of languages"),
        ("languages", {}, "worst.before.language: 'de' is none of languages"),
        ("students", ["de", "en"], "teachers and students: 'en' is both"),
    ],
)
def test_numbers_that_no_evaluation_has_are_refused(directory: Path, key: str, value: Any, words: str) -> None:
    sign_anew(directory, changed(key, value))
    with pytest.raises(UserError, match=rf"^{directory / METRICS}: {words}"):
        read_evaluation(directory)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.2, 0.1], "average.ci95: must go from low to high, not from 0.2 to 0.1"),
        ([0.1], "average.ci95.1: is needed and missing"),
        ([0.1, 0.2, 0.3], "average.ci95: Tuple should have at most 2 items"),
        ([0.1, float("nan")], "average.ci95.1: Input should be a finite number"),
        (None, "average.ci95: Input should be a valid tuple"),
    ],
)
def test_an_interval_is_two_numbers(directory: Path, interval: Any, words: str) -> None:
    sign_anew(directory, changed("average.ci95", interval))
    with pytest.raises(UserError, match=rf"^{directory / METRICS}: {words}"):
        read_evaluation(directory)


@pytest.mark.parametrize(
    "key",
    [
        *sorted(Evaluation.model_fields.keys() - {"precision"}),
        "languages.de.p_value",
        "languages.en.score",
        "gap.ci95",
        "worst.after.language",
    ],
)
def test_every_key_is_needed(directory: Path, key: str) -> None:
    value = copy.deepcopy(VALUE)
    *parents, last = key.split(".")
    section = value
    for parent in parents:
        section = section[parent]
    del section[last]
    sign_anew(directory, value)
    with pytest.raises(UserError, match=rf"^{directory / METRICS}: {key}: is needed and missing"):
        read_evaluation(directory)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", ""])
def test_what_is_no_mapping_is_no_evaluation(directory: Path, text: str) -> None:
    sign_anew(directory, text)
    with pytest.raises(UserError, match=rf"^{directory / METRICS}: ") as caught:
        read_evaluation(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["average"].update(before=0.9), "average.before: is not the mean of languages"),
        (lambda v: v["gap"].update(after=0.5), "gap.after: is not that of languages and source_language"),
        (lambda v: v.update(source_language="xx"), "gap.before: is not that of languages and source_language"),
        (lambda v: v["worst"]["before"].update(accuracy=0.3), "worst.before: is not the lowest of languages"),
        (lambda v: v["languages"]["de"].update(p_value=0.01), "p_value: is below p_value_raw"),
        (lambda v: v["languages"]["de"].update(num_examples=10**400), "num_examples: Input should be"),
        (lambda v: v["languages"]["de"].update(num_lost=1), "num_gained, num_lost: are not what after is above before"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(directory: Path, change: Any, words: str) -> None:
    """As somebody leaves them who edits one and signs the file again."""
    value = json.loads(json.dumps(VALUE))
    change(value)
    sign_anew(directory, value)
    with pytest.raises(UserError, match=rf"metrics\.json: .*{words}.*; delete its directory and run the stage again"):
        read_evaluation(directory)
