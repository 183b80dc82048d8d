"""Scalars reach trackio, Weights & Biases and MLflow, real ones on this disk; one that is not there is said at once."""

import json
import os
import platform
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import tiny

from alsace_dist.errors import EXIT_USER_ERROR

WRITES = """
import sys
from pathlib import Path
from alsace_dist.monitor.sinks import Places, ScalarWriter
from alsace_dist.monitor.trackers import Tracker
directory, tracker = Path(sys.argv[1]), Tracker(sys.argv[2], "alsace", "run/finetune")
last = {0: 3, 2: 4}
for first in (0, 2):  # the first is killed after step 3, the second goes on after step 2
    writer = ScalarWriter(Places(directory, directory / "board", tracker), first, is_main=True)
    for step in range(first + 1, last[first] + 1):
        writer.write(step, {"loss": 1 / step, "agreement_of/sw": 0.5})
    writer.close()
"""
WRITTEN = {step: {"train/loss": 1 / step, "agreement_of/sw": 0.5} for step in (1, 2, 3, 4)}


def write(directory: Path, kind: str, **variables: str) -> None:
    """Two starts of a training, which a tracker hears of, without a word."""
    command = [sys.executable, "-c", WRITES, str(directory / "run"), kind]
    environment = os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stdout == "" and "warning" not in done.stderr


def test_trackio_has_every_step_once_under_the_tags_of_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {"run/finetune"} and len(rows) == 4
    assert {step: json.loads(metrics) for _, step, metrics in rows} == WRITTEN


def test_mlflow_has_every_step_once_in_one_run(tmp_path: Path) -> None:
    # "METRIC": "TIME VALUE STEP" a line
    write(tmp_path, "mlflow", MLFLOW_TRACKING_URI=(tmp_path / "ml").as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    (name,) = (tmp_path / "ml").rglob("mlflow.runName")
    assert name.read_text() == "run/finetune"
    metrics = name.parents[1] / "metrics"
    found: dict[int, dict[str, float]] = {}
    lines = [(path, line.split()) for path in metrics.rglob("*") if path.is_file() for line in path.open()]
    for path, (_, value, step) in lines:
        found.setdefault(int(step), {})[path.relative_to(metrics).as_posix()] = float(value)
    assert len(lines) == 8 and found == WRITTEN


def test_wandb_has_every_step_once_in_one_run_and_nothing_of_the_machine(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    (tmp_path / "wandb").mkdir()
    write(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), A_SECRET="xyzzy-key")
    rows, ids = [], set()
    for log in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        data, position = log.read_bytes(), 7  # after the head; each record: checksum, length, kind, and itself
        for private in (b"xyzzy-key", platform.node().encode(), str(tmp_path).encode(), sys.executable.encode()):
            assert private not in data
        while position < len(data):
            _, length, kind = struct.unpack_from("<IHB", data, position)
            assert kind == 1, "a whole record"
            record = wandb_internal_pb2.Record.FromString(data[position + 7 : position + 7 + length])
            position += 7 + length
            if record.HasField("run"):
                ids.add((record.run.project, record.run.run_id, record.run.display_name))
            if record.HasField("history"):
                rows.append({"/".join(one.nested_key) or one.key: one.value_json for one in record.history.item})
    assert ids == {("alsace", "run-finetune", "run/finetune")}
    found = {int(row["_step"]): {key: json.loads(value) for key, value in row.items() if key[0] != "_"} for row in rows}
    assert len(rows) == 4 and found == WRITTEN


def test_a_tracker_that_is_not_installed_is_said_at_once(world: Path, tmp_path: Path) -> None:
    (tmp_path / "without/wandb").mkdir(parents=True)
    (tmp_path / "without/wandb/__init__.py").write_text("raise ModuleNotFoundError('as if it were not there')\n")
    environment = tiny.environment()
    environment["PYTHONPATH"] = f"{tmp_path / 'without'}{os.pathsep}{environment['PYTHONPATH']}"
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data, monitor={"tracker": "wandb"})
    command = [sys.executable, "-m", "alsace_dist", "finetune", str(tiny.write_config(tmp_path / "c.yaml", value))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "monitor.tracker: wandb is not installed; `pip install wandb`" in done.stderr.splitlines()[-1]
