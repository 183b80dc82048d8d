"""What this program has not marked is somebody else's: neither written over nor deleted."""

import re
from pathlib import Path

import pytest

from alsace_dist.errors import UserError
from alsace_dist.files import manifest


@pytest.mark.parametrize("name", ["000099.tar", "model/model.safetensors", "notes.txt", ".hidden"])
def test_a_file_without_our_mark_beside_it_is_refused_by_name_and_kept(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "stage" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    with pytest.raises(UserError, match="move it away, or choose another run_dir") as caught:
        manifest.begin(tmp_path / "stage", "finetune", {"a": 1})
    assert name.split("/")[0] in str(caught.value)
    assert theirs.read_text() == "theirs"
    assert not (tmp_path / "stage" / manifest.STARTED).exists()


def test_a_mark_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / manifest.MANIFEST).write_text('{"name": "a browser extension"}')
    with pytest.raises(UserError, match=manifest.MANIFEST):
        manifest.begin(tmp_path, "finetune", {})
    assert "browser" in (tmp_path / manifest.MANIFEST).read_text()


def test_a_link_is_refused_even_beside_our_mark_and_its_target_stays(tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.mkdir()
    stage = tmp_path / "stage"
    manifest.begin(stage, "finetune", {})
    (stage / "model").symlink_to(target)
    with pytest.raises(UserError, match="is a link to another place"):
        manifest.claim(stage)
    assert list(target.iterdir()) == []


def test_a_file_where_the_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stage").write_text("theirs")
    with pytest.raises(UserError, match="is no directory"):
        manifest.claim(tmp_path / "stage")


def test_an_empty_a_missing_and_a_begun_directory_are_ours(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        manifest.begin(tmp_path / name, "finetune", {})
        (tmp_path / name / "partial.bin").write_text("ours")
        manifest.claim(tmp_path / name)  # raises where a directory is not the project's
        assert (tmp_path / name / "partial.bin").read_text() == "ours"


def test_a_temporary_file_of_a_killed_write_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".started.json.ab_c1234.tmp").write_text("")
    manifest.claim(tmp_path)


def test_only_files_that_bear_our_names_are_removed_and_a_directory_with_others_stays(tmp_path: Path) -> None:
    ours = [manifest.MANIFEST, "rank00001-00000.safetensors", ".rank00001-00000.safetensors.a8_c3x0z.tmp"]
    theirs = ["notes.txt", "rank00001-00000.safetensors.bak", ".mine.tmp"]
    for name in ours + theirs:
        (tmp_path / name).write_text("")
    (tmp_path / "rank00002-00000.safetensors").mkdir()
    names = re.compile(r"rank\d{5}-\d{5}\.safetensors")
    manifest.remove_own(tmp_path, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "rank00002-00000.safetensors"])
    (tmp_path / "empty").mkdir()
    manifest.remove_own(tmp_path / "empty", names)
    manifest.remove_own(tmp_path / "missing", names)
    assert not (tmp_path / "empty").exists()
