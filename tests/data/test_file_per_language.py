"""One file per language, without code: tables and JSONL, joined by id or by position, quoted or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data.preparing import EXPECTED, by_key, make_config, problems

from alsace_dist.data.tables import find_quoting
from alsace_dist.errors import UserError
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.stages.prepare import prepare

RUN = Path("run/data")
PAIR = {"fields": ["first", "second"], "template": "{first} {second}", "labels": ["0", "1"]}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, *lines: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))


# --- the split in the path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "jsonl"])
def test_split_and_language_stand_in_the_path(kind: str) -> None:
    ending = {"table": "tsv", "jsonl": "jsonl"}[kind]
    for language, text in (("en", "dog"), ("de", "Hund")):
        for name in ("dev", "test"):
            if kind == "table":
                write(f"data/{name}.{language}.tsv", "nr\tsentence\tgold", f"1\t{text} {name}\tgood")
            else:
                write(
                    f"data/{name}.{language}.jsonl", json.dumps({"nr": 1, "sentence": f"{text} {name}", "gold": "good"})
                )
    columns = {"id": "nr", "label": "gold", "fields": {"text": "sentence"}}
    one = {"kind": kind, "path": f"data/{{split}}.{{language}}.{ending}", "columns": columns}
    inputs = [one | {"split": "test", "name": "t"}, one | {"split": "unlabeled", "hub_split": "dev", "name": "d"}]
    prepare(make_config(inputs), RUN)
    assert by_key("test") == {"t/1": ParallelGroup("t/1", 0, {"en": {"text": "dog test"}, "de": {"text": "Hund test"}})}
    assert by_key("unlabeled")["d/1"].texts == {"en": {"text": "dog dev"}, "de": {"text": "Hund dev"}}


def test_a_split_in_the_path_must_be_said() -> None:
    with pytest.raises(ValueError, match="stands for hub_split, or else for split: give one of them"):
        make_config([{"kind": "table", "path": "data/{split}.{language}.tsv"}], splits={"test": 1})


# --- JSONL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["id", "position"])
def test_jsonl_with_keys_of_any_name(by: str) -> None:
    for language, texts in (("en", ["dog", "cat"]), ("de", ["Hund", "Katze"])):
        rows = [{"idx": n + 1, "s": text, "y": ["good", "bad"][n]} for n, text in enumerate(texts)]
        write(f"{language}.jsonl", *(json.dumps(row) for row in (rows if by == "position" else rows[::-1])))
    columns = {"id": "idx" if by == "id" else None, "label": "y", "fields": {"text": "s"}}
    prepare(make_config([{"path": "{language}.jsonl", "columns": columns, "split": "test"}]), RUN)
    assert by_key("test") == EXPECTED


def test_jsonl_in_long_form() -> None:
    rows = [
        ("1", "en", "dog", "good"),
        ("2", "en", "cat", "bad"),
        ("1", "de", "Hund", None),
        ("2", "de", "Katze", "bad"),
    ]
    write("a.jsonl", *(json.dumps(dict(zip(("id", "lang", "text", "label"), row, strict=True))) for row in rows))
    prepare(make_config([{"path": "a.jsonl", "columns": {"language": "lang"}, "split": "test"}]), RUN)
    assert by_key("test") == EXPECTED


def test_rows_of_jsonl_that_are_wrong() -> None:
    write(
        "en.jsonl", '{"id": 1, "text": "a", "label": "good"}', '{"id": 2, "text": ', '["3"]', '{"id": 4, "text": "d"}'
    )
    write("de.jsonl", "", '{"id": 1, "text": 7}', '{"id": 2, "text": "b"}', '{"id": 3, "text": "c"}', '{"id": 4}')
    config = make_config([{"path": "{language}.jsonl", "split": "unlabeled"}])
    with pytest.raises(UserError):
        prepare(config, RUN)
    assert problems() == [
        "de.jsonl:2: non-string text: de.text is 7",
        "de.jsonl:5: missing field: de.text",
        "en.jsonl:2: broken JSON: Expecting value at column 18",
        "en.jsonl:3: broken JSON: the line is not an object",
    ]


def test_a_broken_line_of_jsonl_keeps_its_place_among_the_rows() -> None:
    """Joined by position: its group is left out as a whole, and the rows after it keep their groups."""
    write("en.jsonl", '{"text": "a"}', '{"text": ', '{"text": "c"}')
    write("de.jsonl", '{"text": "x"}', '{"text": "y"}', '{"text": "z"}')
    source = {"path": "{language}.jsonl", "columns": {"id": None, "label": None}, "split": "unlabeled"}
    prepare(make_config([source], on_bad="skip", max_skipped=1.0), RUN)
    assert {key: group.texts for key, group in by_key("unlabeled").items()} == {
        "1": {"en": {"text": "a"}, "de": {"text": "x"}},
        "3": {"en": {"text": "c"}, "de": {"text": "z"}},
    }


def test_keys_that_no_line_has_are_said_once() -> None:
    write("en.jsonl", '{"id": 1, "sentence": "a"}', '{"id": 2, "sentence": "b"}')
    with pytest.raises(
        UserError, match=r"^en\.jsonl:1: no column 'text' among id, sentence, label; set .*fields\.text"
    ):
        prepare(make_config([{"path": "{language}.jsonl", "split": "unlabeled"}]), RUN)


# --- joined by position --------------------------------------------------------------------------------------------


def test_broken_rows_keep_their_place_and_blank_lines_at_the_end_have_none() -> None:
    write("en.tsv", "text\tlabel", "a\tgood", "b\tbad", "c\tgood", "d\tbad", "", "")
    write("de.tsv", "text\tlabel", "A\tgood", "B\tbad\tmore", "C\tgood", "D\tbad")
    source = {"kind": "table", "path": "{language}.tsv", "columns": {"id": None}, "split": "test", "name": "x"}
    prepare(make_config([source], on_bad="skip", max_skipped=1.0), RUN)
    assert problems() == ["de.tsv:3: broken row: 3 cells under 2 columns"]
    assert {key: group.texts["de"]["text"] for key, group in by_key("test").items()} == {
        "x/1": "A",
        "x/3": "C",
        "x/4": "D",
    }
    assert {key: group.texts["en"]["text"] for key, group in by_key("test").items()} == {
        "x/1": "a",
        "x/3": "c",
        "x/4": "d",
    }


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_blank_line_between_rows_that_are_joined_by_position_is_one_of_them(kind: str) -> None:
    """Each file lacks another translation: counted without them, all would have five rows, and none its own."""
    for number, language in enumerate(("en", "de", "fr"), start=1):
        rows = [f"{language} {index}" for index in range(6)]
        lines = [json.dumps({"text": row}) for row in rows] if kind == "jsonl" else rows
        lines[number] = " " if kind == "jsonl" else ""
        write(f"{language}.{kind}", *([] if kind == "jsonl" else ["text"]), *lines)
    source = {"kind": "jsonl" if kind == "jsonl" else "table", "path": f"{{language}}.{kind}", "split": "unlabeled"}
    source |= {"columns": {"id": None, "label": None}, "quoting": "none"} if kind == "tsv" else {}
    source |= {"columns": {"id": None, "label": None}}
    with pytest.raises(UserError, match="3 broken row"):
        prepare(make_config([source]), RUN)
    first = 1 if kind == "jsonl" else 2
    assert [line.partition(": broken row: a blank line, and rows are joined")[0] for line in problems()] == [
        f"de.{kind}:{first + 2}",
        f"en.{kind}:{first + 1}",
        f"fr.{kind}:{first + 3}",
    ]
    prepare(make_config([source], on_bad="skip", max_skipped=1.0), RUN)
    for key, group in by_key("unlabeled").items():
        assert {fields["text"] for fields in group.texts.values()} == {
            f"{language} {int(key) - 1}" for language in group.texts
        }


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet", "long"])
def test_languages_with_different_numbers_of_rows_are_not_joined_by_position(kind: str) -> None:
    texts = {"en": ["a", "b", "c"], "de": ["A", "C"], "fr": ["x", "y", "z"]}
    ending = "csv" if kind == "long" else kind
    for language, values in texts.items():
        if kind == "tsv":
            write(f"{language}.tsv", "text", *values)
        elif kind == "jsonl":
            write(f"{language}.jsonl", *(json.dumps({"text": text}) for text in values))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": values}), f"{language}.parquet")
        else:
            write(f"{language}.csv", "language,text", *(f"{language},{text}" for text in values))
    source = {"path": f"*.{ending}" if kind == "long" else f"{{language}}.{ending}", "split": "unlabeled"}
    source |= {"kind": "jsonl" if kind == "jsonl" else "table", "columns": {"id": None, "label": None}}
    config = make_config([source], on_bad="skip", max_skipped=1.0)
    with pytest.raises(UserError, match=r"\(1 row count\).* of which a different row count cannot be skipped"):
        prepare(config, RUN)
    place = {"tsv": "de.tsv:3", "jsonl": "de.jsonl:2", "parquet": "de.parquet:row 2", "long": "de.csv:3"}[kind]
    assert problems() == [f"{place}: row count: de ends here after 2 rows, where most languages have 3"]
    prepare(
        make_config([source | {"languages": ["en", "fr"]}] if kind != "long" else [source | {"path": "[ef]*.csv"}]), RUN
    )


def test_rows_are_numbered_through_the_files_of_a_language() -> None:
    for language in ("en", "de"):
        for number in (1, 2):
            write(f"{language}/part-{number}.csv", "text", f"{language} {number}")
    source = {"kind": "table", "path": "{language}/*.csv", "columns": {"id": None, "label": None}, "split": "unlabeled"}
    prepare(make_config([source]), RUN)
    assert {key: group.texts["de"]["text"] for key, group in by_key("unlabeled").items()} == {"1": "de 1", "2": "de 2"}


def test_the_id_of_a_broken_row_is_its_inputs_own() -> None:
    """An id that two inputs have is told apart by their names: a broken row in one does not touch the other."""
    for folder in ("a", "b"):
        write(f"{folder}/en.csv", "id,text,label", "1,x,good", "2,y,bad")
        write(f"{folder}/de.csv", "id,text,label", "1,X,good" + ",more" * (folder == "a"), "2,Y,bad")
    inputs = [
        {"kind": "table", "path": f"{name}/{{language}}.csv", "name": name, "split": "test"} for name in ("a", "b")
    ]
    prepare(make_config(inputs, on_bad="skip", max_skipped=1.0), RUN)
    assert sorted(by_key("test")) == ["a/2", "b/1", "b/2"]


# --- headers and quotes --------------------------------------------------------------------------------------------


def test_files_without_a_first_line_of_names() -> None:
    write("en.tsv", "\ufeffdog\tanimal\t1", "cat\tpet\t0")
    write("de.tsv", "Hund\tTier\t1", "Katze\tHaustier\t0")
    source = {"kind": "table", "path": "{language}.tsv", "header": ["first", "second", "label"], "split": "test"}
    prepare(make_config([source | {"columns": {"id": None}}], PAIR), RUN)
    assert by_key("test")["1"] == ParallelGroup(
        "1", 1, {"en": {"first": "dog", "second": "animal"}, "de": {"first": "Hund", "second": "Tier"}}
    )


LETTERS = [
    '"',
    '"a" is a letter',
    'ends with "',
    'two "" of them',
    '"enclosed"',
    "e\u2028nd\u0085\x0b\x0c\x1c",
    "lone \r return",
]


def test_quotes_that_are_letters() -> None:
    for language in ("en", "de"):
        write(
            f"{language}.tsv",
            "id\ttext\tlabel\r",
            *(f"{n}\t{language} {text}\tgood\r" for n, text in enumerate(LETTERS)),
        )
        write(f"{language}2.tsv", "id\ttext\tlabel", *(f"{n}\t{text}\tgood" for n, text in enumerate(LETTERS)))
    source = {"kind": "table", "path": "{language}.tsv", "split": "test", "quoting": "none", "languages": ["en", "de"]}
    prepare(make_config([source]), RUN)
    assert [by_key("test")[str(n)].texts["de"]["text"] for n in range(len(LETTERS))] == [
        f"de {text}" for text in LETTERS
    ]
    prepare(make_config([source | {"languages": ["en2", "de2"]}], source_language="en2"), RUN)
    assert [by_key("test")[str(n)].texts["en2"]["text"] for n in range(len(LETTERS))] == LETTERS


def test_quotes_that_open_where_they_are_letters_are_said_with_the_remedy() -> None:
    write("a.tsv", "id\tlanguage\ttext\tlabel", '1\ten\t"Yes, he said.\tgood', "2\ten\tx\tgood", "3\ten\tx\tgood")
    with pytest.raises(UserError, match="1 open quote"):
        prepare(make_config([{"kind": "table", "path": "a.tsv", "split": "test"}]), RUN)
    (problem,) = problems()
    assert problem.endswith("; if a quote is a letter here, set quoting: none")
    prepare(make_config([{"kind": "table", "path": "a.tsv", "split": "test", "quoting": "auto"}]), RUN)
    assert by_key("test")["1"].texts["en"]["text"] == '"Yes, he said.'


@pytest.mark.parametrize(
    ("lines", "quoting"),
    [
        (["id\ttext", "1\tno quotes at all"], "none"),
        (["id\ttext", '1\t"He said ""no"" to me."', "2\tplain"], "csv"),
        (["id\ttext", '1\t"He said ""no"" to me."', '2\t"also ""yes"""', '3\tone "slip'], "csv"),
        (["id\ttext", '1\t"Yes," he said.', '2\t"Yes."'], "none"),
        (["id\ttext", '1\t"Yes."'], "none"),  # nobody encloses a cell that needs it not, and leaves the names bare
        (['"id"\t"text"', '"1"\t"Yes."'], "csv"),
        (["id\ttext", '1\tsays ""x""', '2\t"'], "none"),
    ],
)
def test_what_quotes_mean_is_found_out(lines: list[str], quoting: str) -> None:
    write("a.tsv", *lines)
    assert find_quoting(Path("a.tsv"), "\t") == quoting


# --- all languages in a row ----------------------------------------------------------------------------------------


def test_a_row_with_all_languages() -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "label": "good", "t": {"en": "dog", "de": "Hund"}},
        {"id": 2, "label": "bad", "t": {"language": ["en", "de"], "translation": ["cat", "Katze"]}},
    ]
    write("a.jsonl", *(json.dumps(row) for row in rows))
    source = {"path": "a.jsonl", "columns": {"language": None, "fields": {"text": "t"}}, "split": "test"}
    prepare(make_config([source]), RUN)
    assert by_key("test") == EXPECTED
    rows[1]["t"]["translation"] = ["cat"]
    rows[0]["t"] = "dog"
    write("a.jsonl", *(json.dumps(row) for row in rows))
    with pytest.raises(UserError):
        prepare(make_config([source]), RUN)
    said = "no texts: t must map languages to texts, or hold lists of language and translation"
    assert problems() == [f"a.jsonl:{number}: {said}" for number in (1, 2)]


def test_numbered_classes_of_parquet_have_the_names_that_datasets_wrote() -> None:
    import datasets

    features = datasets.Features({"id": datasets.Value("int64"), "language": datasets.Value("string")})
    features |= {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    columns = {"id": [1, 2, 3], "language": ["en"] * 3, "text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet("a.parquet")
    prepare(make_config([{"kind": "table", "path": "a.parquet", "split": "pretrain"}], withhold_labels=[]), RUN)
    assert {key: group.label for key, group in by_key("pretrain").items()} == {"1": 0, "2": 1, "3": None}


def test_letters_of_every_script_arrive_as_they_were() -> None:
    """Nothing is normalised, cut or reordered between a file and the shards."""
    texts = {
        "ar": "مَرْحَبًا \u200fبكم\u200e (١٢٣)",
        "he": "שָׁלוֹם \u2067עולם\u2069",
        "th": "สวัสดีค\u0e33น้ำ",
        "ja": "か\u3099が ﾊﾝｶｸ ㍿",
        "zh": "𠮷野家\ufe00",
        "hi": "क्\u200dष क्ष",
        "ko": "\u1112\u1161\u11ab한",
        "vi": "e\u0302\u0301ế",
        "en": "\U0001f469\u200d\U0001f469\u200d\U0001f467\ufe0f \U0001f1e9\U0001f1ea \u00a0nbsp\u3000wide",
    }
    for language, text in texts.items():
        write(f"{language}.tsv", "id\ttext\tlabel", f"1\t{text}\tgood")
        write(f"{language}.jsonl", json.dumps({"id": 1, "text": text, "label": "good"}, ensure_ascii=False))
    for source in (
        {"kind": "table", "path": "{language}.tsv"},
        {"kind": "table", "path": "{language}.tsv", "quoting": "none"},
        {"path": "{language}.jsonl"},
    ):
        prepare(make_config([source | {"split": "test"}]), RUN)
        assert {language: fields["text"] for language, fields in by_key("test")["1"].texts.items()} == texts
        shutil.rmtree("run")
