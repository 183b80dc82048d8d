"""Inputs that would lose a language, or join wrong translations, in silence: refused, or left out whole."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data.preparing import by_key, make_config, problems
from tasks import publishing
from tasks.publishing import NLI, PARAPHRASES

from alsace_dist.config import InputConfig
from alsace_dist.data.inputs import kind_of
from alsace_dist.data.records import BadRecords, Place
from alsace_dist.errors import UserError
from alsace_dist.files.shards import open_dataset, read_shards
from alsace_dist.stages.prepare import prepare

RUN = Path("run/data")
POSITION = {"id": None, "label": None}
OWN = {"fields": ["text"], "template": "{text}", "labels": [], "candidates": "own"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text.encode())


def unlabeled(**one: Any) -> dict[str, Any]:
    return {"kind": "table", "split": "unlabeled"} | one


def read_split(path: str) -> list[Any]:
    return [group for shard in read_shards(open_dataset(path)) for group in shard]


def refused(*inputs: dict[str, Any], task: dict[str, Any] | None = None) -> str:
    """The error of stage prepare, which is to skip whatever may be skipped."""
    with pytest.raises(UserError) as caught:
        prepare(make_config(list(inputs), task, on_bad="skip", max_skipped=1.0), RUN)
    return str(caught.value)


def test_a_broken_row_of_nobody_knows_which_language_shifts_none() -> None:
    rows = [("en", "one"), ("en", "two"), ("en", "three"), ("de", "eins"), ("de", "zwei"), ("de", "drei")]
    lines = ["\t".join(row) for row in rows]
    lines[1] += "\tmore"
    lines[5] += "\tmehr"
    write("a.tsv", "\n".join(["language\ttext", *lines]))
    assert "a different row count cannot be skipped" in refused(unlabeled(path="a.tsv", columns=POSITION))
    objects = [json.dumps({"language": language, "text": text}) for language, text in rows]
    objects[1] = objects[1][:-1]
    objects[5] = objects[5][:-1]
    write("a.jsonl", "\n".join(objects))
    assert "row count cannot" in refused({"path": "a.jsonl", "split": "unlabeled", "columns": POSITION})
    write("b.tsv", "language\ttext\nen\tone\n\ttwo\nen\tthree\nde\teins\n\tzwei\nde\tdrei\n")
    assert "row count cannot" in refused(unlabeled(path="b.tsv", columns=POSITION))


def test_a_carriage_return_alone_is_no_row_end_beside_others() -> None:
    write("en.tsv", "text\nen1\ren1b\nen2\n")
    write("de.tsv", "text\nde1\nde2\rde2b\n")
    assert "row count" in refused(unlabeled(path="{language}.tsv", columns=POSITION, quoting="csv"))
    assert problems()[0].startswith("de.tsv:3: row count: ends with a lone carriage return")
    write("en.tsv", "text\ren1\ren2\r")
    write("de.tsv", "text\nde1\nde2\n")
    prepare(make_config([unlabeled(path="{language}.tsv", columns=POSITION, quoting="csv")]), RUN)
    assert {key: group.texts["en"]["text"] for key, group in by_key("unlabeled").items()} == {"1": "en1", "2": "en2"}
    said = refused(unlabeled(path="{language}.tsv", columns=POSITION, quoting="none"))
    assert said == "en.tsv: its lines end with carriage returns alone; save it with line feeds"


@pytest.mark.parametrize("columns", [POSITION, {"label": None}])
@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_a_language_whose_file_has_no_rows_is_named(columns: dict[str, Any], ending: str) -> None:
    if ending == "tsv":
        write("en.tsv", "id\ttext\n1\tone\n")
        write("de.tsv", "id\ttext\n")
    else:
        write("en.jsonl", '{"id": 1, "text": "one"}\n')
        write("de.jsonl", "")
    kind = {"tsv": "table", "jsonl": "jsonl"}[ending]
    said = refused(unlabeled(kind=kind, path=f"{{language}}.{ending}", columns=columns))
    assert said == f"de.{ending}: holds no rows; restore the file, or leave de out (languages)"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
        (lambda path: path.symlink_to(path.name), "a link to nothing"),
        (Path.mkdir, "a directory"),
        (os.mkfifo, "a pipe or a device"),
    ],
)
@pytest.mark.parametrize("kind", ["table", "pawsx", "xcopa", "geomlama"])
def test_a_language_that_is_no_file_is_named(make: Callable[[Path], None], what: str, kind: str) -> None:
    path = {
        "table": "data/{}.tsv",
        "pawsx": "data/{}/test_2k.tsv",
        "xcopa": "data/{0}/test.{0}.jsonl",
        "geomlama": "data/gd_prompt_{}.tsv",
    }[kind]
    good, bad = {"xcopa": ("it", "th"), "geomlama": ("en", "fa")}.get(kind, ("en", "de"))
    write(path.format(good), "id\tsentence1\tsentence2\tlabel\n1\tone\ttwo\t1\n")
    broken = Path(path.format(bad))
    broken.parent.mkdir(exist_ok=True, parents=True)
    make(broken)
    part = "prompts" if kind == "geomlama" else "test"
    one = {"kind": kind, "path": "data/{language}.tsv" if kind == "table" else "data", "hub_split": part}
    with pytest.raises(UserError) as caught:
        parsed = InputConfig.model_validate(one)
        kind_of(parsed).files(parsed)
    assert str(broken) in str(caught.value) and what in str(caught.value)
    parsed = InputConfig.model_validate(one | {"languages": [good]})
    if kind != "xcopa":  # whose good file is no XCOPA; the others are not looked into here
        assert len(kind_of(parsed).files(parsed)) == 1  # and of a language that nobody asks for it is passed over


def test_rows_are_counted_over_all_forms_of_a_sets_files() -> None:
    rows = ["premise\thypothesis\tlabel", *(f"p{number}\th{number}\tneutral" for number in range(4))]
    for language in ("en", "fr"):
        write(f"set/dev-{language}.tsv", "\n".join(rows))
    Path("set/dev-de.tsv.gz").write_bytes(gzip.compress("\n".join(rows[:3] + rows[4:]).encode()))
    said = refused({"kind": "xnli", "path": "set", "hub_split": "dev", "split": "unlabeled"}, task=NLI)
    assert "row count cannot be skipped" in said
    assert problems() == ["set/dev-de.tsv.gz:4: row count: de ends here after 3 rows, where most languages have 4"]


def test_rows_of_saved_datasets_are_counted() -> None:
    for language, number in (("en", 4), ("fr", 4), ("de", 3)):
        columns = {"id": list(range(1, number + 1)), "label": [0] * number}
        columns |= {name: [f"{language} {name} {at}" for at in range(number)] for name in PARAPHRASES["fields"]}
        one = datasets.Dataset.from_dict(columns)
        datasets.DatasetDict({"test": one}).save_to_disk(f"set/{language}")
    refused_or_listed = {"kind": "pawsx", "path": "set", "hub_split": "test", "split": "unlabeled"}
    with pytest.raises(UserError, match="1 missing rows"):
        prepare(make_config([refused_or_listed], PARAPHRASES), RUN)
    Path("set/fr/dataset_dict.json").unlink()
    with pytest.raises(UserError, match=r"^set/fr: holds no dataset_dict.json, as de does"):
        prepare(make_config([refused_or_listed], PARAPHRASES), RUN)


def test_geomlama_lacks_no_row_in_every_language() -> None:
    publishing.geomlama("set")
    for path in Path("set").rglob("gd_prompt_??.tsv"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:8] + lines[9:]))
    task = {"template": "english", "fields": ["prompt"], "labels": [], "candidates": "own"}
    said = refused({"kind": "geomlama", "path": "set", "hub_split": "prompts", "split": "test"}, task=task)
    assert "row count cannot be skipped" in said
    assert all("one is missing" in line for line in problems() if "row count" in line) and problems()


def test_a_group_that_has_lost_a_language_to_a_broken_row_is_left_out_whole() -> None:
    rows = ['1,en,good,"foo', '2,en,good,"bar"', "1,de,good,eins", "2,de,good,zwei", "3,en,good,x", "3,de,good,y"]
    write("a.csv", "\n".join(["id,language,label,text", *rows]))
    prepare(make_config([unlabeled(path="a.csv")], on_bad="skip", max_skipped=1.0), RUN)
    assert set(by_key("unlabeled")) == {"3"}
    rows = [{"id": number, "language": "en", "text": f"en {number}"} for number in (1, 2, 3)]
    rows += [row | {"language": "de", "text": "de"} for row in rows]
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:-1]
    write("a.jsonl", "\n".join(lines))
    one = {"path": "a.jsonl", "split": "unlabeled", "columns": {"label": None}}
    prepare(make_config([one], on_bad="skip", max_skipped=1.0), Path("run2/data"))
    assert {group.key for group in read_split("run2/data/unlabeled")} == {"1", "2"}


def test_a_quoted_text_with_a_comma_is_no_row() -> None:
    write("a.csv", 'id,language,text\n1,en,"Dear all,\nyes, no,\nbye"\n')
    one = unlabeled(path="a.csv", columns={"label": None})
    prepare(make_config([one]), RUN)
    assert by_key("unlabeled")["1"].texts["en"]["text"] == "Dear all,\nyes, no,\nbye"


def test_a_map_of_parquet_holds_all_languages() -> None:
    maps = pyarrow.array([[("en", "dog"), ("de", "Hund")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": maps}), "a.parquet")
    one = unlabeled(path="a.parquet", columns={"language": None, "label": None})
    prepare(make_config([one]), RUN)
    assert by_key("unlabeled")["1"].texts == {"en": {"text": "dog"}, "de": {"text": "Hund"}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"apart": ["sw"]}, "`apart` must map languages of the group (en, sw) to their labels"),
        ({"apart": {"SW": 1}}, "`apart` must map languages of the group (en, sw) to their labels"),
        ({"unit": ["x"]}, "`unit` must be a text or a whole number"),
        ({"category": {}}, "`category` must be a text or a whole number"),
        ({"label": "1" * 5000}, "is no number of one of 2 candidates"),
    ],
)
def test_what_a_group_says_of_itself_is_not_passed_over(more: dict[str, Any], said: str) -> None:
    group = {"id": 1, "label": 0, "texts": {"en": {"text": "a"}, "sw": {"text": "b"}}}
    group |= {"candidates": {"en": ["x", "y"], "sw": ["z", "w"]}} | more
    write("a.jsonl", json.dumps(group))
    refused({"path": "a.jsonl", "split": "unlabeled"}, task=OWN)
    assert problems() and all(said in line for line in problems())


def test_a_terminal_is_told_no_control_characters() -> None:
    bad = BadRecords()
    bad.add(Place("a", 1), "unknown label", "\x1b[31m red \u202e")
    assert bad.problems[0][2] == "\\x1b[31m red \\u202e"
