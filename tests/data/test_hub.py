"""Hugging Face datasets from local paths as stage prepare reads them: saved ones, folders, subsets, and no network."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from data.preparing import EXPECTED, LONG_FORM, Record, by_key, make_config, problems, write_jsonl

from alsace_dist.errors import UserError
from alsace_dist.files.shards import open_dataset, read_shard
from alsace_dist.stages.prepare import fingerprint_of, prepare


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    files = [path for path in fingerprint_of(config)["sources"] if path.endswith(".arrow")]
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
    expected = {key: replace(group, key=key) for key, group in zip(keys, EXPECTED.values(), strict=True)}
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
    assert fingerprint_of(config)["sources"]["hub nobody/nothing v1"] == {"name": "nobody/nothing", "revision": "v1"}


def test_code_in_a_dataset_folder_is_not_run(cache: None) -> None:
    Path("folder").mkdir()
    Path("folder/folder.py").write_text("import pathlib\npathlib.Path('executed').touch()\n", encoding="utf-8")
    with pytest.raises(UserError, match="folder: cannot be loaded"):
        prepare(make_config([{"kind": "huggingface", "path": "folder", "split": "test"}]), Path("run/data"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("path", ["json", "text", "parquet", "nothing", "missing/folder/here", "a b/c", "data/*.jsonl"])
def test_a_path_that_names_no_dataset_is_said_before_anything_is_loaded(cache: None, path: str) -> None:
    write_jsonl("theirs.json", [{"id": 1, "language": "en", "label": "good", "text": "x"}])
    with pytest.raises(UserError, match=r"no such file or folder, and no name on the hub, which is owner/name"):
        prepare(make_config([{"kind": "huggingface", "path": path, "split": "test"}]), Path("run/data"))


def test_a_split_that_is_not_there_is_said_with_those_that_are(cache: None) -> None:
    save_dataset("saved", LONG_FORM | {"label": ["good", None, "bad", "bad"]})
    source = {"kind": "huggingface", "path": "saved", "hub_split": "dev", "split": "test"}
    with pytest.raises(UserError, match="saved: has no split 'dev'; set hub_split to one of validation"):
        prepare(make_config([source]), Path("run/data"))


def test_a_hub_that_cannot_be_reached_is_asked_once(
    cache: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    source = {"kind": "huggingface", "path": "nobody/nothing", "split": "test"}
    begin = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing: cannot be loaded"):
        prepare(make_config([source]), Path("run/data"))
    assert time.monotonic() - begin < 10
    assert "Retry" not in capfd.readouterr().err
