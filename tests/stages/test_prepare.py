"""Prepare: every kind of bad record, splits, and what is written. Kinds of input are tested in tests/data."""

import json
import resource
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.preparing import MANY, Record, by_key, make_config, problems, record, write_jsonl

from alsace_dist import pipeline, runner
from alsace_dist.config import Config
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import begin, is_complete, load_manifest, verify_files
from alsace_dist.files.shards import ParallelGroup, open_dataset, read_shard
from alsace_dist.stages import prepare as prepare_module
from alsace_dist.stages.base import Output, Stage
from alsace_dist.stages.prepare import fingerprint_of, prepare


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    assert "mend those listed in run/bad-records.txt, or use --data.on_bad=skip; where ids" in str(caught.value)
    assert not Path("run/data").exists()


@pytest.mark.parametrize("by_config", [False, True])
def test_bad_lines_can_be_skipped_and_are_counted(by_config: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As the config says, or as the command line says over it: the remedy that the error names."""
    write_jsonl("a.jsonl", BAD_LINES)
    on_bad = "skip" if by_config else "stop"
    config = make_config([{"path": "a.jsonl", "split": "test"}], on_bad=on_bad, max_skipped=1.0)
    value = config.model_dump(mode="json", exclude_unset=True)
    Path("run.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    prepare(pipeline.load_run("run.yaml", {} if by_config else {"data.on_bad": "skip"}), Path("run/data"))
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
    assert capsys.readouterr().err.splitlines()[0].startswith("bad records left out: 3 broken JSON, 1 duplicate id")


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


# --- splits --------------------------------------------------------------------------------------------------------


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
    begin(killed, "data", fingerprint_of(config))
    assert not is_complete(killed, "data", fingerprint_of(config))
    for name in ("unlabeled/000000.tar", "test/manifest.json", "test/.000001.tar.a_0x9bcd.tmp"):
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        (killed / name).write_bytes(b"what a killed run left")
    prepare(config, killed)
    assert tree("one/data") == tree("two/data")
    assert is_complete(killed, "data", fingerprint_of(config))
    manifest = load_manifest(killed, "data")
    assert sorted(manifest.files) == ["test/manifest.json", "unlabeled/manifest.json"]
    verify_files(killed, manifest)
    # What a person keeps there is none of a killed run's.
    begin(killed, "data", fingerprint_of(config))
    (killed / "unlabeled/000099.tar").write_bytes(b"theirs")
    prepare(config, killed)
    assert (killed / "unlabeled/000099.tar").read_bytes() == b"theirs"
    keys = [group.key for group in read_shards("one/data/unlabeled")]
    assert keys != sorted(keys)


def read_shards(directory: str) -> list[ParallelGroup]:
    dataset = open_dataset(directory)
    return [group for shard in dataset.shards for group in read_shard(dataset, shard)]


def test_fingerprint_follows_settings_and_content_but_not_on_bad() -> None:
    write_jsonl("a.jsonl", MANY)
    source = {"path": "a.jsonl", "split": "test"}
    base = fingerprint_of(make_config([source]))
    assert json.loads(json.dumps(base)) == base
    assert fingerprint_of(make_config([source], on_bad="skip")) == base
    assert fingerprint_of(make_config([source], seed=1)) != base
    assert fingerprint_of(make_config([source], {"labels": ["bad", "good"]})) != base
    assert fingerprint_of(make_config([source], {"template": "Say: {text}"})) == base
    write_jsonl("a.jsonl", MANY[:-1])
    assert fingerprint_of(make_config([source])) != base


def test_the_stage_is_done_once_and_refused_for_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("a.jsonl", MANY)
    stage = Stage(prepare_module, "prepare", make_config([{"path": "a.jsonl", "split": "test"}]))
    assert (stage.inputs, stage.outputs) == ([], [Output(Path("run/data"), "data")])
    assert stage.state() == "to do"
    runner.run_stage(stage)
    before = tree("run/data")
    assert stage.state() == "complete" and len(by_key("test")) == 100
    runner.run_stage(stage)
    audit = "test: 100 groups in 2 languages, 100 parallel; fewest rows: de (100)"
    assert capsys.readouterr().err.splitlines() == ["prepare", audit, "prepare: complete, skipped"]
    write_jsonl("a.jsonl", MANY[:-1])
    assert stage.state().startswith("refused: run/data: made with other settings (sources.a.jsonl: its content ")
    with pytest.raises(UserError, match=r"made with other settings \(sources\.a\.jsonl: its content has changed"):
        runner.run_stage(stage)
    assert tree("run/data") == before


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
