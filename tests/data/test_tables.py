"""Tables in long form as stage prepare reads them: CSV and Parquet, their spellings, and every kind of bad row."""

import csv
import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data.preparing import EXPECTED, LONG_FORM, by_key, make_config, problems, read_back

from alsace_dist.data.tables import language_of_file
from alsace_dist.errors import UserError
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.stages.prepare import prepare


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    assert read_back("test") == [ParallelGroup("007", 0, texts)]  # ids and texts are never taken for numbers or gaps


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


def test_a_long_cell_is_a_text() -> None:
    Path("a.csv").write_text(f"id,language,text,label\n1,en,{'x' * 200_000},good\n")
    prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}]), Path("run/data"))
    assert len(by_key("test")["1"].texts["en"]["text"]) == 200_000


def test_numbers_with_gaps_as_pandas_writes_them_into_csv() -> None:
    Path("a.csv").write_text("id,language,label,text\n1.0,en,1.0,dog\n1,de,,Hund\n2.0,en,0.0,cat\n")
    source = {"kind": "table", "path": "a.csv", "split": "test"}
    prepare(make_config([source], {"labels": ["0", "1"]}), Path("run/data"))
    found = by_key("test")
    assert {key: (group.label, sorted(group.texts)) for key, group in found.items()} == {
        "1": (1, ["de", "en"]),
        "2": (0, ["en"]),
    }


# --- bad rows --------------------------------------------------------------------------------------------------------


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
    inputs = [{"kind": "table", "path": "a.csv", "split": "test"}]
    with pytest.raises(UserError):
        prepare(make_config(inputs), Path("run/data"))
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
    prepare(make_config(inputs, on_bad="skip", max_skipped=1.0), Path("run/data"))
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
    inputs = [{"kind": "table", "path": "a.csv", "split": "test"}]
    prepare(make_config(inputs, on_bad="skip", max_skipped=1.0), Path("run/data"))
    assert list(by_key("test")) == ["3"]


def test_the_other_mistakes_of_a_group_with_a_broken_row_are_reported_too() -> None:
    Path("a.csv").write_text("id,language,text,label\n1,en,,good\n1,de,eins,good,more\n2,en,x,bad\n")
    inputs = [{"kind": "table", "path": "a.csv", "split": "test"}]
    prepare(make_config(inputs, on_bad="skip", max_skipped=1.0), Path("run/data"))
    assert problems() == ["a.csv:2: empty text: en.text", "a.csv:3: broken row: 5 cells under 4 columns"]
    assert list(by_key("test")) == ["2"]


def test_an_open_quote_hides_rows_and_is_not_skipped() -> None:
    Path("a.csv").write_text('id,language,text,label\n1,en,one,good\n2,en,"two,good\n3,en,three,good\n')
    config = make_config([{"kind": "table", "path": "a.csv", "split": "test"}], on_bad="skip", max_skipped=1.0)
    with pytest.raises(UserError, match="of which an open quote cannot be skipped"):
        prepare(config, Path("run/data"))
    assert problems() == ["a.csv:3: open quote: never closed; it takes in all that follows"]


def test_an_empty_table_is_said_to_be_empty() -> None:
    Path("a.csv").write_text("")
    with pytest.raises(UserError, match=r"^a\.csv: holds nothing; restore the file"):
        prepare(make_config([{"kind": "table", "path": "a.csv", "split": "test"}]), Path("run/data"))


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


def test_unreadable_parquet_and_unknown_suffix() -> None:
    Path("a.parquet").write_bytes(b"PAR1 not really")
    Path("a.txt").write_bytes(b"")
    for path, message in (("a.parquet", "cannot be read as Parquet"), ("a.txt", "kind table reads .parquet")):
        with pytest.raises(UserError, match=message):
            prepare(make_config([{"kind": "table", "path": path, "split": "test"}]), Path("run/data"))


@pytest.mark.parametrize(
    ("pattern", "path", "language"),
    [
        ("xnli/test.{language}.tsv", "xnli/test.sw.tsv", "sw"),
        ("sib/{language}/test.tsv", "sib/eng_Latn/test.tsv", "eng_Latn"),
        ("x/{language}/test.{language}.csv", "x/de/test.de.csv", "de"),
        ("x/{language}/*.csv", "x/de/part-1.csv", "de"),
        ("x/{language}/test.{language}.csv", "x/de/test.fr.csv", None),
        ("x/*.csv", "x/de.csv", None),
    ],
)
def test_a_path_names_the_language(pattern: str, path: str, language: str | None) -> None:
    assert language_of_file(pattern, Path(path)) == language
