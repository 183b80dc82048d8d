"""Atomic files and manifests: nothing half-written is taken for whole, and what differs is said."""

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alsace_dist import __version__
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.manifest import (
    MANIFEST,
    STARTED,
    atomic_path,
    begin,
    differences,
    is_complete,
    load_manifest,
    read_json,
    verify_files,
    write_json,
    write_manifest,
    write_text,
)


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


# --- atomic files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()], ids=["full", "interrupted"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_writer_that_fails_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, error: BaseException, old: str | None
) -> None:
    path = tmp_path / "sub" / "file.txt"
    if old is not None:
        write_text(path, old)
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half of the n", encoding="utf-8")
        raise error
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == ([("file.txt", old)] if old else [])


def test_a_full_disk_is_said_with_the_file_that_had_no_room(tmp_path: Path) -> None:
    """The operating system does not say which, nor does Arrow; the temporary name would tell nobody anything."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(OSError, match="No space left on device") as plain, atomic_path(tmp_path / "x") as temporary:
            temporary.write_bytes(bytes(100_000))
        table = pa.table({"x": [bytes(100_000)]})
        with pytest.raises(OSError, match="No space left on device") as arrow, atomic_path(tmp_path / "y") as temporary:
            pq.write_table(table, temporary, compression="none")
        assert [Path(str(found.value.filename)).name for found in (plain, arrow)] == ["x", "y"]
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(FileNotFoundError, match="nowhere"), atomic_path(tmp_path / "z"):
            Path("nowhere").read_text()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_new_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # on the same file system, or the rename would not be atomic
        temporary.write_text("new", encoding="utf-8")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        events.append("sync directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_text(tmp_path / "file", "x")
    assert events == ["sync file", "rename", "sync directory"]


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": [1, 2.5, None], "a": "ü"})
    write_json(tmp_path / "b", {"a": "ü", "b": [1, 2.5, None]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ü" in (tmp_path / "a").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a") == {"a": "ü", "b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", float("nan"))
    assert read_json(tmp_path / "a") == {"a": "ü", "b": [1, 2.5, None]}


def test_unreadable_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(NotReady, match=r"x\.json: no such file; run the stage that writes it first"):
        read_json(path)
    for content, words in (
        (b"{", r"not readable as JSON \(.*\)"),
        (b"\xff", r"no UTF-8 text .*"),
        (b"", "not readable .*"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.json: {words}; (save it as UTF-8, or )?delete its directory"):
            read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"x\.json: is a directory; delete its directory"):
        read_json(path)


# --- manifests -----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete directory with two files."""
    directory = tmp_path / "out"
    begin(directory, "thing", {"seed": 1})
    write_text(directory / "a.txt", "aaa")
    write_text(directory / "sub" / "b.txt", "bb")
    write_manifest(directory, "thing", {"seed": 1}, [directory / "sub" / "b.txt", directory / "a.txt"], {"n": (1, 2)})
    return directory


def test_a_manifest_comes_back_as_it_was_written(directory: Path) -> None:
    manifest = load_manifest(directory, "thing")
    assert manifest.fingerprint == {"seed": 1} and manifest.details == {"n": [1, 2]}
    assert {name: entry["bytes"] for name, entry in manifest.files.items()} == {"a.txt": 3, "sub/b.txt": 2}
    assert manifest.files["a.txt"]["sha256"] == "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"
    again = write_manifest(directory, "thing", {"seed": 1}, [], {"n": (1, 2)}, entries=manifest.files)
    assert again == load_manifest(directory, "thing") == manifest
    assert not (directory / STARTED).exists()
    verify_files(directory, manifest)


def test_the_digest_is_that_of_the_content_and_not_of_the_settings(directory: Path) -> None:
    first = load_manifest(directory, "thing").digest
    files = [directory / "a.txt", directory / "sub" / "b.txt"]
    assert write_manifest(directory, "thing", {"seed": 2}, files, {"n": [1, 2]}).digest == first
    assert write_manifest(directory, "other", {"seed": 1}, files, {"n": [1, 2]}).digest != first
    assert write_manifest(directory, "thing", {"seed": 1}, files, {"n": [1, 3]}).digest != first
    write_text(directory / "a.txt", "aab")
    assert write_manifest(directory, "thing", {"seed": 1}, files, {"n": [1, 2]}).digest != first


def edit(directory: Path, **changes: Any) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_that_cannot_be_used(directory: Path) -> None:
    with pytest.raises(NotReady, match=r"out/sub: not complete \(manifest\.json is missing\); run the stage"):
        load_manifest(directory / "sub", "thing")
    with pytest.raises(UserError, match=r"holds 'thing' where 'scores' is needed; name the right directory"):
        load_manifest(directory, "scores")
    edit(directory, format_version=2)
    with pytest.raises(UserError, match=r"manifest\.json: not of manifest format 1; delete .*out and run its stage"):
        load_manifest(directory, "thing")
    (directory / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: not of manifest format 1"):
        load_manifest(directory, "thing")
    (directory / MANIFEST).write_text('{"format_version": 1, "ki')
    with pytest.raises(UserError, match=r"manifest\.json: not readable as JSON"):
        load_manifest(directory, "thing")


@pytest.mark.parametrize("text", ['{"format_version": 1, "kind": "thing"}', None], ids=["a key less", "a key more"])
def test_manifests_with_other_keys(directory: Path, text: str | None) -> None:
    if text:
        (directory / MANIFEST).write_text(text)
    else:
        edit(directory, more=1)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_manifest(directory, "thing")


def test_files_that_are_not_as_listed(directory: Path) -> None:
    manifest = load_manifest(directory, "thing")
    path = directory / "sub" / "b.txt"
    remedy = r"restore it, or delete .*out and run its stage again$"
    path.write_text("bbb")
    with pytest.raises(UserError, match=rf"sub/b\.txt: 3 bytes where manifest\.json says 2; {remedy}"):
        verify_files(directory, manifest, hashes=False)
    path.write_text("bc")
    verify_files(directory, manifest, hashes=False)
    with pytest.raises(UserError, match=rf"sub/b\.txt: content differs from the sha256 in manifest\.json; {remedy}"):
        verify_files(directory, manifest)
    path.unlink()
    with pytest.raises(UserError, match=rf"sub/b\.txt: missing, though manifest\.json lists it; {remedy}"):
        verify_files(directory, manifest, hashes=False)


# --- whether a stage has to run ------------------------------------------------------------------------------------


def test_nothing_there_begun_and_complete(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    assert not is_complete(directory, "thing", {"seed": 1})
    begin(directory, "thing", {"seed": 1})
    assert not is_complete(directory, "thing", {"seed": 1})
    write_manifest(directory, "thing", {"seed": 1}, [])
    assert is_complete(directory, "thing", {"seed": 1})
    begin(directory, "thing", {"seed": 1})  # as if killed between writing the manifest and removing the mark
    assert is_complete(directory, "thing", {"seed": 1})


@pytest.mark.parametrize("begun_only", [True, False])
def test_another_configuration_is_refused_whether_begun_or_complete(tmp_path: Path, begun_only: bool) -> None:
    directory = tmp_path / "out"
    old = {"section": {"lr": 0.1, "steps": 5}, "seed": 1, "model": {"pretrain": "x" * 100}}
    begin(directory, "thing", old)
    if not begun_only:
        write_manifest(directory, "thing", old, [])
    before = {path: path.read_bytes() for path in directory.iterdir()}
    new = {"section": {"lr": 0.2, "steps": 5, "decay": 0}, "seed": 1, "model": {"pretrain": "y"}}
    with pytest.raises(UserError) as caught:
        is_complete(directory, "thing", new)
    assert str(caught.value) == (
        f'{directory}: made with other settings (model.pretrain: "{"x" * 56}... -> "y"; section.decay: (nothing) -> 0; '
        "section.lr: 0.1 -> 0.2); choose another run_dir, undo the change, or delete that directory"
    )
    with pytest.raises(UserError, match=r"made with other settings \(another kind of stage\)"):
        is_complete(directory, "other", old)
    many = old | {f"k{index}": index for index in range(6)}
    with pytest.raises(UserError, match=r"\(k0: \(nothing\) -> 0; k1: .*; k2: .*; k3: \(nothing\) -> 3; and 2 more\)"):
        is_complete(directory, "thing", many)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_fingerprint_is_compared_as_json(tmp_path: Path) -> None:
    write_manifest(tmp_path, "thing", {"pair": (1, 2)}, [])
    assert is_complete(tmp_path, "thing", {"pair": (1, 2)})
    assert is_complete(tmp_path, "thing", {"pair": [1, 2]})


def test_a_broken_mark_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / STARTED).write_text('{"kind": "th')
    with pytest.raises(UserError, match=r"started\.json: not readable as JSON"):
        is_complete(tmp_path, "thing", {})


@pytest.mark.parametrize("name", [MANIFEST, STARTED])
def test_a_mark_that_is_no_mapping(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=name):
        is_complete(tmp_path, "thing", {})


def test_a_directory_that_lost_a_file_is_not_complete(directory: Path) -> None:
    (directory / "a.txt").unlink()
    try:
        assert not is_complete(directory, "thing", {"seed": 1})
    except UserError as error:
        assert "a.txt: missing" in str(error)


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": "1"}}}, ['a.b.c: 1 -> "1"']),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] -> [2, 1]"]),
        ({"a": {"b": 1}}, {"a": None}, ['a: {"b": 1} -> null']),
        ({"a": "ü"}, {}, ['a: "ü" -> (nothing)']),
        ({"a": None}, {}, ["a: null -> (nothing)"]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a: 1 -> 2", "b: 1 -> 2"]),
    ],
)
def test_differences_name_the_key_and_both_values(old: Any, new: Any, rows: list[str]) -> None:
    assert differences(old, new) == rows


def test_the_code_version_is_part_of_a_manifest(directory: Path) -> None:
    assert load_manifest(directory, "thing").code_version == __version__


def test_of_other_content_people_are_told_which_and_see_no_hashes() -> None:
    old = {"sources": {"a.jsonl": {"bytes": 3, "sha256": "1" * 64}, "b.jsonl": {"sha256": "2" * 64}}, "data": "3" * 64}
    new = {"sources": {"a.jsonl": {"bytes": 4, "sha256": "4" * 64}}, "data": "5" * 64}
    assert differences(old, new) == [
        "data: its content has changed",
        "sources.a.jsonl: its content has changed",
        "sources.b.jsonl: (some content) -> (nothing)",
    ]
