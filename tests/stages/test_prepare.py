"""Prepare: every kind of input, every kind of bad record, splits, and what is written."""

import csv
import gzip
import json
import os
import resource
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported: it reads this once

from alsace_dist.config import Config
from alsace_dist.data.config_check import check_prepared
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import begin, is_complete, load_manifest, verify_files
from alsace_dist.files.shards import Group, open_dataset, read_shard
from alsace_dist.stages.prepare import fingerprint, prepare

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_config(inputs: list[Record], task: Record | None = None, seed: int = 0, **data: Any) -> Config:
    task = {"fields": ["text"], "template": "{text}", "labels": ["good", "bad"], **(task or {})}
    return Config.model_validate(
        {
            "run_dir": "run",
            "seed": seed,
            "task": task,
            "data": {"inputs": inputs, **data},
            "model": {"path": "some-model"},
        }
    )


def record(number: int, label: Any = "good", languages: tuple[str, ...] = ("en", "de")) -> Record:
    texts = {language: {"text": f"{language} text {number}"} for language in languages}
    return {"id": f"g{number}", "texts": texts, **({} if label is None else {"label": label})}


def write_jsonl(path: str, rows: list[Any]) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    Path(path).write_bytes(b"\n".join(lines) + b"\n")


def read_back(split: str) -> list[Group]:
    dataset = open_dataset(Path("run/data") / split)
    return [group for shard in dataset.shards for group in read_shard(dataset, shard)]


def by_key(split: str) -> dict[str, Group]:
    return {group.key: group for group in read_back(split)}


def problems() -> list[str]:
    return Path("run/bad-records.txt").read_text(encoding="utf-8").splitlines()


EXPECTED = {
    "1": Group("1", 0, {"en": {"text": "dog"}, "de": {"text": "Hund"}}),
    "2": Group("2", 1, {"en": {"text": "cat"}, "de": {"text": "Katze"}}),
}
LONG_FORM = {
    "id": ["1", "1", "2", "2"],
    "language": ["en", "de", "en", "de"],
    "text": ["dog", "Hund", "cat", "Katze"],
    "label": ["good", None, "bad", "bad"],
}


# --- kinds of input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl(suffix: str) -> None:
    rows = [
        {"id": "1", "label": "good", "extra": 1, "texts": {"en": {"text": "dog", "source": "x"}, "de": "Hund"}},
        {"id": 2, "label": "bad", "texts": {"en": "cat", "de": {"text": "Katze"}}},
    ]
    data = b"\xef\xbb\xbf" + "\n\n".join(json.dumps(row) for row in rows).encode()  # a BOM and a blank line
    path = Path(f"a.jsonl{suffix}")
    path.write_bytes(gzip.compress(data) if suffix else data)
    datasets = prepare(make_config([{"path": str(path), "split": "test"}]), Path("run/data"))
    assert by_key("test") == EXPECTED
    assert datasets == {"test": open_dataset("run/data/test")}
    assert datasets["test"].labels == ("good", "bad")


def test_relative_and_absolute_glob(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(f"part-{number}.jsonl", [record(number)])
    for pattern in ("part-[12].jsonl", str(tmp_path / "part-*.jsonl")):
        prepare(make_config([{"path": pattern, "split": "test"}]), Path("run/data"))
        assert len(read_back("test")) == (2 if "[12]" in pattern else 3)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(name: str) -> None:
    with Path("plain").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["unused", "key", "lang", "sentence", "answer"])
        for row in zip(*LONG_FORM.values(), strict=True):
            writer.writerow(["NA", *row])
    data = Path("plain").read_bytes()
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    columns = {"id": "key", "language": "lang", "label": "answer", "fields": {"text": "sentence"}}
    prepare(make_config([{"kind": "table", "path": name, "columns": columns, "split": "test"}]), Path("run/data"))
    assert by_key("test") == EXPECTED


def test_rows_of_a_group_may_stand_in_several_files() -> None:
    Path("en.csv").write_text("id,language,text,label\n007,en,NA,good\n", encoding="utf-8")
    Path("de.csv").write_text('id,language,text,label\n007,de,"null\nund ""nichtig""",\n', encoding="utf-8")
    prepare(make_config([{"kind": "table", "path": "*.csv", "split": "test"}]), Path("run/data"))
    texts = {"en": {"text": "NA"}, "de": {"text": 'null\nund "nichtig"'}}
    assert read_back("test") == [Group("007", 0, texts)]  # ids and texts are never taken for numbers or gaps


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet(dictionary: bool) -> None:
    table = pyarrow.table(LONG_FORM | {"id": [1, 1, 2, 2]})
    if dictionary:
        table = table.set_column(1, "language", table["language"].dictionary_encode())
    pyarrow.parquet.write_table(table, "a.parquet")
    prepare(make_config([{"kind": "table", "path": "a.parquet", "split": "test"}]), Path("run/data"))
    assert by_key("test") == EXPECTED


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        ([0, 1], [1.0, float("nan")], [1, None]),  # pandas writes integers with gaps as floats
        ([True, False], [True, False], [0, 1]),
        (["true", "false"], [False, None], [1, None]),
        ([0, 1], [0, 1], [0, 1]),
    ],
)
def test_labels_are_matched_by_their_spelling(labels: list[Any], values: list[Any], expected: list[Any]) -> None:
    columns = {"id": ["a", "b"], "language": ["en", "en"], "text": ["x", "y"], "label": values}
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    source = {"kind": "table", "path": "a.parquet", "split": "pretrain"}
    prepare(make_config([source], {"labels": labels}, withhold_labels=[]), Path("run/data"))
    assert {key: group.label for key, group in by_key("pretrain").items()} == dict(
        zip(["a", "b"], expected, strict=True)
    )


def test_table_without_labels() -> None:
    pyarrow.parquet.write_table(pyarrow.table(LONG_FORM).drop_columns("label"), "a.parquet")
    source = {"kind": "table", "path": "a.parquet", "split": "unlabeled"}
    with pytest.raises(UserError, match=r"a\.parquet: no column 'label' among .*; set data\.inputs\.columns\.label"):
        prepare(make_config([source]), Path("run/data"))
    prepare(make_config([source | {"columns": {"label": None}}]), Path("run/data"))
    assert len(read_back("unlabeled")) == 2


def test_demo() -> None:
    task = {"fields": ["premise", "hypothesis"], "template": "{premise} {hypothesis}"}
    task |= {"labels": ["entailment", "neutral", "contradiction"]}
    config = make_config([{"kind": "demo", "num_groups": 30}], task, splits={"labeled": 12, "test": 6})
    prepare(config, Path("run/data"))
    groups = read_back("labeled")
    assert len(groups) == 12
    assert {"en", "de", "zh"} <= set(groups[0].texts)
    assert fingerprint(config)["sources"] != fingerprint(config.model_copy(update={"seed": 1}))["sources"]


# --- Hugging Face datasets, from local paths -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # if another test imported it before the line above
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def save_dataset(path: str, columns: Record, names: list[str] | None = None) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict(columns)
    if names:
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict({"validation": dataset}).save_to_disk(path)


@pytest.mark.parametrize(
    ("names", "labels"), [(["bad", "good"], ["good", "bad"]), (["negative", "positive"], ["1", "0"])]
)
def test_saved_dataset_in_long_form_with_class_labels(cache: None, names: list[str], labels: list[str]) -> None:
    save_dataset("saved", LONG_FORM | {"label": [1, -1, 0, 0]}, names)  # -1: no label, as the hub's test splits have
    source = {"kind": "huggingface", "path": "saved", "hub_split": "validation", "split": "test"}
    config = make_config([source], {"labels": labels})
    prepare(config, Path("run/data"))
    assert by_key("test") == EXPECTED
    files = [path for path in fingerprint(config)["sources"] if path.endswith(".arrow")]
    assert files == ["saved/validation/data-00000-of-00001.arrow"]


def test_a_single_saved_split_has_none_to_choose_from(cache: None) -> None:
    import datasets

    columns = {name: LONG_FORM[name] for name in LONG_FORM} | {"label": ["bad", None, "bad", "bad"]}
    datasets.Dataset.from_dict(columns).save_to_disk("single")
    source = {"kind": "huggingface", "path": "single", "split": "unlabeled"}
    prepare(make_config([source]), Path("run/data"))
    assert set(by_key("unlabeled")) == set(EXPECTED)
    with pytest.raises(UserError, match=r"^single: is a single split, there is no 'test' to choose; remove hub_split$"):
        prepare(make_config([source | {"hub_split": "test"}]), Path("run/other"))


@pytest.mark.parametrize("with_id", [True, False])
def test_subsets_of_a_local_folder(cache: None, with_id: bool) -> None:
    """Configurations as on the hub: joined by id (rows in different order), or by row number without one."""
    Path("folder").mkdir()
    order = [1, 0] if with_id else [0, 1]
    for language, texts in (("en", ["dog", "cat"]), ("de", ["Hund", "Katze"])):
        rows = [{"id": n, "sentence": texts[n], "label": ["good", "bad"][n]} for n in (0, 1)]
        rows = rows if language == "en" else [rows[n] for n in order]
        rows = rows if with_id else [{key: row[key] for key in ("sentence", "label")} for row in rows]
        write_jsonl(f"folder/{language}.jsonl", rows)
    configs = "".join(f"- config_name: all_{x}\n  data_files: {x}.jsonl\n" for x in ("en", "de"))
    Path("folder/README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    source = {"kind": "huggingface", "path": "folder", "subsets": {"en": "all_en", "de": "all_de"}, "split": "test"}
    prepare(make_config([source | {"columns": {"fields": {"text": "sentence"}}}]), Path("run/data"))
    keys = ("0", "1") if with_id else ("folder/train/1", "folder/train/2")
    expected = {key: Group(key, group.label, group.texts) for key, group in zip(keys, EXPECTED.values(), strict=True)}
    assert by_key("test") == expected


def test_rows_without_ids_are_named_alike_wherever_the_dataset_lies(cache: None, tmp_path: Path) -> None:
    save_dataset("deep/saved", {"text": ["a", "b"], "language": ["en", "en"], "label": ["good", "bad"]})
    source = {"kind": "huggingface", "hub_split": "validation", "split": "test"}
    for number, path in enumerate(("deep/saved", "./deep/../deep/saved/", str(tmp_path / "deep/saved"))):
        prepare(make_config([source | {"path": path}]), Path(f"run{number}/data"))
        dataset = open_dataset(Path(f"run{number}/data/test"))
        keys = [group.key for shard in dataset.shards for group in read_shard(dataset, shard)]
        assert sorted(keys) == ["saved/validation/1", "saved/validation/2"]


def test_subsets_without_id_must_have_equally_many_rows(cache: None) -> None:
    save_dataset("saved/en", {"text": ["a", "b"], "label": ["good", "bad"]})
    save_dataset("saved/de", {"text": ["a"], "label": ["good"]})
    subsets = {"kind": "huggingface", "path": "saved", "hub_split": "validation", "subsets": {"en": "en", "de": "de"}}
    with pytest.raises(UserError, match=r"saved: subsets of \[1, 2\] rows need an id column"):
        prepare(make_config([subsets | {"split": "test"}]), Path("run/data"))


def test_subsets_with_conflicting_labels(cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    save_dataset("saved/en", {"text": ["a", "b"], "label": ["good", "bad"]})
    save_dataset("saved/de", {"text": ["x", "y"], "label": ["good", "good"]})
    subsets = {"kind": "huggingface", "path": "saved", "hub_split": "validation", "subsets": {"en": "en", "de": "de"}}
    with pytest.raises(UserError, match="1 conflicting labels"):
        prepare(make_config([subsets | {"split": "test"}]), Path("run/data"))
    detail = "id 'saved/validation/2' has 'good' here and 'bad' at saved[en]:row 2"
    assert problems() == [f"saved[de]:row 2: conflicting labels: {detail}"]


def test_hub_name_without_network_is_one_line(cache: None) -> None:
    config = make_config([{"kind": "huggingface", "path": "nobody/nothing", "revision": "v1", "split": "test"}])
    with pytest.raises(UserError, match=r"nobody/nothing: cannot be loaded .*; check path.*local path$") as caught:
        prepare(config, Path("run/data"))
    assert "\n" not in str(caught.value)
    assert fingerprint(config)["sources"]["hub nobody/nothing v1"] == {"name": "nobody/nothing", "revision": "v1"}


def test_code_in_a_dataset_folder_is_not_run(cache: None) -> None:
    Path("folder").mkdir()
    Path("folder/folder.py").write_text("import pathlib\npathlib.Path('executed').touch()\n", encoding="utf-8")
    with pytest.raises(UserError, match="folder: cannot be loaded"):
        prepare(make_config([{"kind": "huggingface", "path": "folder", "split": "test"}]), Path("run/data"))
    assert not Path("executed").exists()


# --- bad records ---------------------------------------------------------------------------------------------------

BAD_LINES: list[Any] = [
    record(1),
    b'{"id": "g2", "texts": {"en": {"text": "caf\xe9"}}}',
    b'{"id": "g3", "texts": ',
    b'["g4"]',
    b'{"id": "g5", "texts": {"en": "one", "en": "two"}}',
    record(6) | {"id": ""},
    record(7) | {"label": "meh"},
    record(8) | {"texts": {}},
    record(9) | {"texts": {"en": {"text": " \t"}, "de": {"other": "x"}}},
    record(10) | {"texts": {"en": {"text": 5}, "de": {"text": None}}},
    record(11) | {"texts": {"en": ["x"], "": "x"}},
    b'{"id": "g12", "texts": {"en": "half a pair: \\ud800"}}',
    record(1),
    record(14, label=None),
    b"",
    record(16),
]
BAD_PLACES = {
    2: ["invalid UTF-8: byte 43 of the line: invalid continuation byte"],
    3: ["broken JSON: Expecting value at column 22"],
    4: ["broken JSON: the line is not an object"],
    5: ["broken JSON: a key is given twice among ['en', 'en']"],
    6: ["missing id: the id must be a non-empty text or a number"],
    7: ["unknown label: 'meh' is not one of task.labels"],
    8: ["no texts: `texts` must map at least one language to its fields"],
    9: ["empty text: en.text", "missing field: de.text"],
    10: ["non-string text: en.text is 5", "missing field: de.text"],
    11: ["missing field: en must map text to texts, not ['x']", "missing language: '' does not name a language"],
    12: ["invalid UTF-8: in en.text: 'half a pair: \\ud800'"],
    13: ["duplicate id: id 'g1' is at a.jsonl:1 already"],
    14: ["missing label: id 'g14' is in split test"],
}


def test_all_bad_lines_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("a.jsonl", BAD_LINES)
    with pytest.raises(UserError) as caught:
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    expected = [f"a.jsonl:{line}: {problem}" for line, found in BAD_PLACES.items() for problem in found]
    assert problems() == expected
    assert capsys.readouterr().err.splitlines() == expected
    assert str(caught.value).startswith("data.inputs: bad records (3 broken JSON, 1 duplicate id, 1 empty text")
    assert str(caught.value).endswith("mend those listed in run/bad-records.txt, or use --data.on_bad=skip")
    assert not Path("run/data").exists()


@pytest.mark.parametrize("by_config", [False, True])
def test_bad_lines_can_be_skipped_and_are_counted(by_config: bool, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("a.jsonl", BAD_LINES)
    config = make_config([{"path": "a.jsonl", "split": "test"}], on_bad="skip" if by_config else "stop")
    prepare(config, Path("run/data"), None if by_config else "skip")
    assert sorted(by_key("test")) == ["g1", "g16"]
    assert load_manifest(Path("run/data"), "data").details["bad_records"] == {
        "broken JSON": 3,
        "duplicate id": 1,
        "empty text": 1,
        "invalid UTF-8": 2,
        "missing field": 3,
        "missing id": 1,
        "missing label": 1,
        "missing language": 1,
        "no texts": 1,
        "non-string text": 1,
        "unknown label": 1,
    }
    assert len(problems()) == 16
    assert capsys.readouterr().err.count("\n") == 1


def test_printed_list_is_capped_but_the_file_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("a.jsonl", [record(number, label="meh") for number in range(70)])
    with pytest.raises(UserError, match="70 unknown label"):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 51
    assert printed[-1] == "... and 20 more of 70"
    assert len(problems()) == 70
    write_jsonl("a.jsonl", [record(1)])
    prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    assert not Path("run/bad-records.txt").exists()


def test_bad_rows_of_csv() -> None:
    lines = [
        b"id,language,text,label",
        b"1,en,one,good",
        b"1,de,eins,bad",
        b'2,en,"two\nlines",good',
        b"2,de,\xff,",
        b"3,en,three",
        b'4,en,"four"x,good',
        b"5,,five,good",
        b"6,en,six,good",
        b"6,en,six,good",
        b",en,seven,good",
        b"8,en,,good",
        b"9,en,nine,good",
    ]
    Path("a.csv").write_bytes(b"\r\n".join(lines))
    config = make_config([{"kind": "table", "path": "a.csv", "split": "test"}])
    with pytest.raises(UserError):
        prepare(config, Path("run/data"))
    assert problems() == [
        "a.csv:3: conflicting labels: id '1' has 'bad' here and 'good' at a.csv:2",
        "a.csv:6: invalid UTF-8: in de.text: '\\udcff'",  # the line break within quotes counts
        "a.csv:7: broken row: 3 cells under 4 columns",
        "a.csv:8: broken row: ',' expected after '\"'",
        "a.csv:9: missing language: '' does not name a language",
        "a.csv:11: duplicate id: id '6' has language en at a.csv:10 already",
        "a.csv:12: missing id: the id must be a non-empty text or a number",
        "a.csv:13: empty text: en.text",
    ]
    prepare(config, Path("run/data"), on_bad="skip")
    assert list(by_key("test")) == ["9"]


def test_a_broken_row_takes_its_whole_group_with_it() -> None:
    lines = [
        "id,language,text,label",
        "1,en,one,good",
        "1,de,eins,good,more",
        "2,de,zw,good",
        '2,en,"two"x,good',
        "3,en,x,bad",
    ]
    Path("a.csv").write_text("\n".join(lines))
    prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}], on_bad="skip"), Path("run/data"))
    assert list(by_key("test")) == ["3"]


def test_the_other_mistakes_of_a_group_with_a_broken_row_are_reported_too() -> None:
    Path("a.csv").write_text("id,language,text,label\n1,en,,good\n1,de,eins,good,more\n2,en,x,bad\n")
    prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}], on_bad="skip"), Path("run/data"))
    assert problems() == ["a.csv:2: empty text: en.text", "a.csv:3: broken row: 5 cells under 4 columns"]
    assert list(by_key("test")) == ["2"]


def test_an_open_quote_hides_rows_and_is_not_skipped() -> None:
    Path("a.csv").write_text('id,language,text,label\n1,en,one,good\n2,en,"two,good\n3,en,three,good\n')
    config = make_config([{"kind": "table", "path": "a.csv", "split": "test"}], on_bad="skip")
    with pytest.raises(UserError, match="of which an open quote cannot be skipped"):
        prepare(config, Path("run/data"))
    assert problems() == ["a.csv:3: open quote: never closed; it takes in all that follows"]


def test_a_long_cell_is_a_text() -> None:
    Path("a.csv").write_text(f"id,language,text,label\n1,en,{'x' * 200_000},good\n")
    prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}]), Path("run/data"))
    assert len(by_key("test")["1"].texts["en"]["text"]) == 200_000


def test_whole_numbers_are_the_same_id_however_they_are_written() -> None:
    write_jsonl(
        "a.jsonl", [record(0) | {"id": 1}, record(0) | {"id": 1.0}, record(0) | {"id": "1"}, record(0) | {"id": 2.5}]
    )
    with pytest.raises(UserError):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    assert problems() == [f"a.jsonl:{n}: duplicate id: id '1' is at a.jsonl:1 already" for n in (2, 3)]
    write_jsonl("a.jsonl", [b'{"id": NaN, "label": "good", "texts": {"en": {"text": "x"}}}'])
    with pytest.raises(UserError):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    assert problems() == ["a.jsonl:1: missing id: the id must be a non-empty text or a number"]


def test_numbers_with_gaps_as_pandas_writes_them_into_csv() -> None:
    Path("a.csv").write_text("id,language,label,text\n1.0,en,1.0,dog\n1,de,,Hund\n2.0,en,0.0,cat\n")
    source = {"kind": "table", "path": "a.csv", "split": "test"}
    prepare(make_config([source], {"labels": ["0", "1"]}), Path("run/data"))
    found = by_key("test")
    assert {key: (group.label, sorted(group.texts)) for key, group in found.items()} == {
        "1": (1, ["de", "en"]),
        "2": (0, ["en"]),
    }


def test_an_empty_table_is_said_to_be_empty() -> None:
    Path("a.csv").write_text("")
    with pytest.raises(UserError, match=r"^a\.csv: holds nothing; restore the file"):
        prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}]), Path("run/data"))


@pytest.mark.parametrize(
    ("language", "text", "problem"),
    [
        ("de ", "x", "missing language: 'de ' does not name a language"),
        ("d\ne", "x", "missing language: 'd\\ne' does not name a language"),
        ("de", "\u200b\x00 ", "empty text: de.text"),
    ],
)
def test_what_cannot_be_seen_is_not_there(language: str, text: str, problem: str) -> None:
    write_jsonl("a.jsonl", [{"id": "a", "label": "good", "texts": {"en": {"text": "x"}, language: {"text": text}}}])
    with pytest.raises(UserError):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))
    assert problems() == [f"a.jsonl:1: {problem}"]


def test_patterns_reach_every_depth_and_directories_are_named() -> None:
    for number, folder in enumerate(("d", "d/x", "d/x/y")):
        Path(folder).mkdir()
        write_jsonl(f"{folder}/{number}.jsonl", [record(number)])
    prepare(make_config([{"path": "d/**/*.jsonl", "split": "test"}]), Path("run/data"))
    assert set(by_key("test")) == {"g0", "g1", "g2"}
    with pytest.raises(UserError, match=r"data.inputs.path: d: is a directory; name its files, such as d/\*.jsonl"):
        prepare(make_config([{"path": "d", "split": "test"}]), Path("run/other"))


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        ({}, {"source_language": "fr"}, r"data.source_language: split test has nothing in 'fr' \(it has de, en\)"),
        ({"template": {"en": "{text}"}}, {}, "task.template: has nothing for language 'de' and no default"),
        ({"template": {"default": "{text}", "dde": "{text}"}}, {}, "task.template.dde: no split has that language"),
        ({"verbalizers": {"en": ["a", "b"]}}, {}, "task.verbalizers: has nothing for language 'de'"),
        ({}, {"exposure": {"xx": 0.5}}, "data.exposure.xx: the pretrain split has nothing in that language"),
    ],
)
def test_what_would_fail_later_is_said_now(task: Record, data: Record, words: str) -> None:
    write_jsonl("a.jsonl", MANY)
    splits = {"test": 30, "unlabeled": 30, "pretrain": 30}
    with pytest.raises(UserError, match=f"^{words}"):
        prepare(make_config([{"path": "a.jsonl"}], task, splits=splits, **data), Path("run/data"))
    assert not Path("run/data").exists()


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"rule": "explicit", "teachers": ["en", "xx"]}, "select.teachers: 'xx' is not among the unlabeled languages"),
        ({"rule": "top_k", "top_k": 3}, "select.top_k: 3 asked for, there are 2 languages"),
    ],
)
def test_a_selection_that_cannot_be_met_is_said_before_training(select: Record, words: str) -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl"}], splits={"test": 30, "unlabeled": 30})
    for name, changed in (
        ("", {"select": select}),
        ("variants.x.", {"variants": {"x": {"select": select}}}),
    ):
        value = config.model_dump(mode="json", exclude_unset=True) | changed
        with pytest.raises(UserError, match=f"^{name}{words}"):
            prepare(Config.model_validate(value), Path("run/data"))


def test_a_prepared_dataset_must_fit_the_task() -> None:
    """Labels are stored as numbers: in another order they would mean something else."""
    write_jsonl("a.jsonl", MANY)
    prepare(make_config([{"path": "a.jsonl"}], splits={"test": 30, "unlabeled": 30, "labeled": 30}), Path("run/data"))

    def use(**task: Any) -> None:
        value = make_config([{"path": "a.jsonl", "split": "test"}], task).model_dump(mode="json", exclude_unset=True)
        check_prepared(Config.model_validate(value | {"data": {"directory": "run/data"}}))

    use()
    with pytest.raises(
        UserError, match=r"task.labels: .* was prepared with good, bad, in this order, not with bad, good"
    ):
        use(labels=["bad", "good"])
    with pytest.raises(UserError, match=r"task.template.xx: no split has that language"):
        use(template={"default": "{text}", "xx": "{text}"})


def test_bad_rows_of_parquet() -> None:
    texts = pyarrow.array([b"fine", b"\xff\xfe", b"x", None]).cast(pyarrow.string(), safe=False)
    columns = {"id": ["a", "b", "c", "d"], "language": ["en"] * 4, "text": texts, "label": ["good"] * 2 + ["no", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    with pytest.raises(UserError):
        prepare(make_config([{"kind": "table", "path": "a.parquet", "split": "unlabeled"}]), Path("run/data"))
    assert problems() == [
        "a.parquet:row 2: invalid UTF-8: in en.text: '\\udcff\\udcfe'",
        "a.parquet:row 3: unknown label: 'no' is not one of task.labels",
        "a.parquet:row 4: missing field: en.text",
    ]


def test_an_id_in_two_inputs_is_a_duplicate() -> None:
    write_jsonl("a.jsonl", [record(1), record(2)])
    write_jsonl("b.jsonl", [record(3), record(2)])
    inputs = [{"path": "a.jsonl", "split": "labeled"}, {"path": "b.jsonl", "split": "test"}]
    with pytest.raises(UserError, match="1 duplicate id"):
        prepare(make_config(inputs), Path("run/data"))
    assert problems() == ["b.jsonl:2: duplicate id: id 'g2' is at a.jsonl:2 already"]


def test_labeled_groups_need_the_source_language_and_a_label() -> None:
    write_jsonl("a.jsonl", [record(1), record(2, languages=("de",)), record(3, label=None)])
    with pytest.raises(UserError):
        prepare(make_config([{"path": "a.jsonl", "split": "labeled"}]), Path("run/data"))
    assert problems() == [
        "a.jsonl:2: missing source language: id 'g2' is in split labeled without en",
        "a.jsonl:3: missing label: id 'g3' is in split labeled",
    ]


@pytest.mark.parametrize("data", [gzip.compress(b'{"id": 1}\n' * 1000)[:-20], b"not gzip"], ids=["cut", "no gzip"])
def test_unreadable_gzip(data: bytes) -> None:
    Path("a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read \(.*\); restore the file"):
        prepare(make_config([{"path": "a.jsonl.gz", "split": "test"}]), Path("run/data"), on_bad="skip")


def test_unreadable_parquet_and_unknown_suffix() -> None:
    Path("a.parquet").write_bytes(b"PAR1 not really")
    Path("a.txt").write_bytes(b"")
    for path, message in (("a.parquet", "cannot be read as Parquet"), ("a.txt", "kind table reads .parquet")):
        with pytest.raises(UserError, match=message):
            prepare(make_config([{"kind": "table", "path": path, "split": "test"}]), Path("run/data"))


# --- splits --------------------------------------------------------------------------------------------------------

MANY = [record(number, label=("good", "bad")[number % 2]) for number in range(100)]
SPLIT_NAMES = ("labeled", "pretrain", "test", "unlabeled")


def split_keys(config: Config) -> dict[str, list[str]]:
    return {split: list(by_key(split)) for split in prepare(config, Path("run/data"))}


def test_shares_and_counts_are_met_and_splits_are_disjoint() -> None:
    write_jsonl("a.jsonl", MANY)
    splits = {"unlabeled": 0.29, "labeled": 10, "test": 0.5}
    keys = split_keys(make_config([{"path": "a.jsonl"}], splits=splits))
    assert {split: len(found) for split, found in keys.items()} == {"unlabeled": 29, "labeled": 10, "test": 50}
    every = [key for found in keys.values() for key in found]
    assert len(set(every)) == len(every) == 89
    assert load_manifest(Path("run/data"), "data").details["num_left_out"] == 11


def test_shares_of_one_in_all_leave_nothing_out() -> None:
    write_jsonl("a.jsonl", MANY[:11])
    splits = {"unlabeled": 0.5, "labeled": 0.25, "test": 0.25}
    keys = split_keys(make_config([{"path": "a.jsonl"}], splits=splits))
    assert sum(len(found) for found in keys.values()) == 11


def test_test_groups_stay_when_other_splits_grow_and_lines_move() -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl"}], splits={"unlabeled": 20, "labeled": 10, "test": 15})
    before = split_keys(config)
    write_jsonl("a.jsonl", MANY[::-1])
    assert split_keys(config) == before
    after = split_keys(make_config([{"path": "a.jsonl"}], splits={"test": 15, "labeled": 30, "unlabeled": 55}))
    assert after["test"] == before["test"]
    assert set(after["labeled"]) > set(before["labeled"])
    other = split_keys(make_config([{"path": "a.jsonl"}], seed=1, splits={"test": 15, "labeled": 30, "unlabeled": 55}))
    assert set(other["test"]) != set(after["test"])


def test_explicit_splits_join_divided_ones_in_hash_order() -> None:
    write_jsonl("a.jsonl", MANY[:50])
    write_jsonl("b.jsonl", MANY[50:])
    inputs = [{"path": "a.jsonl"}, {"path": "b.jsonl", "split": "unlabeled"}]
    keys = split_keys(make_config(inputs, splits={"unlabeled": 0.5}))["unlabeled"]
    own = [key in {row["id"] for row in MANY[50:]} for key in keys]
    assert (len(own), sum(own)) == (75, 50)
    assert own != sorted(own) and own != sorted(own, reverse=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"splits": {"test": 101}}, r"data\.splits: asks for 101 groups of 100"),
        ({"splits": {"test": 0.5, "labeled": 51}}, "asks for 101 groups of 100"),
        ({"splits": {"test": 1e12}}, "asks for 1000000000000 groups of 100"),
        ({"splits": {"test": 0.001}}, "split test ends up without labeled groups"),
        ({"splits": {"pretrain": 0.001}}, "split pretrain ends up without groups"),
        ({"splits": {"test": 1.5}}, r"data\.splits\.test: 1\.5 is neither a share below 1 nor a whole number"),
        ({"splits": {"test": 5}, "withhold_labels": ["test"]}, r"data\.withhold_labels: test needs its labels"),
        ({"splits": {"test": 5}, "languages": ["en", "dee"]}, r"data\.languages: 'dee' is in no input"),
    ],
)
def test_impossible_settings(data: Record, message: str) -> None:
    write_jsonl("a.jsonl", MANY)
    with pytest.raises(UserError, match=message):
        prepare(make_config([{"path": "a.jsonl"}], **data), Path("run/data"))
    assert not Path("run/data").exists()


def test_ignored_settings_are_errors() -> None:
    write_jsonl("a.jsonl", MANY)
    with pytest.raises(UserError, match=r"data\.splits: every input has a split of its own"):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}], splits={"labeled": 5}), Path("run/data"))
    with pytest.raises(UserError, match=r"data\.inputs\.0\.columns\.fields\.txt: not one of task\.fields"):
        source = {"kind": "table", "path": "a.csv", "split": "test", "columns": {"fields": {"txt": "x"}}}
        prepare(make_config([source]), Path("run/data"))


def test_missing_input_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.inputs\.path: none-\*\.jsonl: no such file"):
        prepare(make_config([{"path": "none-*.jsonl", "split": "test"}]), Path("run/data"))


# --- what is written -----------------------------------------------------------------------------------------------


def test_withheld_labels_are_not_in_the_tars() -> None:
    write_jsonl("a.jsonl", MANY)
    splits = {"pretrain": 20, "unlabeled": 30, "labeled": 20, "test": 30}
    prepare(make_config([{"path": "a.jsonl"}], splits=splits, groups_per_shard=8), Path("run/data"))
    found: dict[str, set[Any]] = {}
    for path in Path("run/data").glob("*/*.tar"):
        with tarfile.open(path) as tar:
            members = [json.loads(tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        found.setdefault(path.parent.name, set()).update(member["label"] for member in members)
    assert found == {"pretrain": {None}, "unlabeled": {None}, "labeled": {0, 1}, "test": {0, 1}}
    splits_in_manifest = load_manifest(Path("run/data"), "data").details["splits"]
    assert splits_in_manifest["unlabeled"] == {
        "num_groups": 30,
        "num_labeled": 0,
        "num_examples": {"de": 30, "en": 30},
    }
    assert splits_in_manifest["test"]["num_labeled"] == 30


def test_languages_are_filtered_before_texts_are_checked() -> None:
    empty = {"id": "g4", "label": "good", "texts": {"en": "fine", "fr": " "}}
    write_jsonl("a.jsonl", [record(1), record(2, languages=("fr",)), record(3, languages=("de", "fr")), empty])
    prepare(make_config([{"path": "a.jsonl", "split": "test"}], languages=["en", "de"]), Path("run/data"))
    assert {key: sorted(group.texts) for key, group in by_key("test").items()} == {
        "g1": ["de", "en"],
        "g3": ["de"],
        "g4": ["en"],
    }
    details = load_manifest(Path("run/data"), "data").details
    assert (details["num_no_language"], details["bad_records"]) == (1, {})


def tree(directory: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }


def test_same_input_gives_same_bytes_and_a_killed_run_leaves_nothing() -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl"}], splits={"unlabeled": 50, "test": 20}, groups_per_shard=7)
    prepare(config, Path("one/data"))
    killed = Path("two/data")
    begin(killed, "data", fingerprint(config))
    assert not is_complete(killed, "data", fingerprint(config))
    for name in ("unlabeled/000099.tar", "unlabeled/000000.tar", "test/manifest.json", "test/.000001.tar.x.tmp"):
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        (killed / name).write_bytes(b"what a killed run left")
    prepare(config, killed)
    assert tree("one/data") == tree("two/data")
    assert is_complete(killed, "data", fingerprint(config))
    manifest = load_manifest(killed, "data")
    assert sorted(manifest.files) == ["test/manifest.json", "unlabeled/manifest.json"]
    verify_files(killed, manifest)
    keys = [group.key for group in read_shards("one/data/unlabeled")]
    assert keys != sorted(keys)


def read_shards(directory: str) -> list[Group]:
    dataset = open_dataset(directory)
    return [group for shard in dataset.shards for group in read_shard(dataset, shard)]


def test_fingerprint_follows_settings_and_content_but_not_on_bad() -> None:
    write_jsonl("a.jsonl", MANY)
    source = {"path": "a.jsonl", "split": "test"}
    base = fingerprint(make_config([source]))
    assert json.loads(json.dumps(base)) == base
    assert fingerprint(make_config([source], on_bad="skip")) == base
    assert fingerprint(make_config([source], seed=1)) != base
    assert fingerprint(make_config([source], {"labels": ["bad", "good"]})) != base
    assert fingerprint(make_config([source], {"template": "Say: {text}"})) == base
    write_jsonl("a.jsonl", MANY[:-1])
    assert fingerprint(make_config([source])) != base


def test_unwritable_directory_is_one_line() -> None:
    write_jsonl("a.jsonl", MANY)
    Path("run").write_bytes(b"a file where the run directory should be")
    with pytest.raises(UserError, match=r"run/data: cannot be written \(Not a directory\)"):
        prepare(make_config([{"path": "a.jsonl", "split": "test"}]), Path("run/data"))


def test_full_disk_is_one_line_and_leaves_nothing_that_looks_whole() -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl"}], splits={"test": 3, "unlabeled": 97}, groups_per_shard=97)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # a shard of 3 groups fits, one of 97 does not
    try:
        with pytest.raises(UserError, match=r"run/data: cannot be written \(File too large\); free space"):
            prepare(config, Path("run/data"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tree("run/data")) == ["started.json", "test/000000.tar", "test/manifest.json"]
    prepare(config, Path("run/data"))
    prepare(config, Path("other/data"))
    assert tree("run/data") == tree("other/data")


def test_bad_input_leaves_an_earlier_output_alone() -> None:
    write_jsonl("a.jsonl", MANY)
    config = make_config([{"path": "a.jsonl", "split": "test"}])
    prepare(config, Path("run/data"))
    before = tree("run/data")
    write_jsonl("a.jsonl", BAD_LINES)
    with pytest.raises(UserError):
        prepare(config, Path("run/data"))
    assert tree("run/data") == before
