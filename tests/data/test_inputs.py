"""The table of kinds of input, what is refused with it, and JSONL and generated inputs as stage prepare reads them."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from data.preparing import EXPECTED, Record, by_key, make_config, problems, read_back, record, write_jsonl

from alsace_dist import pipeline, tasks
from alsace_dist.config import InputConfig
from alsace_dist.data.inputs import KINDS, kind_of, kinds
from alsace_dist.data.records import key_of
from alsace_dist.errors import UserError
from alsace_dist.files.shards import open_dataset
from alsace_dist.stages.prepare import fingerprint_of, prepare


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- kinds ---------------------------------------------------------------------------------------------------------


def load(*inputs: Record) -> None:
    """Read a run's YAML with these inputs, as every command does first."""
    value = make_config(list(inputs), splits={"test": 5}).model_dump(mode="json", exclude_unset=True)
    Path("run.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    pipeline.load_run("run.yaml")


def test_every_module_of_tasks_but_base_is_a_kind() -> None:
    modules = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert "demo" in modules
    assert set(tasks.published()) == modules and not modules & KINDS.keys()
    assert set(kinds()) == modules | {"jsonl", "table", "huggingface"}


@pytest.mark.parametrize("name", kinds())
def test_a_kind_has_settings_that_an_input_has(name: str) -> None:
    assert kind_of(InputConfig(kind=name)).settings <= InputConfig.model_fields.keys() - {"kind", "split"}


KNOWN = ", ".join(sorted(kinds()))
TABLES = "jsonl or table or huggingface"
PUBLISHED = " or ".join(name for name in tasks.published() if name != "demo")
ON_HUB = f"huggingface or {PUBLISHED.replace('geomlama or ', '')}"  # which has files of its own form, not on the hub


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "x", "path": "x"}, f".kind: 'x' is not known; there are {KNOWN}"),
        ({"kind": "base"}, f".kind: 'base' is not known; there are {KNOWN}"),
        ({"kind": "JSONL", "path": "x"}, f".kind: 'JSONL' is not known; there are {KNOWN}"),
        ({}, ": path is needed for kind jsonl"),
        ({"kind": "jsonl", "path": ""}, ": path is needed for kind jsonl"),
        ({"kind": "table"}, ": path is needed for kind table"),
        ({"kind": "huggingface", "hub_split": "test"}, ": path is needed for kind huggingface"),
        ({"path": "x", "num_groups": 5}, ": num_groups is only used with kind demo; remove it"),
        ({"path": "x", "hub_split": "test"}, ": hub_split is not used where path has no {split} in it; remove it"),
        ({"path": "x", "quoting": "none"}, ": quoting is only used with kind table; remove it"),
        (
            {"kind": "xnli", "path": "x", "columns": {"id": "key"}},
            f": columns is only used with kind {TABLES}; remove it",
        ),
        ({"kind": "table", "path": "x", "revision": "v1"}, f": revision is only used with kind {ON_HUB}; remove it"),
        (
            {"kind": "table", "path": "x", "subsets": {"en": "all_en"}},
            ": subsets is only used with kind huggingface; remove it",
        ),
        ({"kind": "huggingface", "path": "x", "num_groups": 5}, ": num_groups is only used with kind demo; remove it"),
        ({"kind": "demo", "path": "x"}, f": path is only used with kind {TABLES} or {PUBLISHED}; remove it"),
    ],
)
def test_inputs_that_no_kind_reads_are_refused_with_the_config(wrong: Record, message: str) -> None:
    for number, inputs in enumerate(([wrong], [{"path": "fine", "split": "test"}, wrong])):
        with pytest.raises(UserError) as caught:
            load(*inputs)
        assert str(caught.value) == f"run.yaml: data.inputs.{number}{message}"


def test_a_default_that_is_spelled_out_is_no_foreign_setting() -> None:
    """A resolved config names every setting of every input."""
    load({"path": "x", "num_groups": 1000, "hub_split": None, "subsets": {}, "columns": {"id": "id"}, "split": "test"})
    load({"kind": "demo", "path": "", "columns": {}})


def test_prepare_refuses_such_inputs_too() -> None:
    with pytest.raises(UserError, match=r"^data\.inputs\.0\.kind: 'x' is not known"):
        prepare(make_config([{"kind": "x", "split": "test"}]), Path("run/data"))
    with pytest.raises(UserError, match=r"^data\.inputs\.0: num_groups is only used with kind demo; remove it$"):
        prepare(make_config([{"path": "x", "num_groups": 5, "split": "test"}]), Path("run/data"))
    assert not Path("run/data").exists()


# --- JSONL, and files in general -----------------------------------------------------------------------------------


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


def test_demo() -> None:
    task = {"fields": ["premise", "hypothesis"], "template": "{premise} {hypothesis}"}
    task |= {"labels": ["entailment", "neutral", "contradiction"]}
    config = make_config([{"kind": "demo", "num_groups": 30}], task, splits={"labeled": 12, "test": 6})
    prepare(config, Path("run/data"))
    groups = read_back("labeled")
    assert len(groups) == 12
    assert {"en", "de", "zh"} <= set(groups[0].texts)
    assert fingerprint_of(config)["sources"] != fingerprint_of(config.model_copy(update={"seed": 1}))["sources"]


def test_patterns_reach_every_depth_and_directories_are_named() -> None:
    for number, folder in enumerate(("d", "d/x", "d/x/y")):
        Path(folder).mkdir()
        write_jsonl(f"{folder}/{number}.jsonl", [record(number)])
    prepare(make_config([{"path": "d/**/*.jsonl", "split": "test"}]), Path("run/data"))
    assert set(by_key("test")) == {"g0", "g1", "g2"}
    with pytest.raises(UserError, match=r"data.inputs.path: d: is a directory; name its files, such as d/\*.jsonl"):
        prepare(make_config([{"path": "d", "split": "test"}]), Path("run/other"))


def test_missing_input_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.inputs\.path: none-\*\.jsonl: no such file"):
        prepare(make_config([{"path": "none-*.jsonl", "split": "test"}]), Path("run/data"))


@pytest.mark.parametrize("data", [gzip.compress(b'{"id": 1}\n' * 1000)[:-20], b"not gzip"], ids=["cut", "no gzip"])
def test_unreadable_gzip(data: bytes) -> None:
    Path("a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read \(.*\); restore the file"):
        prepare(make_config([{"path": "a.jsonl.gz", "split": "test"}], on_bad="skip"), Path("run/data"))


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


def test_blanks_around_an_id_are_none_of_it() -> None:
    """As a spreadsheet leaves them: without this the row would be a group of its own in one language."""
    assert [key_of(value) for value in (" g1", "g1\t", "g1", "  ", 7, 7.0)] == ["g1", "g1", "g1", None, "7", "7"]
