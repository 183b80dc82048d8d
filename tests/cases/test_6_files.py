"""Section 6: files that people bring and that are not what their name or the config says: the line says what they are.

Elsewhere: every kind of bad row, in tests/data/test_tables.py and test_file_per_language.py; hub datasets read right,
splits, and a hub that is asked once, in tests/data/test_hub.py; published datasets, in tests/tasks/test_published.py.
"""

import csv
import gzip
import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from cases.case import Case, error_line

from alsace_dist.files.shards import ParallelGroup, open_dataset, read_shard

ROWS = [["id", "language", "text", "label"], ["1", "en", "dog", "a"], ["1", "de", "Hund", "a"], ["2", "en", "cat", "b"]]
TABLE = "\n".join(",".join(row) for row in ROWS) + "\n"
RECORDS = [{"id": "1", "label": "a", "texts": {"en": {"text": "dog"}, "de": {"text": "Hund"}}}]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)


def read(case: Case, name: str, content: str | bytes, **settings: Any) -> None:
    """Make a file the config's one input."""
    (case / name).parent.mkdir(parents=True, exist_ok=True)
    (case / name).write_bytes(content.encode() if isinstance(content, str) else content)
    kind = "jsonl" if "jsonl" in name.lower() else "table"
    case.change(data={"inputs": [{"path": name, "kind": kind} | settings]})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", TABLE.replace(",", ";"), "separated by semicolons; write it with commas"),
        ("a.csv", TABLE.replace(",", "\t"), "separated by tabs; write it with a name that ends in .tsv"),
        ("a.tsv", TABLE, "separated by commas"),
        ("a.csv", TABLE.encode("utf-16"), "is no UTF-8 text (UTF-16, as spreadsheets write it?)"),
        ("a.csv", TABLE.encode("utf-16-le"), "is no UTF-8 text (UTF-16, as spreadsheets write it?)"),
        ("a.csv", TABLE.replace("text", "t\xe4xt").encode("latin-1"), "is no UTF-8 text"),
        ("a.csv", "", "holds nothing"),
        ("a.csv", ",".join(ROWS[0]) + "\n", "holds no records"),
        ("a.csv", "\n\n", "a.csv"),
        ("a.csv", TABLE.replace("language", "lang"), "no column 'language' among"),
        ("a.csv", TABLE.replace("text", "id"), "a.csv"),
        ("a.csv", "PK\x03\x04" + "\0" * 100, "is a zip archive, or a spreadsheet"),
        ("a.csv", gzip.compress(TABLE.encode(), mtime=0), "is compressed by gzip; give it a name that ends in .gz"),
        ("a.csv.gz", TABLE, "a.csv.gz: cannot be read (Not a gzipped file"),
        ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)[:-12], "a.csv.gz: cannot be read"),
        ("a.xlsx", "PK\x03\x04", "kind table reads .parquet, .csv and .tsv"),
        ("a.csv.zip", "PK\x03\x04", "kind table reads .parquet, .csv and .tsv"),
        ("a.txt", TABLE, "kind table reads .parquet, .csv and .tsv"),
        ("a.parquet", "", "a.parquet: cannot be read as Parquet"),
        ("a.parquet", TABLE, "a.parquet: cannot be read as Parquet"),
        ("a.jsonl", json.dumps(RECORDS), "is one JSON array; JSONL has one object a line (jq -c '.[]'"),
        ("a.jsonl", "\ufeff" + json.dumps(RECORDS), "is one JSON array"),
        ("a.jsonl", json.dumps(RECORDS, indent=1), "is one JSON array"),
        ("a.jsonl", json.dumps(RECORDS[0], indent=1), "has an object over several lines"),
        ("a.jsonl", JSONL.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.jsonl", "", "holds no records"),
        ("a.jsonl", "\n \n", "holds no records"),
        ("a.jsonl", TABLE, "bad records (4 broken JSON)"),
        ("a.jsonl", JSONL.replace('"texts"', '"text"'), "bad records (1 no texts)"),
        ("a.jsonl", '{"id": ' + "9" * 5_000 + "}\n", "bad records (1 broken JSON)"),
        ("a.jsonl", "[" * 100_000 + "\n", "is one JSON array"),
        ("a.jsonl", '{"a": ' * 100_000 + "\n", "bad records (1 broken JSON)"),
        ("a.jsonl.gz", JSONL, "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:-12], "a.jsonl.gz: cannot be read"),
        ("a.jsonl", gzip.compress(JSONL.encode(), mtime=0), "is compressed by gzip; give it a name that ends in .gz"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_is_something_else(case: Case, name: str, content: str | bytes, words: str) -> None:
    read(case, name, content)
    is_listed = words.startswith("bad records")
    case.refused("prepare", "run.yaml", says=words if is_listed else (name, words))
    if is_listed:
        assert f"{name}:1: " in (case / "run/bad-records.txt").read_text(encoding="utf-8")


def read_beside(case: Case, name: str, content: bytes) -> dict[str, ParallelGroup]:
    """The groups of a file that is the test split, beside the world's own data."""
    (case / name).write_bytes(content)
    kind = "jsonl" if "jsonl" in name.lower() else "table"
    own = {"path": name, "kind": kind, "split": "test", "name": "x"}
    case.change(data={"splits": {"labeled": 1, "unlabeled": 1}, "inputs": [{"path": "data.jsonl"}, own]})
    case.done("prepare", "run.yaml")
    dataset = open_dataset(case / "run/data/test")
    return {group.key: group for shard in dataset.shards for group in read_shard(dataset, shard)}


CAPITALS = ["A.CSV", "a.Csv", "A.TSV", "A.PARQUET", "a.Parquet", "A.CSV.GZ", "A.JSONL", "A.JSONL.GZ"]


@pytest.mark.parametrize("name", CAPITALS)
def test_the_ending_of_a_name_may_be_in_capitals(case: Case, name: str) -> None:
    content = JSONL.encode()
    if "PARQUET" in name.upper():
        columns = dict(zip(ROWS[0], map(list, zip(*ROWS[1:], strict=True)), strict=True))
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        content = file.getvalue()
    elif "JSONL" not in name:
        content = TABLE.replace(",", "\t" if "TSV" in name else ",").encode()
    found = read_beside(case, name, gzip.compress(content) if name.endswith(".GZ") else content)
    assert found["x/1"].texts == RECORDS[0]["texts"]


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["mark", "none"])
@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["crlf", "lf"])
def test_files_as_windows_writes_them(case: Case, mark: bytes, end: bytes) -> None:
    found = read_beside(case, "a.csv", mark + TABLE.encode().replace(b"\n", end))
    assert found["x/1"].texts == RECORDS[0]["texts"]


def test_a_text_may_hold_the_delimiter_quotes_and_line_breaks(case: Case) -> None:
    text = 'he said "dog", and\nleft; \t.'
    file = io.StringIO()
    csv.writer(file).writerows([ROWS[0], ["1", "en", text, "a"], ["1", "de", "x", "a"]])
    assert read_beside(case, "a.csv", file.getvalue().encode())["x/1"].texts["en"] == {"text": text}


# --- the hub -------------------------------------------------------------------------------------------------------


BUILDERS = ["json", "text", "parquet", "csv", "webdataset", "imagefolder", "nothing", "a b/c", "a/b/c"]


@pytest.mark.parametrize("path", BUILDERS)
def test_a_builders_name_reads_nothing_of_the_working_directory(case: Case, path: str) -> None:
    case.put("theirs.json", JSONL)
    case.put("theirs.csv", TABLE)
    case.change(data={"inputs": [{"kind": "huggingface", "path": path}]})
    words = (f"data.inputs.path: {path}: no such file or folder", "no name on the hub, which is owner/name")
    case.refused("prepare", "run.yaml", says=words)


def test_offline_is_one_line(case: Case) -> None:
    case.change(data={"inputs": [{"kind": "huggingface", "path": "nobody/nothing"}]})
    done = case.alsace("prepare", "run.yaml")
    assert "nobody/nothing: cannot be loaded" in error_line(done)
    assert "Retry" not in done.stderr


def save(case: Case, name: str) -> None:
    """A dataset as ``save_to_disk`` writes it, with a split ``validation``."""
    import datasets

    columns = dict(zip(ROWS[0], map(list, zip(*ROWS[1:], strict=True)), strict=True))
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(columns)}).save_to_disk(str(case / name))


@pytest.mark.parametrize("split", [None, "dev", "Validation"])
def test_a_split_that_is_not_there(case: Case, split: str | None) -> None:
    save(case, "saved")
    case.change(data={"inputs": [{"kind": "huggingface", "path": "saved", "hub_split": split}]})
    words = (f"saved: has no split {split or 'train'!r}", "set hub_split to one of validation")
    case.refused("prepare", "run.yaml", says=words)


def test_a_folder_of_a_dataset_is_no_code(case: Case) -> None:
    case.put("folder/folder.py", "open('executed', 'w')")
    case.change(data={"inputs": [{"kind": "huggingface", "path": "folder"}]})
    case.refused("prepare", "run.yaml", says="folder: cannot be loaded")
    assert not (case / "executed").exists()


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file (relative to "),
        ("*.parquet", "*.parquet: no such file"),
        ("data.jsonl/x", "data.jsonl/x: no such file"),
        (".", "is a directory; name its files, such as *.jsonl"),
        ("model", "is a directory; name its files, such as model/*.jsonl"),
        ("s3://bucket/data.jsonl", "s3://bucket/data.jsonl"),
        ("nothing.{language}.jsonl", "no such file"),
        ("{split}.jsonl", "{split} in the path stands for hub_split"),
        ("x" * 300, "File name too long"),
    ],
    ids=lambda value: value[:30],
)
def test_a_path_of_an_input_that_names_none(case: Case, path: str, words: str) -> None:
    case.change(data={"inputs": [{"path": path}]})
    case.refused("prepare", "run.yaml", says=words)


def test_an_input_that_may_not_be_read(case: Case) -> None:
    (case / "data.jsonl").chmod(0)
    case.refused("prepare", "run.yaml", says=("data.jsonl", "Permission denied"), as_person=True)
