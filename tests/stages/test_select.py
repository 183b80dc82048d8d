"""Teacher selection: every rule, its errors, and the whole stage on real score files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from alsace_dist import runner
from alsace_dist.config import Config, SelectConfig
from alsace_dist.config_file import load_config
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files import scores as score_files
from alsace_dist.files.manifest import load_manifest, verify_files, write_manifest
from alsace_dist.files.scores import Scores, write_scores
from alsace_dist.files.selection import KIND, TEACHERS, read_selection
from alsace_dist.method.calibration import calibrate, marginal_biases
from alsace_dist.method.selection import Yardstick, choose_teachers, language_scores
from alsace_dist.method.targets import targets
from alsace_dist.stages import select
from alsace_dist.stages.base import Output, Stage
from alsace_dist.stages.select import make_selection

SCORES = {"sw": 0.40, "en": 0.80, "de": 0.75, "th": 0.45, "fr": 0.75}
Rows = list[tuple[str, str, list[float], int | None]]


def once(taught: float, present: float) -> dict[str, float]:
    """``num_pairs`` where every language counts once: those of groups with a teacher, or all of them."""
    return dict.fromkeys(("ensemble", "anchor"), taught) | dict.fromkeys(("votes", "labels"), present)


def make_config(tmp_path: Path, source_language: str = "en", **sections: Any) -> Config:
    value = {
        "run_dir": str(tmp_path / "run"),
        "task": {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]},
        "data": {"directory": "/data", "source_language": source_language},
        "model": {"path": "/model"},
    }
    path = tmp_path / "config.yaml"
    tmp_path.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(value | sections), encoding="utf-8")
    return load_config(path)


def make_scores(directory: Path, shards: Sequence[Rows]) -> Path:
    files = []
    for number, rows in enumerate(shards):
        log_probs = [np.log(np.array(row[2], dtype=np.float32)) for row in rows]
        path = directory / f"{number:06d}.parquet"
        write_scores(path, Scores([r[0] for r in rows], [r[1] for r in rows], log_probs, [r[3] for r in rows]), {})
        files.append(path)
    write_manifest(directory, score_files.KIND, {"model": "m"}, files)
    return directory


def stage_of(tmp_path: Path, shards: Sequence[Rows] | None, **sections: Any) -> Stage:
    """The first round's selection in a run of its own, whose unlabeled groups have these scores; None: none yet."""
    stage = Stage(select, "select", make_config(tmp_path, **sections), round=1)
    if shards is not None:
        make_scores(stage.inputs[0].directory, shards)
    return stage


# --- rules ---------------------------------------------------------------------------------------------------------


def choose(seed: int = 0, **section: Any) -> list[str]:
    return choose_teachers(SelectConfig(**section), SCORES, "en", seed)


def test_rules_choose_by_score_best_first() -> None:
    assert choose(rule="threshold") == ["en", "de", "fr"]
    assert choose(rule="all") == ["en", "de", "fr", "th", "sw"]
    assert choose(rule="source") == ["en"]
    assert choose(rule="top_k", top_k=1) == ["en"]
    assert choose(rule="top_k", top_k=4) == ["en", "de", "fr", "th"]
    assert choose(rule="explicit", teachers=["sw", "en", "sw"]) == ["sw", "en"]  # as a person ranks them


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
    found = make_selection(config, make_scores(tmp_path / "scores", SHARDS))
    assert found.rule == "threshold"
    assert found.num_groups == 4
    assert found.teachers == ["en", "de"]
    assert found.students == ["sw"]
    assert found.scores == pytest.approx(BY_HAND, abs=1e-6)
    assert found.weights == {"en": 0.5, "de": 0.5}
    assert found.biases == {}
    assert found.threshold == pytest.approx(1 / 3)
    exponentials = {language: np.exp(score) for language, score in BY_HAND.items()}
    expected = {language: one / sum(exponentials.values()) for language, one in exponentials.items()}
    assert found.normalised_scores == pytest.approx(expected, abs=1e-6)
    # g0: two for sw, one for each teacher; g1: one each; g2: en teaches sw; g3: no teacher.
    assert found.num_pairs == {"others": 4 + 2 + 1, "ranked": 3 + 1 + 1} | once(3 + 2 + 2, 3 + 2 + 2 + 1)


def test_a_finished_selection_is_complete_and_bound_to_its_settings(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, SHARDS)
    output = Output(tmp_path / "run/round1/selection", KIND)
    assert stage.outputs == [output]
    assert stage.state() == "to do"
    runner.run_stage(stage)
    verify_files(output.directory, output.manifest())
    assert stage.is_complete() and stage.state() == "complete"
    assert output.manifest().fingerprint == stage.fingerprint(output)
    assert read_selection(output.directory) == make_selection(stage.config, stage.inputs[0].directory)
    assert sorted(path.name for path in output.directory.iterdir()) == ["manifest.json", TEACHERS]
    with pytest.raises(UserError, match=r"made with other settings \(select\.beta: 12\.0 -> 3\.0\)"):
        stage_of(tmp_path, None, select={"beta": 3.0}).is_complete()
    with pytest.raises(UserError, match=r"made with other settings \(scores: "):
        stage_of(tmp_path, [SHARDS[0]]).is_complete()  # scored again


def test_a_complete_selection_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = stage_of(tmp_path, SHARDS)
    runner.run_stage(stage)
    before = (stage.outputs[0].directory / TEACHERS).stat().st_mtime_ns
    runner.run_stage(stage)
    assert (stage.outputs[0].directory / TEACHERS).stat().st_mtime_ns == before
    assert capsys.readouterr().err.splitlines() == ["select round 1", "select round 1: complete, skipped"]


def test_each_round_selects_from_the_scores_of_the_round_before_and_calibrate_from_the_last(tmp_path: Path) -> None:
    config = make_config(tmp_path, rounds=2, evaluate={"calibrate": True})
    rounds = [Stage(select, "select", config, round=1), Stage(select, "select", config, round=2)]
    calibrate_stage = Stage(select, "calibrate", config, round=2)
    for number, shards in enumerate((SHARDS, [SHARDS[0]], [SHARDS[0][:3]])):
        place = tmp_path / "run" / (f"round{number}" if number else "") / "scores/unlabeled"
        make_scores(place, shards)
    for stage, name, num_groups in zip(
        [*rounds, calibrate_stage], ("round1/selection", "round2/selection", "calibration"), (4, 2, 1), strict=True
    ):
        stage.run(None)
        assert read_selection(tmp_path / "run" / name).num_groups == num_groups
        assert load_manifest(tmp_path / "run" / name, KIND).fingerprint == stage.fingerprint(stage.outputs[0])


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
    paper = make_selection(make_config(tmp_path, method="paper"), scores)
    assert sorted(paper.teachers) == ["xh", "yo", "zu"]
    better = make_selection(make_config(tmp_path), scores)
    assert better.teachers[:2] == ["en", "de"] and len(better.teachers) == 5 and better.students == []
    assert better.biases["xh"][0] < -1 and better.biases["en"] == [0, 0]
    assert better.weights["en"] > better.weights["de"] > 2 * better.weights["xh"]
    assert sum(better.weights.values()) == pytest.approx(1)
    ratio = np.exp(12.0 * (better.scores["en"] - better.scores["de"]))
    assert better.weights["en"] / better.weights["de"] == pytest.approx(ratio)
    assert better.threshold is None


def test_parts_of_the_section_reach_the_arithmetic(tmp_path: Path) -> None:
    """Each setting gives what the function that it stands for gives, and not what the default gives."""
    scores = make_scores(tmp_path / "scores", biased_shards(50))

    def scores_under(**section: Any) -> dict[str, float]:
        return make_selection(make_config(tmp_path, select={"vote": "hard"} | section), scores).scores

    default = scores_under()
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, language, row, _ in (row for rows in biased_shards(50) for row in rows):
        groups.setdefault(key, {})[language] = np.log(np.array(row, dtype=np.float32))
    rows = list(groups.values())
    calibrated = [calibrate(group, marginal_biases(rows, "en")) for group in rows]
    pooled = [calibrate(group, marginal_biases(rows, None)) for group in rows]
    for section, expected in (
        ({"vote": "soft"}, language_scores(calibrated, Yardstick(soft=True))),
        ({"vote": "source"}, language_scores(calibrated, Yardstick(source_language="en"))),
        ({"score": "agreement"}, language_scores(calibrated, Yardstick(agreement=True))),
        ({"leave_one_out": True}, language_scores(calibrated, Yardstick(leave_one_out=True))),
        ({"reference": "pooled"}, language_scores(pooled)),
        ({"calibration": "none"}, language_scores(rows)),
    ):
        found = scores_under(**section)
        assert found == pytest.approx(expected, abs=1e-6), section
        assert found != pytest.approx(default, abs=1e-6), section


@pytest.mark.parametrize("method", ["paper", "calibrated"])
def test_labels_in_the_score_files_change_nothing(tmp_path: Path, method: str) -> None:
    labels: list[Any] = [None, 0, 1]
    written = set()
    for label in labels:
        shards = [[(key, language, row, label) for key, language, row, _ in rows] for rows in SHARDS]
        stage = stage_of(tmp_path / str(label), shards, method=method)
        stage.run(None)
        written.add((stage.outputs[0].directory / TEACHERS).read_bytes())
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
        found = make_selection(make_config(tmp_path, select={"rule": "explicit", "teachers": teachers}), scores)
        others = sum(a != b for group in groups for a in group if a in teachers for b in group)
        ranked = sum(
            b not in teachers or teachers.index(a) < teachers.index(b)
            for group in groups
            for a in group
            if a in teachers
            for b in group
        )
        taught = sum(len(group) for group in groups if set(group) & set(teachers))
        assert found.num_pairs == {"others": others, "ranked": ranked} | once(taught, sum(map(len, groups)))
        for mode, expected in found.num_pairs.items():
            if mode == "labels":  # which scores do not tell
                continue
            made = [targets(dict.fromkeys(group, np.log([0.5, 0.5])), found.ranked_weights, mode) for group in groups]
            assert sum(target.weight for one in made for target in one.values()) == expected


def test_an_oracle_scores_languages_by_their_labels(tmp_path: Path) -> None:
    rows: Rows = [
        ("g0", "en", [0.9, 0.1], 0),
        ("g0", "de", [0.4, 0.6], 0),
        ("g1", "en", [0.2, 0.8], 1),
        ("g1", "de", [0.3, 0.7], 1),
        ("g2", "de", [0.3, 0.7], 0),
    ]
    config = make_config(tmp_path, select={"score": "accuracy", "calibration": "none"})
    found = make_selection(config, make_scores(tmp_path / "scores", [rows]))
    assert found.scores == pytest.approx({"en": 1.0, "de": 1 / 3})
    unlabeled: Rows = [*rows, ("g3", "en", [0.3, 0.7], None)]
    words = "select.score: accuracy looks at labels, and 1 of 4 groups in .* have none; take unlabeled out of data.with"
    with pytest.raises(UserError, match=words):
        make_selection(config, make_scores(tmp_path / "more", [unlabeled]))


OWN = {"task": {"fields": ["text"], "template": "{text} ___", "labels": [], "candidates": "own", "gap": "___"}}
UNEVEN: list[Rows] = [[("g9", "en", [0.2, 0.3, 0.5], None), *SHARDS[0]]]


@pytest.mark.parametrize(
    ("shards", "sections", "words"),
    [
        ([[]], {}, r"unlabeled: holds no scores; unlabeled groups are needed"),
        (SHARDS, {"source_language": "fi"}, r"has no scores in the source language 'fi'; check data\.source_language"),
        (UNEVEN, OWN, r"^select\.calibration: .* found \[2, 3\] of them; set it to none$"),
        (SHARDS, {"select": {"rule": "top_k", "top_k": 4}}, r"^select\.top_k: 4 asked for, there are 3 languages"),
        ([[("g0", "en", [float("nan"), 0.5], None)]], {}, r"unlabeled: holds scores that are no numbers"),
    ],
)
def test_what_cannot_be_selected_from(tmp_path: Path, shards: list[Rows], sections: dict[str, Any], words: str) -> None:
    stage = stage_of(tmp_path, shards, **sections)
    with pytest.raises(UserError, match=words):
        stage.run(None)
    assert not stage.outputs[0].directory.exists()


def test_a_selection_waits_for_its_scores(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, None)
    for ask in (lambda: stage.fingerprint(stage.outputs[0]), stage.is_complete, lambda: stage.run(None)):
        with pytest.raises(NotReady, match=r"scores/unlabeled: not complete \(manifest.json is missing\)"):
            ask()
    assert stage.state() == "to do"
    assert not stage.outputs[0].directory.exists()


def test_without_calibration_groups_may_differ_in_their_candidates(tmp_path: Path) -> None:
    plain = make_selection(make_config(tmp_path, method="paper", **OWN), make_scores(tmp_path / "uneven", UNEVEN))
    assert plain.scores == pytest.approx({"de": 0.75, "en": (0.5 + 0.9 + 0.8) / 3, "sw": 0.4}, abs=1e-6)
