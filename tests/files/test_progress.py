"""progress.json: what is written comes back, whatever cannot be read is no progress, and a full disk is no error."""

from pathlib import Path

import pytest

from alsace_dist.files.progress import PROGRESS, Progress, clear_progress, read_progress, write_progress


@pytest.mark.parametrize(
    "progress",
    [Progress(done=0, total=12, eta_seconds=None), Progress(done=5, total=12, eta_seconds=0.1 + 0.2)],
    ids=["at the start", "under way"],
)
def test_what_is_written_comes_back(tmp_path: Path, progress: Progress) -> None:
    write_progress(tmp_path / "stage", progress)
    assert read_progress(tmp_path / "stage") == progress
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [PROGRESS]


def test_the_last_one_counts_until_it_is_cleared(tmp_path: Path) -> None:
    for done in range(3):
        write_progress(tmp_path, Progress(done=done, total=3, eta_seconds=None))
    found = read_progress(tmp_path)
    assert found is not None and found.done == 2
    clear_progress(tmp_path)
    assert read_progress(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    clear_progress(tmp_path)  # as a stage does that found nothing to do
    assert read_progress(tmp_path / "never-begun") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"done": 1, "tot',
        "[]",
        "null",
        "{}",
        '{"done": 1, "total": 2}',
        '{"done": "one", "total": 2, "eta_seconds": null}',
        '{"done": 1, "total": 2, "eta_seconds": NaN}',
        '{"done": 1, "total": 2, "eta_seconds": null, "more": 1}',
    ],
)
def test_what_cannot_be_read_is_no_progress(tmp_path: Path, text: str) -> None:
    """Status is for people who wonder how a run is: a file that is not what it should be must not keep it from them."""
    (tmp_path / PROGRESS).write_text(text, encoding="utf-8")
    assert read_progress(tmp_path) is None


def test_bytes_that_are_no_text_and_a_directory_are_no_progress(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_bytes(b"\xff\xfe")
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS).unlink()
    (tmp_path / PROGRESS).mkdir()
    assert read_progress(tmp_path) is None


def test_a_disk_that_takes_nothing_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the stage's directory should be")
    write_progress(tmp_path / "file", Progress(done=1, total=2, eta_seconds=None))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
