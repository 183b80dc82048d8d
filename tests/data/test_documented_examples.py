"""The examples of docs/data.md, each with files as the page describes them, go through prepare."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.preparing import by_key
from tasks import publishing

from alsace_dist.config import Config
from alsace_dist.stages.prepare import prepare

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
RUN = Path("run/data")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def blocks(kind: str, word: str) -> list[str]:
    """The code blocks of the page that hold a word."""
    return [text for text in re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if word in text]


def prepare_example(word: str) -> dict[str, Any]:
    """Prepare the one example with this word in it; the details of its manifest."""
    (text,) = blocks("yaml", word)
    prepare(Config.model_validate(yaml.safe_load(text) | {"run_dir": "run", "model": {"path": "some/mt5"}}), RUN)
    details: dict[str, Any] = json.loads((RUN / "manifest.json").read_text())["details"]
    return details


def write_table(path: str, rows: list[list[str]], **dialect: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n", **dialect).writerows(rows)


def test_a_file_per_language_as_tables() -> None:
    for language in ("en", "de"):
        rows = [[str(number), f"{language} {number}", 'says "x"', str(number % 2)] for number in range(4)]
        rows[1][1] = "n/a" if language == "de" else rows[1][1]
        rows[2][3] = "-"
        for name in ("dev", "test"):
            header = ["key", "a", "b", "gold"]
            write_table(f"pairs/{name}.{language}.tsv", [header, *(rows if language == "en" else rows[::-1])])
    lines = ['"He said\tyes', "it is\tno"]
    Path("pairs/train").mkdir()
    Path("pairs/train/en.tsv").write_text("".join(f"{line}\t{number}\n" for number, line in enumerate(lines)))
    details = prepare_example("pairs/train")
    assert sorted(by_key("labeled")) == ["train/1", "train/2"]
    assert by_key("labeled")["train/1"].texts["en"] == {"sentence1": '"He said', "sentence2": "yes"}
    assert sorted(by_key("test")) == ["test/0", "test/1", "test/3"]
    assert by_key("test")["test/1"].texts == {"en": {"sentence1": "en 1", "sentence2": 'says "x"'}}
    assert len(by_key("unlabeled")) == 4
    assert details["num_missing"] == {"de": 2}
    assert details["num_no_label"] == {"input pairs/{split}.{language}.tsv": 1}


def test_a_file_per_language_as_jsonl() -> None:
    (line,) = blocks("json", "idx")
    record = json.loads(line)
    for language in ("en", "de", "sw"):
        Path(f"hotels/{language}").mkdir(parents=True)
        for name, numbers in (("test", range(3)), ("more", range(3, 9))):
            rows = [record | {"idx": number, "s1": f"{language} {number}"} for number in numbers]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(f"hotels/{language}/{name}.jsonl").write_text(text, encoding="utf-8")
    prepare_example("hotels/{language}")
    assert sorted(by_key("test")) == ["0", "1", "2"]
    assert by_key("test")["2"].texts["sw"] == {"first": "sw 2", "second": record["s2"]}
    assert [len(by_key(split)) for split in ("labeled", "unlabeled")] == [2, 2]
    assert all(key.startswith("more/") for key in by_key("unlabeled"))


def test_all_languages_in_a_row() -> None:
    (lines,) = blocks("json", "translation")
    Path("all.jsonl").write_text(lines, encoding="utf-8")
    prepare_example("all.jsonl")
    assert {key: sorted(group.texts) for key, group in by_key("test").items()} == {"1": ["de", "en"], "2": ["en", "fr"]}


def test_published_datasets() -> None:
    publishing.xnli_original("sets")
    path = Path("sets/XNLI-1.0/xnli.dev.tsv")
    path.with_name("xnli.test.tsv").write_bytes(path.read_bytes().replace(b"cafe", b"Cafe").replace(b"home", b"Home"))
    Path("sets/multinli_1.0").mkdir()
    records = [
        {"gold_label": label, "sentence1": f"p{number}", "sentence2": "h", "pairID": f"{number}e"}
        for number, label in enumerate(["neutral", "-", "entailment"])
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path("sets/multinli_1.0/multinli_1.0_train.jsonl").write_text(text, encoding="utf-8")
    details = prepare_example("sets/multinli_1.0")
    assert [len(by_key(split)) for split in ("labeled", "unlabeled", "test")] == [2, 2, 6]
    assert details["num_no_label"] == {"input sets/multinli_1.0": 1}
    assert len({group.texts["en"]["premise"] for group in by_key("unlabeled").values()}) == 1


def test_prompts_that_come_with_a_set() -> None:
    publishing.xcopa_original("sets/xcopa")
    Path("sets/xcopa-en").rename("sets/copa")
    prepare_example("template: native")
    assert {split: len(by_key(split)) for split in ("labeled", "unlabeled", "test")} == dict.fromkeys(
        ("labeled", "unlabeled", "test"), 4
    )
    assert {tuple(sorted(group.texts)) for group in by_key("test").values()} == {tuple(sorted(publishing.PLOTS))}


def test_words_for_the_values_of_a_field() -> None:
    for language in ("en", "th"):
        publishing._write_choices(f"sets/test.{language}.jsonl", language)
    details = prepare_example("effect: so")
    assert details["num_changed"] == {"th": 3} and len(by_key("test")) == 4


def test_candidates_in_any_number() -> None:
    (lines,) = blocks("json", "chopsticks")
    Path("habits.jsonl").write_text(lines, encoding="utf-8")
    prepare_example("habits.jsonl")
    groups = by_key("test")
    assert (groups["1"].label, groups["2"].label, groups["2"].apart) == (0, (0, 1), {"sw": (0, 1)})
