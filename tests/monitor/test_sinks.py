"""Scalars reach their files and TensorBoard, and a place that cannot be written ends no run."""

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alsace_dist.errors import UserError
from alsace_dist.monitor import board as board_log
from alsace_dist.monitor.sinks import METRICS, Places, ScalarWriter, read_scalars


def board(directory: Path) -> list[tuple[int, float]]:
    """The losses that TensorBoard shows."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars("train/loss")]


def test_every_step_is_there_once_after_a_start_that_goes_on(tmp_path: Path) -> None:
    for first, last in ((0, 7), (4, 10)):  # the second goes on from a checkpoint after step 4
        writer = ScalarWriter(Places(tmp_path, tmp_path / "board"), first, is_main=True)
        for step in range(first + 1, last):
            writer.write(step, {"loss": first + step / 100})
        writer.close()
    expected = [(step, (0 if step <= 4 else 4) + step / 100) for step in range(1, 10)]
    assert [(row["step"], row["loss"]) for row in read_scalars(tmp_path / METRICS)] == expected
    assert board(tmp_path / "board") == expected


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = ScalarWriter(Places(tmp_path / "x", tmp_path / "board"), 0, is_main=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_scalar_that_the_table_lacks_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"):
        ScalarWriter(Places(tmp_path, tmp_path), 0, is_main=False).write(1, {"lost": 1.0})


def test_a_full_disk_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Either place is said once; with room again the next start goes on with what is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        writer = ScalarWriter(Places(disk, disk / "board"), 0, is_main=True)
        for step in range(1, 4000):
            writer.write(step, {"loss": 1 / step, "learning_rate": 1e-5})
        writer.close()
        lines = capfd.readouterr().err.splitlines()
        assert sorted(lines) == [
            f"warning: {place}: cannot be written (No space left on device); the run goes on, and logs nothing there "
            "until it is started again"
            for place in (disk / "board", disk / METRICS)
        ]
        num_kept = len(read_scalars(disk / METRICS))
        assert 100 < num_kept < 3999
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        writer = ScalarWriter(Places(disk, disk / "board"), num_kept, is_main=True)
        writer.write(num_kept + 1, {"loss": 2.0})
        writer.close()
        assert [row["step"] for row in read_scalars(disk / METRICS)] == list(range(1, num_kept + 2))
        assert capfd.readouterr().err == ""
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_is_gone_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Somebody deletes TensorBoard's logs to make room; the lines go on."""
    writer = ScalarWriter(Places(tmp_path, tmp_path / "board"), 0, is_main=True)
    writer.write(1, {"loss": 1.0})
    while (tmp_path / "board").exists():  # its thread may write meanwhile
        shutil.rmtree(tmp_path / "board", ignore_errors=True)
    for step in (2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    said = capfd.readouterr().err
    assert said == "" or (said.count("warning: ") == 1 and str(tmp_path / "board") in said)
    assert [row["step"] for row in read_scalars(tmp_path / METRICS)] == [1, 2, 3]


def test_a_file_that_was_removed_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = ScalarWriter(Places(tmp_path, tmp_path / "board"), 0, is_main=True)
    writer.write(1, {"loss": 0.5})
    (tmp_path / METRICS).unlink()
    for step in (2, 3):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert capfd.readouterr().err.count(f"warning: {tmp_path / METRICS}: cannot be written (No such file") == 1


def test_a_place_that_can_never_be_written_is_said_and_nothing_else_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board").write_text("a file where TensorBoard wants a directory")
    writer = ScalarWriter(Places(tmp_path, tmp_path / "board"), 0, is_main=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "board: cannot be written (File exists)" in capfd.readouterr().err
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 1, "loss": 1.0}


def test_a_file_that_no_stage_wrote_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("somebody's notes\nand more\n")
    with pytest.raises(UserError, match="it is not what a stage writes"):
        ScalarWriter(Places(tmp_path, tmp_path / "board"), 0, is_main=True)
    assert (tmp_path / METRICS).read_text() == "somebody's notes\nand more\n"


def test_errors_of_other_threads_are_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    board_log._say_once.__wrapped__()
    args = threading.ExceptHookArgs((ValueError, ValueError("mine"), None, threading.current_thread()))
    threading.excepthook(args)
    assert shown == [args]
