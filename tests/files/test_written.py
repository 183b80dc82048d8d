"""What is listed of files in a directory that is not complete, and copies that a disk has no room for."""

from pathlib import Path

import pytest
import tiny

from alsace_dist.files import manifest
from alsace_dist.files.written import Written, drop, merged, take_over


def test_a_later_start_finds_whole_what_is_as_any_rank_has_written_it(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for rank, file in enumerate(files[:2]):
        file.write_text(file.name)
        Written(tmp_path, rank).add(file)
    files[2].write_text("listed by nobody")
    later = Written(tmp_path, 5)
    assert [later.is_whole(file) for file in (*files, tmp_path / "d")] == [True, True, False, False]
    assert later.entries == {file.name: manifest.file_entry(file) for file in files[:2]}
    files[0].write_text("b")  # of the same size
    assert not Written(tmp_path, 5).is_whole(files[0])
    later.add(files[0])  # made anew: otherwise than before, as an accelerator may
    assert Written(tmp_path, 0).is_whole(files[0])
    assert merged([{"x": later.entries["a"]}, {"y": later.entries["b"]}]).keys() == {"x", "y"}


def test_lists_are_cut_off_taken_over_and_dropped(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("a")
    Written(tmp_path, 1).add(file)
    listed = tmp_path / "written-00001.jsonl"
    listed.write_bytes(listed.read_bytes()[:-9])  # the node has died
    assert not Written(tmp_path, 1).is_whole(file)
    take_over(tmp_path, {"a": manifest.file_entry(file)})
    assert Written(tmp_path, 1).is_whole(file)
    (tmp_path / "written-by-me.jsonl").write_text("a person's")
    drop(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "written-by-me.jsonl"]


def test_a_copy_without_room_is_named_and_not_its_source(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(5000))
    with tiny.no_room(1000), pytest.raises(OSError, match="File too large") as caught:
        manifest.copy_file(tmp_path / "source", tmp_path / "copy")
    assert caught.value.filename == str(tmp_path / "copy")
    manifest.copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(5000)
