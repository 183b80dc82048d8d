"""teachers.json: what is written comes back; what is not as listed, or is no selection, is one clear error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.manifest import MANIFEST, load_manifest, write_manifest
from alsace_dist.files.selection import KIND, TEACHERS, Selection, read_selection, write_selection

SELECTION = Selection(
    rule="threshold",
    num_groups=4,
    teachers=["en", "de"],
    students=["sw"],
    scores={"en": 0.9, "de": 0.1 + 0.2, "sw": 1 / 3},
    threshold=1 / 3,
    normalised_scores={"en": 0.4, "de": 0.35, "sw": 0.25},
    weights={"en": 0.5, "de": 0.5},
    biases={"en": [0.0, 0.0], "de": [-1e-17, 1e-17]},
    num_pairs={"others": 7.0, "ranked": 5.0, "ensemble": 7.0, "anchor": 7.0, "votes": 7.0, "labels": 7.0},
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete selection."""
    write_selection(tmp_path / "selection", SELECTION, {"seed": 1})
    return tmp_path / "selection"


def sign_anew(directory: Path, value: Any) -> None:
    """Put another value into the file and list it, so that only its content can give it away."""
    (directory / TEACHERS).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    write_manifest(directory, KIND, {"seed": 1}, [directory / TEACHERS])


def test_what_is_written_comes_back(directory: Path) -> None:
    assert read_selection(directory) == SELECTION
    assert json.loads((directory / TEACHERS).read_text(encoding="utf-8")) == SELECTION.model_dump(mode="json")
    manifest = load_manifest(directory, KIND)
    assert manifest.fingerprint == {"seed": 1} and list(manifest.files) == [TEACHERS]
    without = SELECTION.model_copy(update={"threshold": None, "biases": {}, "students": []})
    write_selection(directory, without, {"seed": 1})
    assert read_selection(directory) == without


def test_equal_selections_are_equal_bytes(directory: Path, tmp_path: Path) -> None:
    value = SELECTION.model_dump(mode="json")
    shuffled = Selection.model_validate(value | {"scores": dict(reversed(SELECTION.scores.items()))})
    write_selection(tmp_path / "other", shuffled, {"seed": 1})
    for name in (TEACHERS, MANIFEST):
        assert (tmp_path / "other" / name).read_bytes() == (directory / name).read_bytes()


def test_biases_are_rows_in_double_precision() -> None:
    rows = SELECTION.bias_rows()
    assert list(rows) == ["en", "de"]
    assert all(row.dtype == np.float64 for row in rows.values())
    assert rows["de"].tolist() == [-1e-17, 1e-17]


def test_a_selection_without_its_manifest_is_not_ready(directory: Path, tmp_path: Path) -> None:
    (directory / MANIFEST).unlink()
    for place in (directory, tmp_path / "nowhere"):
        with pytest.raises(NotReady, match=rf"^{place}: not complete \(manifest\.json is missing\)"):
            read_selection(place)


def test_a_file_changed_after_the_manifest_is_refused(directory: Path) -> None:
    path = directory / TEACHERS
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.9", "0.8"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{path}: content differs from the sha256 in manifest\.json"):
        read_selection(directory)
    path.write_text(text + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{path}: \d+ bytes where manifest\.json says \d+"):
        read_selection(directory)
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: missing, though manifest\.json lists it"):
        read_selection(directory)


def test_another_kind_of_directory_is_refused(directory: Path) -> None:
    write_manifest(directory, "evaluation", {}, [directory / TEACHERS])
    with pytest.raises(UserError, match="holds 'evaluation' where 'selection' is needed"):
        read_selection(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_groups": "many"}, r"num_groups: Input should be a valid integer.*, not 'many'"),
        ({"num_groups": True}, r"num_groups: must be a number, not true"),
        ({"teachers": "en"}, r"teachers: Input should be a valid list, not 'en'"),
        ({"scores": {"en": "much"}}, r"scores\.en: Input should be a valid number.*, not 'much'"),
        ({"scores": {"en": None}}, r"scores\.en: Input should be a valid number, not None"),
        ({"weights": {"en": float("nan")}}, r"weights\.en: Input should be a finite number, not nan"),
        ({"threshold": float("inf")}, r"threshold: Input should be a finite number, not inf"),
        ({"biases": {"de": [0.0, float("nan")]}}, r"biases\.de\.1: Input should be a finite number, not nan"),
        ({"biases": {"de": 0.5}}, r"biases\.de: Input should be a valid list, not 0\.5"),
        ({"techers": ["en"]}, r"techers: unknown key; known here: biases, .*teachers"),
    ],
)
def test_a_value_of_another_type_is_named_by_file_and_key(directory: Path, changes: dict[str, Any], words: str) -> None:
    sign_anew(directory, SELECTION.model_dump(mode="json") | changes)
    with pytest.raises(UserError, match=rf"^{directory / TEACHERS}: {words}") as caught:
        read_selection(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": ["en", "de", "en"]}, "teachers and students: 'en' is there twice"),
        ({"students": ["sw", "sw"]}, "teachers and students: 'sw' is there twice"),
        ({"num_pairs": {}}, "num_pairs 0 or more for each of others, ranked, ensemble, anchor, votes, labels"),
        (
            {"num_pairs": SELECTION.num_pairs | {"anchor": -1.0}},
            "num_pairs 0 or more",
        ),
        ({"num_groups": 0}, "num_groups must be 1 or more"),
        ({"biases": {"en": [0.0, 0.0], "de": [0.0]}}, "biases must be of one length"),
        ({"biases": {"xx": [0.0, 0.0]}}, "biases: 'xx' is neither a teacher nor a student"),
    ],
)
def test_what_does_not_fit_together_is_refused(directory: Path, changes: dict[str, Any], words: str) -> None:
    sign_anew(directory, SELECTION.model_dump(mode="json") | changes)
    with pytest.raises(UserError, match=rf"^{directory / TEACHERS}: .*{words}"):
        read_selection(directory)


@pytest.mark.parametrize("key", Selection.model_fields)
def test_every_key_is_needed(directory: Path, key: str) -> None:
    value = SELECTION.model_dump(mode="json")
    del value[key]
    sign_anew(directory, value)
    with pytest.raises(UserError, match=rf"^{directory / TEACHERS}: {key}: is needed and missing"):
        read_selection(directory)


def test_everything_that_is_wrong_is_said_in_one_error(directory: Path) -> None:
    sign_anew(directory, SELECTION.model_dump(mode="json") | {"rule": 5, "extra": 1, "students": None})
    with pytest.raises(UserError) as caught:
        read_selection(directory)
    assert all(f"{key}: " in str(caught.value) for key in ("rule", "extra", "students"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"en"', "{", ""])
def test_what_is_no_mapping_is_no_selection(directory: Path, text: str) -> None:
    sign_anew(directory, text)
    with pytest.raises(UserError, match=rf"^{directory / TEACHERS}: ") as caught:
        read_selection(directory)
    assert "\n" not in str(caught.value)
