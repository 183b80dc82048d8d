"""XCOPA with COPA as its English: languages from two places, a question that the files have wrong, and its words."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from data.preparing import by_key, problems
from tasks import publishing
from tasks.publishing import CAUSES, CHOICES, PLOTS

from alsace_dist.config import Config, InputConfig
from alsace_dist.data.show import prompts
from alsace_dist.errors import UserError
from alsace_dist.files.scores import read_scores
from alsace_dist.stages.prepare import fingerprint_of, prepare

RUN = Path("run/data")
PLACES = {"kind": "xcopa", "path": "sets/xcopa", "also": ["sets/xcopa-en"]}
TEST = PLACES | {"split": "test"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(inputs: list[dict[str, Any]], task: dict[str, Any] | None = None, **data: Any) -> Config:
    value = {"run_dir": "run", "model": {"path": "some/mt5"}, "data": {"inputs": inputs, **data}}
    return Config.model_validate(value | {"task": task or {"template": "english"}})


def changed() -> dict[str, int]:
    found: dict[str, int] = json.loads((RUN / "manifest.json").read_text())["details"]["num_changed"]
    return found


@pytest.mark.parametrize("layout", publishing.XCOPA)
def test_english_comes_from_another_place_and_the_question_from_most_languages(layout: str) -> None:
    publishing.XCOPA[layout]("sets/xcopa")
    dev = PLACES | {"hub_split": "dev", "split": "unlabeled"}
    train = {"kind": "xcopa", "path": "sets/xcopa-en", "hub_split": "train", "split": "labeled"}
    config = config_of([TEST, dev, train])
    found = prepare(config, RUN)
    assert {name: dataset.num_groups for name, dataset in found.items()} == {"test": 4, "unlabeled": 4, "labeled": 4}
    assert sorted(by_key("test")) == ["test/0", "test/1", "test/2", "test/3"]
    for number, (_, group) in enumerate(sorted(by_key("test").items())):
        assert group.label == number % 2
        assert group.texts == {
            language: {
                **{name: publishing.copa_rows(language)[number][name] for name in ("premise", "choice1", "choice2")},
                "question": CAUSES[number],
            }
            for language in PLOTS
        }
    assert all(group.label is None for group in by_key("unlabeled").values())
    assert {tuple(group.texts) for group in by_key("labeled").values()} == {("en",)}
    assert changed() == {"th": 6, "zh": 2}  # three of four in two parts, and one
    names = fingerprint_of(config)["sources"]
    assert any(name.startswith("sets/xcopa-en/") for name in names) and len(names) == 2 * len(PLOTS) + 1


def test_the_audit_says_per_language_how_many_rows_were_changed(capsys: pytest.CaptureFixture[str]) -> None:
    publishing.xcopa_original("sets/xcopa")
    prepare(config_of([TEST]), RUN)
    assert "rows changed to what most languages say: th 3, zh 1" in capsys.readouterr().err


def test_of_equally_many_english_is_right_and_without_it_nobody_knows() -> None:
    publishing.xcopa_original("sets/xcopa")
    prepare(config_of([TEST], languages=["en", "th"]), RUN)
    assert [group.texts["th"]["question"] for _, group in sorted(by_key("test").items())] == list(CAUSES)
    assert changed() == {"th": 3}
    alone = {"kind": "xcopa", "path": "sets/xcopa", "split": "test"}
    with pytest.raises(UserError, match="3 conflicting fields"):
        prepare(config_of([alone], languages=["et", "th"], source_language="et"), RUN)
    said = "conflicting fields: question is 'effect' here and 'cause' at sets/xcopa/data/et/test.et.jsonl"
    assert problems() == [f"sets/xcopa/data/th/test.th.jsonl:{line}: {said}:{line}" for line in (1, 3, 4)]


def test_a_place_that_has_none_of_the_languages_is_no_mistake_and_no_place_that_has_one_is() -> None:
    publishing.xcopa_original("sets/xcopa")
    prepare(config_of([TEST], languages=["en", "et"]), RUN)
    assert {tuple(sorted(group.texts)) for group in by_key("test").values()} == {("en", "et")}
    prepare(config_of([PLACES | {"split": "labeled", "hub_split": "dev"}]), Path("other/data"))
    with pytest.raises(UserError, match=r"sets/xcopa and sets/xcopa-en: XCOPA is here in en, et, qu, th, zh, and not"):
        prepare(config_of([TEST], languages=["vi"], source_language="vi"), RUN)


def test_also_is_for_published_sets() -> None:
    with pytest.raises(UserError, match=r"also is only used with kind pawsx or sib200 or xcopa or xnli; remove it"):
        prepare(config_of([{"path": "a.jsonl", "also": ["b.jsonl"], "split": "test"}], CHOICES), RUN)


def spoil(path: str, number: int, old: str, new: str) -> None:
    lines = Path(path).read_bytes().splitlines(keepends=True)
    assert old.encode() in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old.encode(), new.encode())
    Path(path).write_bytes(b"".join(lines))


def test_rows_that_are_wrong() -> None:
    publishing.xcopa_original("sets/xcopa")
    folder = "sets/xcopa/data"
    first = f"{folder}/th/test.th.jsonl:1"
    spoil(f"{folder}/et/test.et.jsonl", 1, '"label": 0', '"label": 2')
    spoil(f"{folder}/th/test.th.jsonl", 3, '"idx": 2', '"idx": 0')
    spoil(f"{folder}/zh/test.zh.jsonl", 2, '"choice2": "', '"choice3": "')
    spoil(f"{folder}/qu/test.qu.jsonl", 3, "}", "")
    for language in PLOTS:
        path = "sets/xcopa-en/test.en.jsonl" if language == "en" else f"{folder}/{language}/test.{language}.jsonl"
        spoil(path, 4, f'"question": "{publishing.copa_rows(language)[3]["question"]}"', '"question": "why"')
    with pytest.raises(UserError):
        prepare(config_of([TEST]), RUN)
    said = "question is 'why', and task.words has cause, effect"
    assert problems() == [
        "sets/xcopa-en/test.en.jsonl:4: unknown value: en." + said,
        f"{folder}/et/test.et.jsonl:1: unknown label: '2' is not one of task.labels",
        f"{folder}/et/test.et.jsonl:4: unknown value: et." + said,
        f"{folder}/qu/test.qu.jsonl:3: broken JSON: Expecting ',' delimiter at column 178",
        f"{folder}/qu/test.qu.jsonl:4: unknown value: qu." + said,
        f"{folder}/th/test.th.jsonl:3: duplicate id: id 'test/0' has language th at {first} already",
        f"{folder}/th/test.th.jsonl:4: unknown value: th." + said,
        f"{folder}/zh/test.zh.jsonl:2: missing field: zh.choice2",
        f"{folder}/zh/test.zh.jsonl:4: unknown value: zh." + said,
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bom_and_blank_lines_are_no_rows(end: bytes) -> None:
    publishing.xcopa_original("sets/xcopa")
    for path in Path("sets").rglob("*.jsonl"):
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\xef\xbb\xbf" + (end + end).join(lines) + end)
    prepare(config_of([TEST]), RUN)
    assert {tuple(sorted(group.texts)) for group in by_key("test").values()} == {tuple(sorted(PLOTS))}


def test_another_number_of_rows() -> None:
    publishing.xcopa_original("sets/xcopa")
    path = Path("sets/xcopa/data/th/test.th.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="1 missing rows"):
        prepare(config_of([TEST]), RUN)
    assert problems() == [f"{path}:3: missing rows: th ends here after 3 rows, where most languages have 4"]


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["english", "native"])
def test_the_question_is_asked_in_words(template: str) -> None:
    publishing.xcopa_original("sets/xcopa")
    config = config_of([TEST], {"template": template})
    prepare(config, RUN)
    shown = "\n".join(prompts(config))
    asked = {"english": "What was the cause? {answer}", "native": "原因是什么？ {answer}"}[template]
    assert f"zh: test, test/0\n  下雨了。 {asked}\n    下雨了。 zh a  (right)\n    zh b é 下雨了。" in shown
    assert "What was the cause? {answer}" in shown  # of English in either


def test_prompts_of_the_set_are_in_the_resolved_config_and_may_be_replaced_in_part() -> None:
    task = config_of([TEST], {"template": "native", "labels": [1, 0], "candidates": ["choice2", "choice1"]}).task
    assert task.prompts == "xcopa/native" and task.fields == ["premise", "question", "choice1", "choice2"]
    assert (task.labels, task.candidates) == (["1", "0"], ["choice2", "choice1"])
    assert set(task.templates()) == set(task.words_of()) >= set(PLOTS)
    assert Config.model_validate(config_of([TEST]).model_dump(mode="json")) == config_of([TEST])
    words = {"question": {"cause": "because", "effect": "so"}}
    assert config_of([TEST], {"template": "english", "words": words}).task.words == words
    for inputs, said in (([{"path": "a.jsonl"}], "none"), ([{"kind": "demo"}], "none")):
        with pytest.raises(ValueError, match=rf"task\.template: native stands for .* data\.inputs names {said}"):
            config_of(inputs, {"template": "native"}, splits={"test": 1})
    assert (
        config_of([{"path": "a.jsonl"}], {"template": "xcopa/native"}, splits={"test": 1}).task
        == config_of([TEST], {"template": "native"}).task
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"other": {"a": "b"}}, "'other' is no field that a prompt shows"),
        ({"choice1": {"a": "b"}}, "'choice1' is no field that a prompt shows"),
        ({"question": {}}, "must map its values to words"),
        ({"question": {"cause": "{answer}"}}, "must map its values to words without braces"),
    ],
)
def test_words_that_say_nothing_are_refused(words: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of([TEST], {"template": "english", "words": words})


def test_a_name_on_the_hub_has_languages_of_its_own() -> None:
    from alsace_dist import tasks
    from alsace_dist.data import published

    dataset = tasks.dataset("xcopa")
    assert isinstance(dataset, tasks.Published)
    one = InputConfig(kind="xcopa", path="cambridgeltl/xcopa", also=["aps/super_glue"], hub_split="dev")
    first, second = published.locate(dataset, one)
    assert set(first.input.subsets) == set(dataset.languages) - {"en"} and second.input.subsets == {"en": "copa"}
    assert [found.input.hub_split for found in (first, second)] == ["validation", "validation"]
    (english,) = published.locate(dataset, one.model_copy(update={"languages": ["en"]}))
    assert english.input.path == "aps/super_glue"


# --- to the report -------------------------------------------------------------------------------------------------

NAMES = {"en": "en", "et": "de", "it": "fr", "tr": "ru"}  # language here -> language of the small models' words


def write_set(folder: Path, part: str, languages: Iterable[str], size: int) -> None:
    """Of two choices the right one begins with the premise's first word."""
    for language in languages:
        rng, words, lines = random.Random(3), tiny.WORDS[NAMES[language]], []
        for number in range(size):
            first, other, *rest = rng.sample(range(8), 5)
            label, question = rng.randrange(2), rng.choice(["cause", "effect"])
            choices = [f"{words[first]} {words[rest[0]]}", f"{words[other]} {words[rest[1]]} {words[rest[2]]}"]
            row = {"premise": words[first], "choice1": choices[label], "choice2": choices[1 - label]}
            lines.append(json.dumps(row | {"question": question, "label": label, "idx": number}))
        path = folder / language / f"{part}.{language}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\r\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("scorer", ["mt5", "cloze", "new head"])
def test_from_the_files_to_the_report_on_two_sharded_ranks(world: Path, tmp_path: Path, scorer: str) -> None:
    """One template for both families: each writes the place of the answer as it has learnt it."""
    write_set(tmp_path / "xcopa", "val", NAMES, 24)
    write_set(tmp_path / "xcopa", "test", NAMES, 20)
    write_set(tmp_path / "xcopa", "train", ["en"], 20)
    place = {"kind": "xcopa", "path": str(tmp_path / "xcopa")}
    inputs = [place | {"split": "test"}, place | {"hub_split": "val", "split": "unlabeled"}]
    inputs.append(place | {"hub_split": "train", "split": "labeled"})
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), engine={"zero_stage": 3})
    value["data"] = {"inputs": inputs, "groups_per_shard": 8}
    value["model"] = tiny.of_scorer(world, scorer)["model"]
    if scorer == "new head":  # over choices; the template has a place for an answer, which auto takes for a cloze
        value["model"]["mode"] = "head"
    words = {"question": {"cause": "red", "effect": "new"}}
    value["task"] = {"template": "xcopa/english", "words": words, "max_tokens": 48}
    tiny.run_all(tiny.write_config(tmp_path / "c.yaml", value))
    scores = read_scores(tmp_path / "run/scores/test")
    assert len(scores.keys) == 20 * 4 and len({float(row[0]) for row in scores.log_probs}) > 60
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert set(metrics["languages"]) == set(NAMES)
