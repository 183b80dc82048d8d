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
        "de": {"before": 0.25, "after": 1.0, "num_examples": 8, "p_value": 2 / 32, "p_value_raw": 1 / 32, "score": 0.7},
        "en": {"before": 1.0, "after": 7 / 8, "num_examples": 8, "p_value": 1.0, "p_value_raw": 1.0, "score": None},
    },
    "average": {"before": 0.625, "after": 0.9375, "ci95": [0.0625, 0.1 + 0.2]},
    "gap": {"before": 0.75, "after": -0.125, "ci95": [-1.0, -0.5]},
    "std": {"before": 0.375, "after": 0.0625},
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
    lone = Evaluation.model_validate(VALUE | {"gap": {"before": None, "after": None, "ci95": None}})
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
        ("languages.de", 0.5, "Input should be .*, not 0.5"),
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
    ("interval", "words"),
    [
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
    "key", [*Evaluation.model_fields, "languages.de.p_value", "languages.en.score", "gap.ci95", "worst.after.language"]
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
