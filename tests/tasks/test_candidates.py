"""Examples with candidates of their own, from the data to the report."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from data.preparing import make_config

from alsace_dist.config_file import load_config
from alsace_dist.data.rows import Candidates, EncodedRow, answers_of, one_hot_example, rows_of
from alsace_dist.data.tokens import TokenRows, write_tokens
from alsace_dist.errors import UserError
from alsace_dist.files.evaluation import read_evaluation
from alsace_dist.files.scores import Scores, read_score_file, read_scores, write_scores
from alsace_dist.files.shards import ParallelGroup, read_shard, write_dataset
from alsace_dist.models.family import open_model
from alsace_dist.reporting.facts import Facts
from alsace_dist.reporting.report import write_report
from alsace_dist.stages.distill import check_scores, labelled_example
from alsace_dist.stages.evaluate import Outcome, Outcomes, precision
from alsace_dist.stages.prepare import prepare
from alsace_dist.tasks.base import candidates
from alsace_dist.training.examples import GroupExamples
from alsace_dist.training.losses import Divergence
from alsace_dist.training.tokens import Tokens

TASK = {
    "fields": ["premise", "question", "choice1", "choice2"],
    "template": "{premise} {question}",
    "labels": [0, 1],
    "candidates": ["choice1", "choice2"],
}


def write_choices(path: Path, num_groups: int) -> None:
    """Of two choices the right one begins with the premise's first word."""
    rng = random.Random(2)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            first, other, *rest = rng.sample(range(8), 5)
            label = rng.randrange(2)
            texts = {}
            for language in tiny.LANGUAGES:
                words = tiny.WORDS[language]
                choices = [f"{words[first]} {words[rest[0]]}", f"{words[other]} {words[rest[1]]} {words[rest[2]]}"]
                texts[language] = {
                    "premise": words[first],
                    "question": words[rest[2]],
                    "choice1": choices[label],
                    "choice2": choices[1 - label],
                }
            file.write(json.dumps({"id": number, "label": label, "texts": texts}) + "\n")


def config_of(world: Path, directory: Path, **sections: Any) -> Path:
    write_choices(directory / "data.jsonl", 60)
    sections = {"data": {"inputs": [{"path": str(directory / "data.jsonl")}]}} | sections
    sections["data"] |= {"splits": {"labeled": 20, "unlabeled": 20, "test": 20}}
    value = tiny.make_config(world, run_dir=str(directory / "run"), **sections)
    value["task"] = TASK
    return tiny.write_config(directory / "c.yaml", value)


def test_candidates_are_the_fields_of_the_example_in_the_order_of_the_labels(world: Path, tmp_path: Path) -> None:
    task = load_config(config_of(world, tmp_path)).task
    fields = {"premise": "p", "question": "q", "choice1": "one", "choice2": "two"}
    assert candidates(task, "en", fields) == ("one", "two")
    swapped = load_config(config_of(world, tmp_path), {"task.candidates": ["choice2", "choice1"]}).task
    assert candidates(swapped, "en", fields) == ("two", "one")
    with pytest.raises(UserError, match="lacks the field 'choice2'"):
        candidates(task, "en", {"premise": "p", "question": "q", "choice1": "one"})


def test_they_go_from_the_data_to_the_report_on_two_sharded_ranks(world: Path, tmp_path: Path) -> None:
    path = config_of(world, tmp_path, engine={"zero_stage": 3})
    tiny.run_all(path)
    run = tmp_path / "run"
    scores = read_scores(run / "scores/unlabeled")
    assert all(len(row) == 2 for row in scores.log_probs)
    np.testing.assert_allclose([np.exp(row).sum() for row in scores.log_probs], 1, atol=1e-5)
    assert len({float(row[0]) for row in scores.log_probs}) > 40  # every example has choices of its own
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert set(metrics["languages"]) == set(tiny.LANGUAGES)
    assert len(json.loads((run / "round1/selection/teachers.json").read_text())["biases"]["de"]) == 2  # a bias a place


def test_a_candidate_is_text_and_neither_too_long_nor_a_token_of_control(world: Path, tmp_path: Path) -> None:
    config = load_config(config_of(world, tmp_path), {"task.max_tokens": 16})
    model = open_model(world / "model", answers_of(config.task, ["en"]))
    fields = {"premise": "red", "question": "new", "choice1": "</s> red", "choice2": "< /s> red"}
    (row,) = model.encode(rows_of(config.task, [ParallelGroup("g", 0, {"en": fields})], ["en"]))
    first, second = row.candidates.tokens
    assert first == second  # what looks like the end of a sequence is the letters that it is written with
    fields = fields | {"choice2": "red " * 40}
    with pytest.raises(UserError, match=r"task\.candidates: 'red red .* has \d+ tokens.*task\.max_tokens \(16\)"):
        model.encode(rows_of(config.task, [ParallelGroup("g", 0, {"en": fields})], ["en"]))


def test_two_equal_candidates_are_a_bad_record(world: Path, tmp_path: Path) -> None:
    config = load_config(config_of(world, tmp_path))
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    record = json.loads(lines[4])
    record["texts"]["de"]["choice2"] = record["texts"]["de"]["choice1"]
    lines[4] = json.dumps(record)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="1 equal candidates"):
        prepare(config, tmp_path / "run/data")
    assert "data.jsonl:5: equal candidates: de" in (tmp_path / "run/bad-records.txt").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": ["choice1"]}, "one field per label"),
        ({"candidates": ["choice1", "choice1"]}, "one field per label"),
        ({"candidates": ["choice1", "other"]}, "'other' is not one of fields"),
        ({"verbalizers": ["yes", "no"]}, "verbalizers are the same for every example"),
        ({"candidates": []}, "fields: no template uses choice1"),
    ],
)
def test_candidates_that_do_not_fit_the_task_are_refused(
    world: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = config_of(world, tmp_path)
    with pytest.raises(UserError, match=said):
        load_config(path, {f"task.{name}": value for name, value in change.items()})


# --- candidates of the groups' own, in any number ------------------------------------------------------------------

OWN = {"fields": ["text"], "template": "{text}", "labels": [], "candidates": "own", "gap": "___"}


def write_own(path: Path, num_groups: int) -> None:
    """Two to four candidates, one or two of which the text names; Russian stands apart in every third group, with one
    candidate more and an order of its own."""
    rng = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            places = rng.sample(range(8), rng.randrange(2, 5))
            right = sorted(rng.sample(range(len(places)), rng.randrange(1, 3)))
            texts, candidates = {}, {}
            for language in tiny.LANGUAGES:
                words = tiny.WORDS[language]
                text = " ".join(words[places[index]] for index in right)
                texts[language] = {"text": f"{text} ___", "bare": "___"}
                candidates[language] = [words[place] for place in places]
            record: dict[str, Any] = {"id": number, "label": right, "texts": texts, "candidates": candidates}
            record["category"] = ("here", "there")[number % 2]
            if number % 3 == 0:
                more = [*candidates["ru"], "камень дерево"]
                candidates["ru"] = more[::-1]
                record["apart"] = {"ru": [len(more) - 1 - index for index in right]}
            file.write(json.dumps(record) + "\n")


def own_config(world: Path, directory: Path, scorer: str = "mt5", **sections: Any) -> Path:
    """Candidates are scored by the mean of their tokens, less the same without context; XLM-R fills left to right."""
    write_own(directory / "data.jsonl", 60)
    value = tiny.make_config(world, run_dir=str(directory / "run"), select={"calibration": "none"}, **sections)
    value["data"] = {"inputs": [{"path": str(directory / "data.jsonl")}], "groups_per_shard": 8}
    value["data"]["splits"] = {"labeled": 20, "unlabeled": 20, "test": 20}
    value["model"] = tiny.of_scorer(world, scorer)["model"]
    value["model"] |= {"masks": "left_to_right"} if scorer == "cloze" else {}
    score = {"fields": ["text", "bare"], "candidate_score": "mean_pmi", "context_free_template": "{bare}"}
    if scorer == "new head":  # which gives a candidate one number
        value["model"]["mode"], score = "head", {"fields": ["text"]}
    value["task"] = OWN | {"max_tokens": 48} | score
    return tiny.write_config(directory / "c.yaml", value)


@pytest.mark.parametrize("scorer", ["mt5", "cloze", "new head", "t5gemma2"])
def test_own_candidates_from_the_data_to_the_report(world: Path, tmp_path: Path, scorer: str) -> None:
    path = own_config(world, tmp_path, scorer, engine={"zero_stage": 3})
    tiny.run_all(path)
    run = tmp_path / "run"
    scores = read_scores(run / "scores/test")
    assert {len(row) for row in scores.log_probs} == {2, 3, 4, 5}
    apart = {language for language, is_apart in zip(scores.languages, scores.apart, strict=True) if is_apart}
    assert apart == {"ru"} and set(scores.categories) == {"here", "there"}
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert metrics["languages"]["ru"]["num_examples"] == 20  # evaluated, whether it stands apart or not
    for language, rows in metrics["precision"].items():
        assert rows["all"]["num_right"] == rows["here"]["num_right"] + rows["there"]["num_right"], language
    write_report(tmp_path, {"main": read_evaluation(run / "evaluation")}, Facts())
    assert "## Precision" in (tmp_path / "report.md").read_text()
    assert "<h2>Precision</h2>" in (tmp_path / "report.html").read_text()


def test_of_true_labels_only_rows_learn_that_have_one_and_correspond(world: Path, tmp_path: Path) -> None:
    path = own_config(world, tmp_path, distill={"targets": "labels"})
    value = tiny.yaml.safe_load(path.read_text(encoding="utf-8"))
    value["data"] |= {"withhold_labels": [], "on_bad": "skip", "max_skipped": 0.5}
    value["data"]["splits"] = {"labeled": 0.3, "unlabeled": 0.4, "test": 0.3}
    tiny.write_config(path, value)
    data = tmp_path / "data.jsonl"
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    lacking = [record for record in records if "apart" not in record][:15]
    for record in lacking:
        record["label"] = None
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tiny.run_all(path)
    scores = read_scores(tmp_path / "run/scores/unlabeled")
    unknown = {key for key, label in zip(scores.keys, scores.labels, strict=True) if label is None}
    assert 0 < len(unknown) <= len(lacking)
    said = (tmp_path / "run/warnings.jsonl").read_text()
    assert f"{len(unknown)} groups without a label are not learnt from (targets: labels)" in said
    row = EncodedRow("g", "en", (0, 2), [1], Candidates(((1,), (2,), (3,))), 0, False)
    learnt = labelled_example(row, "data", 0.5)
    assert (learnt.target.tolist(), learnt.weight) == ([0.5, 0.0, 0.5], 2.0)
    for still in (replace(row, is_apart=True), replace(row, label=None), replace(row, label=())):
        assert labelled_example(still, "data", 0.5).weight == 0.0


def test_biases_of_places_where_groups_have_different_numbers_are_refused_at_once(world: Path, tmp_path: Path) -> None:
    path = own_config(world, tmp_path)
    for overrides, where in (
        ({"select.calibration": "marginal"}, "select"),
        ({"variants": {"more": {"select": {"calibration": "marginal"}}}}, r"variants\.more\.select"),
    ):
        with pytest.raises(UserError, match=rf"^{where}\.calibration: marginal needs .* have 2 to 4; set it to none"):
            prepare(load_config(path, overrides), tmp_path / "run/data")
    assert not (tmp_path / "run/data").exists()


@pytest.mark.parametrize("scorer", ["mt5", "cloze"])
def test_their_scores_are_the_same_bytes_on_any_number_of_ranks(world: Path, tmp_path: Path, scorer: str) -> None:
    path = own_config(world, tmp_path, scorer)
    prepare(load_config(path), tmp_path / "prepared")
    found = []
    for num_ranks in (1, 2):
        value = tiny.yaml.safe_load(path.read_text(encoding="utf-8"))
        value |= {"run_dir": str(tmp_path / str(num_ranks)), "data": {"directory": str(tmp_path / "prepared")}}
        value |= {"finetune": None, "engine": value["engine"] | {"num_processes": num_ranks}}
        tiny.do("score", tiny.write_config(tmp_path / f"{num_ranks}.yaml", value))
        scores = sorted((tmp_path / str(num_ranks) / "scores").glob("*/*.parquet"))
        found.append([(file.name, file.read_bytes()) for file in scores])
    assert found[0] == found[1] and len(found[0]) == 3 + 3


def test_who_stands_apart_has_no_part_in_votes_and_learns_nothing(world: Path, tmp_path: Path) -> None:
    config = load_config(own_config(world, tmp_path))
    found = prepare(config, tmp_path / "run/data")
    groups = [group for shard in found["unlabeled"].shards for group in read_shard(found["unlabeled"], shard)]
    assert {group.label for group in groups} == {None} and {None} == {
        label for group in groups for label in group.apart.values()
    }
    rows = rows_of(config.task, groups, tiny.LANGUAGES)
    results = [np.log(np.full(len(row.candidates), 1 / len(row.candidates), np.float32)) for row in rows]
    about = [row.is_apart for row in rows], [row.category for row in rows]
    keys, languages = [row.key for row in rows], [row.language for row in rows]
    scores = Scores(keys, languages, results, [row.label for row in rows], *about)
    write_scores(tmp_path / "000000.parquet", scores, {})
    read = read_score_file(tmp_path / "000000.parquet")
    assert (read.apart, read.categories) == about
    by_key = read.groups()
    for group in groups:
        assert set(by_key[group.key]) == set(tiny.LANGUAGES) - set(group.apart)
    model = open_model(world / "model", answers_of(config.task, tiny.LANGUAGES))
    encoded = model.encode(rows)
    write_tokens(tmp_path / "000000.arrow", encoded, False, {})
    stored = TokenRows(tmp_path / "000000.arrow", lambda language: Candidates(()))
    assert list(stored) == encoded and any(row.is_apart for row in encoded)
    check_scores(stored.places(), by_key, {}, tmp_path / "000000.parquet")
    assert [stored[group] for group in stored.groups()] == [
        [row for row in encoded if row.key == group.key] for group in groups
    ]
    examples = GroupExamples(
        tokens=Tokens(found["unlabeled"], config.task, tiny.LANGUAGES, model),
        counts=[],
        weights={"en": 0.5, "ru": 0.5},
        biases={},
        mode="ensemble",
        mean_pairs=1.0,
        divergence=Divergence("forward", False, 1.0),
        model=model,
        device=torch.device("cpu"),
    )
    of_group: dict[str, list[EncodedRow]] = {}
    for row in encoded:
        of_group.setdefault(row.key, []).append(row)
    pairs, start = examples._pairs(list(of_group.values())), 0
    for own in of_group.values():
        for offset, row in enumerate(own):
            is_there = start + offset in pairs.teachers.tolist() + pairs.learners.tolist()
            assert is_there != row.is_apart
        start += len(own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": {"en": ["a", "b"], "de": ["a"]}}, "no candidates: de has ['a'] where a list of two texts"),
        ({"candidates": {"en": ["a", "b"]}}, "no candidates: de has None where a list of two texts or more is needed"),
        ({"candidates": {"en": ["a", 1], "de": ["a", "b"]}}, "no candidates: en has ['a', 1] where a list of"),
        ({"candidates": {"en": ["a", " "], "de": ["a", "b"]}}, "empty text: a candidate in en"),
        ({"candidates": {"en": ["a", "a"], "de": ["a", "b"]}}, "equal candidates: en has 'a' and others, two alike"),
        ({"candidates": {"en": ["a", "b"], "de": ["a", "b", "c"]}}, "conflicting candidates: 3 here and 2 at"),
        ({"label": 2}, "unknown label: 2 is no number of one of 2 candidates, from 0, nor a list of several"),
        ({"label": [0, 0]}, "unknown label: [0, 0] is no number"),
        ({"label": []}, "unknown label: [] is no number"),
        ({"label": "x"}, "unknown label: 'x' is no number"),
        ({"texts": {"en": "none", "de": "a ___"}}, "no gap: en holds ___ 0 times where a prompt has it once"),
    ],
)
def test_own_candidates_that_are_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    record = {"id": 1, "label": 0, "texts": {"en": "a ___", "de": "b ___"}}
    record |= {"candidates": {"en": ["a", "b"], "de": ["x", "y"]}} | change
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    config = make_config([{"path": str(tmp_path / "d.jsonl"), "split": "test"}], OWN)
    with pytest.raises(UserError, match="bad records"):
        prepare(config, tmp_path / "run/data")
    assert said in (tmp_path / "run/bad-records.txt").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["a", "b"]}, "labels name what candidates stand for"),
        ({"verbalizers": ["a", "b"]}, "verbalizers are the same for every example"),
        ({"candidates": []}, "labels must hold two or more, not 0"),
        ({"template": "{text} {answer}"}, "template for default holds {answer}, and gap says that the texts do"),
    ],
)
def test_own_candidates_that_do_not_fit_the_task(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_config([{"path": "d.jsonl", "split": "test"}], OWN | change)


def test_what_a_shard_says_of_candidates_is_checked(tmp_path: Path) -> None:
    sound = ParallelGroup("g", (0, 2), {"en": {"text": "a ___"}, "de": {"text": "b ___"}})
    sound = replace(sound, candidates={"en": ("a", "b", "c"), "de": ("x", "y")}, apart={"de": 1}, category="here")
    dataset = write_dataset(tmp_path / "sound", [sound], (), 8, {})
    assert read_shard(dataset, dataset.shards[0]) == [sound]
    assert sound.label_of("de") == 1 and sound.without_labels().apart == {"de": None}
    assert sound.in_languages(["en"]).candidates == {"en": ("a", "b", "c")}
    for number, (change, said) in enumerate(
        [
            ({"apart": {}}, "candidates that correspond are not equally many"),
            ({"apart": {"de": 2}}, "the label of 'g' is not one of 2 labels"),
            ({"label": (0, 3)}, "the label of 'g' is not one of 3 labels"),
            ({"label": (0, 0)}, "nor a list of different numbers"),
            ({"candidates": {"en": ("a", "b", "c")}}, "its candidates and its texts are in different languages"),
            ({"candidates": {"en": ("a", "b", "c"), "de": ("x",)}}, "language 'de' lacks candidates of text"),
        ]
    ):
        broken = write_dataset(tmp_path / str(number), [replace(sound, **change)], (), 8, {})
        with pytest.raises(UserError, match=said):
            read_shard(broken, broken.shards[0])


def test_precision_counts_the_right_answers_among_as_many_best() -> None:
    """By hand: of two right answers the model before has one among its two best, the model after both."""

    def outcomes(hits: list[int]) -> Outcomes:
        labels, categories = [(0, 1), (2,), (1, 3)], ["x", "y", "x"]
        return {
            (f"g{number}", "en"): Outcome(4, label, True, num_hits, category)
            for number, (label, num_hits, category) in enumerate(zip(labels, hits, categories, strict=True))
        }

    found = precision(outcomes([1, 0, 2]), outcomes([2, 1, 1]))["en"]
    assert {name: (one.before, one.after, one.num_right) for name, one in found.items()} == {
        "all": (3 / 5, 4 / 5, 5),
        "x": (3 / 4, 3 / 4, 4),
        "y": (0.0, 1.0, 1),
    }
    single = {("g", "en"): Outcome(2, (0,), True, 1, "")}
    assert precision(single, single) == {}


def test_several_right_answers_share_a_target() -> None:
    row = EncodedRow("g", "en", (0, 2), [1], Candidates(((1,), (2,), (3,))), 0, False)
    example = one_hot_example(row, "url")
    assert example.target.tolist() == [0.5, 0.0, 0.5] and example.entropy == pytest.approx(np.log(2))
