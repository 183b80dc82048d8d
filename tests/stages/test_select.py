"""Teacher selection: every rule, its errors, and the whole stage on real score files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from alsace_dist.config import Config, SelectConfig
from alsace_dist.config_file import load_config
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import is_complete, load_manifest, read_json, verify_files, write_manifest
from alsace_dist.files.scores import KIND, Scores, read_scores, write_scores
from alsace_dist.method import languages
from alsace_dist.stages.select import TEACHERS, choose_teachers, fingerprint, select

SCORES = {"sw": 0.40, "en": 0.80, "de": 0.75, "th": 0.45, "fr": 0.75}
Rows = list[tuple[str, str, list[float], int | None]]


def make_config(tmp_path: Path, source_language: str = "en", **sections: Any) -> Config:
    value = {
        "run_dir": str(tmp_path / "run"),
        "task": {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]},
        "data": {"directory": "/data", "source_language": source_language},
        "model": {"path": "/model"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(value | sections), encoding="utf-8")
    return load_config(path)


def make_scores(directory: Path, shards: Sequence[Rows]) -> Path:
    files = []
    for number, rows in enumerate(shards):
        log_probs = [np.log(np.array(row[2], dtype=np.float32)) for row in rows]
        path = directory / f"{number:06d}.parquet"
        write_scores(path, Scores([r[0] for r in rows], [r[1] for r in rows], log_probs, [r[3] for r in rows]), {})
        files.append(path)
    write_manifest(directory, KIND, {"model": "m"}, files)
    return directory


def run(config: Config, scores: Path, directory: Path) -> dict[str, Any]:
    value = select(config, scores, directory, fingerprint(config, scores))
    assert read_json(directory / TEACHERS) == json.loads(json.dumps(value))
    return value


# --- rules ---------------------------------------------------------------------------------------------------------


def choose(seed: int = 0, **section: Any) -> list[str]:
    return choose_teachers(SelectConfig(**section), SCORES, "en", seed)


def test_rules_choose_by_score_best_first() -> None:
    assert choose(rule="threshold") == ["en", "de", "fr"]
    assert choose(rule="all") == ["en", "de", "fr", "th", "sw"]
    assert choose(rule="source") == ["en"]
    assert choose(rule="top_k", top_k=1) == ["en"]
    assert choose(rule="top_k", top_k=4) == ["en", "de", "fr", "th"]
    assert choose(rule="explicit", teachers=["sw", "en", "sw"]) == ["en", "sw"]


def test_the_source_teaches_alone_even_when_others_score_better() -> None:
    assert choose_teachers(SelectConfig(rule="source"), SCORES, "sw", 0) == ["sw"]


def test_random_teachers_are_as_many_as_the_threshold_picks_and_depend_on_the_seed_alone() -> None:
    draws = [choose(seed, rule="random") for seed in range(30)]
    assert draws == [choose(seed, rule="random") for seed in range(30)]
    assert {len(set(draw)) for draw in draws} == {3}
    assert all(draw == [name for name in ("en", "de", "fr", "th", "sw") if name in draw] for draw in draws)
    assert {name for draw in draws for name in draw} == set(SCORES)
    assert len({tuple(draw) for draw in draws}) > 5


def test_rules_that_cannot_be_met() -> None:
    with pytest.raises(UserError, match=r"^select\.top_k: 6 asked for, there are 5 languages; lower it$"):
        choose(rule="top_k", top_k=6)
    with pytest.raises(
        UserError, match=r"^select\.teachers: pt, zz not among the scored languages en, de, fr, th, sw$"
    ):
        choose(rule="explicit", teachers=["zz", "en", "pt"])


# --- the stage -----------------------------------------------------------------------------------------------------

# Two shards, a language missing here and there. Votes: g0 -> 0, g1 -> 1, g2 -> 0 (tie: 1.3 against 0.7), g3 -> 1.
SHARDS: list[Rows] = [
    [
        ("g0", "de", [0.8, 0.2], 0),
        ("g0", "en", [0.9, 0.1], 0),
        ("g0", "sw", [0.4, 0.6], 0),
        ("g1", "de", [0.3, 0.7], 1),
        ("g1", "en", [0.2, 0.8], 1),
    ],
    [("g2", "en", [0.9, 0.1], 1), ("g2", "sw", [0.4, 0.6], 1), ("g3", "sw", [0.45, 0.55], 0)],
]
BY_HAND = {"de": (0.8 + 0.7) / 2, "en": (0.9 + 0.8 + 0.9) / 3, "sw": (0.4 + 0.4 + 0.55) / 3}


def test_the_papers_selection_by_hand(tmp_path: Path) -> None:
    config = make_config(tmp_path, method="paper")
    scores = make_scores(tmp_path / "scores", SHARDS)
    value = run(config, scores, tmp_path / "selection")
    assert value["rule"] == "threshold"
    assert value["teachers"] == ["en", "de"]
    assert value["students"] == ["sw"]
    assert value["scores"] == pytest.approx(BY_HAND, abs=1e-6)
    assert value["weights"] == {"en": 0.5, "de": 0.5}
    assert value["biases"] == {}
    assert value["threshold"] == pytest.approx(1 / 3)
    exponentials = {language: np.exp(score) for language, score in BY_HAND.items()}
    expected = {language: one / sum(exponentials.values()) for language, one in exponentials.items()}
    assert value["normalised_scores"] == pytest.approx(expected, abs=1e-6)
    # g0: two for sw, one for each teacher; g1: one each; g2: en teaches sw; g3: no teacher.
    assert value["num_pairs"] == {"others": 4 + 2 + 1, "ensemble": 3 + 2 + 2, "anchor": 3 + 2 + 2}


def test_a_finished_selection_is_complete_and_bound_to_its_settings(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    scores = make_scores(tmp_path / "scores", SHARDS)
    directory = tmp_path / "selection"
    run(config, scores, directory)
    verify_files(directory, load_manifest(directory, "selection"))
    assert is_complete(directory, "selection", fingerprint(config, scores))
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", TEACHERS]
    other = make_config(tmp_path, select={"beta": 3.0})
    with pytest.raises(UserError, match=r"made with other settings \(select\.beta: 12\.0 -> 3\.0\)"):
        is_complete(directory, "selection", fingerprint(other, scores))
    rescored = make_scores(tmp_path / "rescored", [SHARDS[0]])
    with pytest.raises(UserError, match=r"made with other settings \(scores: "):
        is_complete(directory, "selection", fingerprint(config, rescored))


def biased_shards(num_groups: int = 200) -> list[Rows]:
    """English is right in 90 % of the groups, German in 80 %; the other three give the first answer whatever they are
    asked, and are the surest of all."""
    rng = np.random.default_rng(0)
    rows: Rows = []
    for index in range(num_groups):
        truth = index % 2
        for language, accuracy, confidence in (("de", 0.8, 0.75), ("en", 0.9, 0.8)):
            answer = truth if rng.random() < accuracy else 1 - truth
            rows.append((f"g{index}", language, [confidence if k == answer else 1 - confidence for k in (0, 1)], None))
        for language in ("xh", "yo", "zu"):
            certain = 0.97 + 0.02 * rng.random()
            rows.append((f"g{index}", language, [certain, 1 - certain], None))
    half = len(rows) // 10 * 5
    return [rows[:half], rows[half:]]


def test_calibration_takes_the_crown_from_languages_that_are_only_confident(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", biased_shards())
    paper = run(make_config(tmp_path, method="paper"), scores, tmp_path / "paper")
    assert sorted(paper["teachers"]) == ["xh", "yo", "zu"]
    better = run(make_config(tmp_path), scores, tmp_path / "better")
    assert better["teachers"][:2] == ["en", "de"] and len(better["teachers"]) == 5 and better["students"] == []
    assert better["biases"]["xh"][0] < -1 and better["biases"]["en"] == [0, 0]
    assert better["weights"]["en"] > better["weights"]["de"] > 2 * better["weights"]["xh"]
    assert sum(better["weights"].values()) == pytest.approx(1)
    ratio = np.exp(12.0 * (better["scores"]["en"] - better["scores"]["de"]))
    assert better["weights"]["en"] / better["weights"]["de"] == pytest.approx(ratio)
    assert better["threshold"] is None


def test_parts_of_the_section_reach_the_arithmetic(tmp_path: Path) -> None:
    """Each setting gives what the function that it stands for gives, and not what the default gives."""
    scores = make_scores(tmp_path / "scores", biased_shards(50))
    default = run(make_config(tmp_path, select={"vote": "hard"}), scores, tmp_path / "default")
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, language, row, _ in (row for rows in biased_shards(50) for row in rows):
        groups.setdefault(key, {})[language] = np.log(np.array(row, dtype=np.float32))
    rows = list(groups.values())
    calibrated = [languages.calibrate(g, languages.marginal_biases(rows, "en")) for g in rows]
    pooled = [languages.calibrate(g, languages.marginal_biases(rows, None)) for g in rows]
    for section, expected in (
        ({"vote": "soft"}, languages.language_scores(calibrated, soft=True)),
        ({"vote": "source"}, languages.language_scores(calibrated, source="en")),
        ({"score": "agreement"}, languages.language_scores(calibrated, agreement=True)),
        ({"leave_one_out": True}, languages.language_scores(calibrated, leave_one_out=True)),
        ({"reference": "pooled"}, languages.language_scores(pooled)),
        ({"calibration": "none"}, languages.language_scores(rows)),
    ):
        found = run(make_config(tmp_path, select={"vote": "hard"} | section), scores, tmp_path / str(section))
        assert found["scores"] == pytest.approx(expected, abs=1e-6), section
        assert found["scores"] != pytest.approx(default["scores"], abs=1e-6), section


@pytest.mark.parametrize("method", ["paper", "calibrated"])
def test_labels_in_the_score_files_change_nothing(tmp_path: Path, method: str) -> None:
    config = make_config(tmp_path, method=method)
    labels: list[Any] = [None, 0, 1]
    written = set()
    for number, label in enumerate(labels):
        shards = [[(key, language, row, label) for key, language, row, _ in rows] for rows in SHARDS]
        scores = make_scores(tmp_path / f"scores{number}", shards)
        run(config, scores, tmp_path / f"selection{number}")
        written.add((tmp_path / f"selection{number}" / TEACHERS).read_bytes())
    assert len(written) == 1


def test_num_pairs_count_what_the_loss_sums_over(tmp_path: Path) -> None:
    """Against a count of pairs one by one, and against the weights of the targets that training makes."""
    rng = np.random.default_rng(3)
    names = ["aa", "bb", "cc", "dd", "en"]
    groups = [[name for name in names if rng.random() < 0.5] for _ in range(40)] + [["en"], ["aa"], ["en", "aa"]]
    rows: Rows = [
        (str(index), language, [0.25, 0.75] if rng.random() < 0.5 else [0.6, 0.4], None)
        for index, group in enumerate(groups)
        for language in group
    ]
    scores = make_scores(tmp_path / "scores", [rows[:50], rows[50:]])
    for teachers in (["en", "cc"], ["bb"], names):
        config = make_config(tmp_path, select={"rule": "explicit", "teachers": teachers})
        value = run(config, scores, tmp_path / "-".join(teachers))
        others = sum(a != b for group in groups for a in group if a in teachers for b in group)
        once = sum(len(group) for group in groups if set(group) & set(teachers))
        assert value["num_pairs"] == {"others": others, "ensemble": once, "anchor": once}
        for mode, expected in value["num_pairs"].items():
            found = [
                languages.targets({language: np.log([0.5, 0.5]) for language in group}, value["weights"], mode)
                for group in groups
            ]
            assert sum(target.weight for one in found for target in one.values()) == expected


def test_what_cannot_be_selected_from(tmp_path: Path) -> None:
    directory = tmp_path / "selection"
    config = make_config(tmp_path)
    with pytest.raises(UserError, match=r"scores: not complete \(manifest.json is missing\)"):
        fingerprint(config, tmp_path / "scores")
    empty = make_scores(tmp_path / "empty", [[]])
    with pytest.raises(UserError, match=r"empty: holds no scores; unlabeled groups are needed"):
        run(config, empty, directory)
    scores = make_scores(tmp_path / "scores", SHARDS)
    with pytest.raises(UserError, match=r"has no scores in the source language 'fi'; check data\.source_language"):
        run(make_config(tmp_path, source_language="fi"), scores, directory)
    uneven = make_scores(tmp_path / "uneven", [[("g9", "en", [0.2, 0.3, 0.5], None), *SHARDS[0]]])
    with pytest.raises(UserError, match=r"^select\.calibration: .* found \[2, 3\] of them; set it to none$"):
        run(config, uneven, directory)
    with pytest.raises(UserError, match=r"^select\.top_k: 4 asked for, there are 3 languages"):
        run(make_config(tmp_path, select={"rule": "top_k", "top_k": 4}), scores, directory)
    assert not directory.exists()
    plain = run(make_config(tmp_path, method="paper"), uneven, directory)
    assert plain["scores"] == pytest.approx({"de": 0.75, "en": (0.5 + 0.9 + 0.8) / 3, "sw": 0.4}, abs=1e-6)


def test_num_groups_takes_whole_shards_until_there_are_enough(tmp_path: Path) -> None:
    directory = tmp_path / "scores"
    paths = []
    for shard in range(3):
        keys = [f"g{shard}{number}" for number in range(4)]
        path = directory / f"00000{shard}.parquet"
        rows = [np.log(np.array([0.5, 0.5], dtype=np.float32))] * 4
        write_scores(path, Scores(keys, ["en"] * 4, rows, [None] * 4), {})
        paths.append(path)
    write_manifest(directory, KIND, {}, paths)
    assert [len(read_scores(directory, number).keys) for number in (1, 4, 5, 12, None)] == [4, 4, 8, 12, 12]
    with pytest.raises(UserError, match=r"select\.num_groups: 13 asked for, .* has 12; lower it"):
        read_scores(directory, 13)
