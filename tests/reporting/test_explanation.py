"""Why these teachers: by hand on a few groups, and how it is printed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alsace_dist.config import Config
from alsace_dist.files.manifest import write_manifest
from alsace_dist.files.scores import KIND, Scores, read_scores, write_scores
from alsace_dist.reporting.explanation import agreements, explanation, stability
from alsace_dist.stages.select import make_selection

# Group -> language -> probability of the first of two candidates, and the right one.
GROUPS: dict[str, tuple[dict[str, float], int]] = {
    "g0": ({"en": 0.9, "de": 0.8, "sw": 0.4}, 0),
    "g1": ({"en": 0.2, "de": 0.3, "sw": 0.4}, 1),
    "g2": ({"en": 0.9, "de": 0.4}, 0),
    "g3": ({"en": 0.1, "de": 0.2, "sw": 0.9}, 1),
}


def config_of(**sections: Any) -> Config:
    task = {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]}
    value = {"run_dir": "run", "task": task, "data": {"directory": "data"}, "model": {"path": "model"}}
    return Config.model_validate(value | {"method": "paper"} | sections)


def scores_of(directory: Path, with_labels: bool, groups: dict[str, tuple[dict[str, float], int]] = GROUPS) -> Scores:
    rows = [(key, name, value, label) for key, (group, label) in groups.items() for name, value in group.items()]
    scores = Scores(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [np.log(np.array([row[2], 1 - row[2]], dtype=np.float32)) for row in rows],
        [row[3] if with_labels else None for row in rows],
    )
    write_scores(directory / "000000.parquet", scores, {})
    write_manifest(directory, KIND, {}, [directory / "000000.parquet"])
    return read_scores(directory)


def test_a_language_that_some_of_the_groups_lack_altogether_is_left_out(tmp_path: Path) -> None:
    """A report reads no more than some thousand groups, and what one alone has is in no order."""
    config, scores = config_of(), scores_of(tmp_path / "all", True)
    selection = make_selection(config, tmp_path / "all")
    alone = {key: ({"en": group["en"]}, label) for key, (group, label) in GROUPS.items()}
    (title, languages), *_, (said, worth) = explanation(config, selection, scores_of(tmp_path / "some", True, alone))
    assert len(scores.groups()) == 4 and "2 teachers" in title
    assert [row.cells[0] for row in languages.rows] == ["en"]
    assert said == "What labels say"
    assert all("nan" not in cell for row in worth.rows for cell in row.cells)


def test_of_groups_that_have_a_label_it_is_said_how_many_they_are(tmp_path: Path) -> None:
    config, scores = config_of(), scores_of(tmp_path, True)
    selection = make_selection(config, tmp_path)
    few = replace(
        scores,
        labels=[
            None if key == scores.keys[0] else label for key, label in zip(scores.keys, scores.labels, strict=True)
        ],
    )
    (_, languages), *_, (said, worth) = explanation(config, selection, few)
    assert said.endswith(", of the 3 of 4 groups that have one") and "Accuracy" in languages.header and worth.rows


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_selection_language_by_language(tmp_path: Path, with_labels: bool) -> None:
    config, scores = config_of(), scores_of(tmp_path, with_labels)
    found = explanation(config, make_selection(config, tmp_path), scores)
    (title, languages), (_, matrix), *labels = found
    assert title.startswith("2 teachers by rule threshold, on 4 groups (threshold of the softmax ")
    # Votes: x, y, x (a tie by summed probability), y. en agrees in 4 of 4, de in 3, sw in 1 of 3.
    by_name = {row.cells[0]: dict(zip(languages.header, row.cells, strict=True)) for row in languages.rows}
    assert [by_name[name]["Role"] for name in ("en", "de", "sw")] == ["teacher", "teacher", "student"]
    assert by_name["en"]["Score"] == f"{(0.9 + 0.8 + 0.9 + 0.9) / 4:.3f}"
    assert [by_name[name]["Agrees with the vote"] for name in ("en", "de", "sw")] == ["1.00", "0.75", "0.33"]
    assert by_name["en"]["Weight"] == "0.500" and by_name["sw"]["Weight"] == "–"
    assert [row.cells for row in matrix.rows] == [
        ["en", "1.00", "0.75", "0.33"],
        ["de", "0.75", "1.00", "0.33"],
        ["sw", "0.33", "0.33", "1.00"],
    ]
    assert ("Accuracy" in languages.header) == with_labels == bool(labels)
    if with_labels:
        assert [by_name[name]["Accuracy"] for name in ("en", "de", "sw")] == ["100.0", "75.0", "33.3"]
        (title, worth), = labels  # fmt: skip
        assert title == "What labels say (rank correlation of score and accuracy: 1.00)"
        assert [row.cells[0] for row in worth.rows][-1] == "en alone"
        loss = -np.log([0.9, 0.8, 0.9, 0.9]).mean()
        assert worth.rows[-1].cells[1:] == ["100.0", f"{loss:.3f}"]


def test_a_language_that_is_never_beside_the_source_language_has_no_line(tmp_path: Path) -> None:
    """Scored against the source language's answers it has no score; it learns all the same."""
    config = config_of(select={"vote": "source"})
    selections, tables = [], []
    for name, more in ("without", {}), ("with", {"g4": ({"aa": 0.9, "de": 0.2}, 0), "g5": ({"zz": 0.3}, 0)}):
        scores = scores_of(tmp_path / name, False, GROUPS | more)
        selections.append(make_selection(config, tmp_path / name))
        (_, languages), *_ = explanation(config, selections[-1], scores)
        tables.append([row.cells[:3] for row in languages.rows])
    assert tables[0] == tables[1] and [row[0] for row in tables[0]] == ["en", "de", "sw"]
    assert selections[1].students == ["sw", "aa", "zz"] and selections[1].scores == selections[0].scores


def test_an_oracle_is_as_sure_as_its_accuracies(tmp_path: Path) -> None:
    """Of sw one of three answers is right, and its confidence is beside the point: it would be above de's."""
    config, scores = config_of(select={"score": "accuracy"}), scores_of(tmp_path, True)
    selection = make_selection(config, tmp_path)
    assert selection.scores == pytest.approx({"en": 1.0, "de": 0.75, "sw": 1 / 3})
    (_, languages), *_ = explanation(config, selection, scores)
    teaches = {row.cells[0]: row.cells[4] for row in languages.rows}
    assert teaches["en"] == "100%" and float(teaches["sw"].rstrip("%")) < 20
    alike = [{"en": np.log([0.6, 0.4]), "de": np.log([0.9, 0.1])}] * 4
    found = stability(config, alike, ["en", "de"], [(0,)] * 2 + [(1,)] * 2)
    assert found["en"].teaches == found["de"].teaches == pytest.approx(1.0)  # equal accuracies, unequal confidences


def test_a_language_that_stands_apart_has_a_label_of_its_own() -> None:
    row = np.log(np.array([0.5, 0.5], dtype=np.float32))
    scores = Scores(["g", "g"], ["en", "hi"], [row, row], [0, 1], [False, True])
    assert scores.golds() == {"g": (0,)}


def test_ranks_are_sure_where_scores_lie_apart_and_not_where_they_are_alike() -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.05, 0.05, (60, 4))
    means = {"best": 0.9, "middle": 0.7, "twin": 0.7, "worst": 0.55}
    groups = [
        {name: np.log([mean + shift, 1 - mean - shift]) for (name, mean), shift in zip(means.items(), row, strict=True)}
        for row in noise
    ]
    found = stability(config_of(), groups, list(means))
    assert found["best"].rank == (1, 1) and found["worst"].rank == (4, 4)
    assert found["middle"].rank == found["twin"].rank == (2, 3)
    assert found["best"].teaches == pytest.approx(1.0) and found["worst"].teaches == 0.0


def test_languages_that_share_no_group_have_no_agreement() -> None:
    groups = [{"en": np.log([0.9, 0.1])}, {"de": np.log([0.9, 0.1])}]
    found = agreements(groups, ["en", "de"])
    assert np.isnan(found[0, 1]) and found[0, 0] == 1.0
