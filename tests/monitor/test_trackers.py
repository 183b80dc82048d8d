"""Scalars reach trackio, a real one on this disk; a tracker that is not installed is said at once.

Weights & Biases has trackio's interface; MLflow's is another: neither is installed for the tests.
"""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from alsace_dist.errors import EXIT_USER_ERROR

WRITES = """
import sys
from pathlib import Path
from alsace_dist.monitor.sinks import Places, ScalarWriter
from alsace_dist.monitor.trackers import Tracker
directory, tracker = Path(sys.argv[1]), Tracker("trackio", "alsace", "run/finetune")
for first in (0, 2):  # the second goes on after step 2
    writer = ScalarWriter(Places(directory, directory / "board", tracker), first, is_main=True)
    for step in (first + 1, first + 2):
        writer.write(step, {"loss": 1 / step, "agreement_of/sw": 0.5})
    writer.close()
"""


def test_trackio_has_every_step_once_under_the_tags_of_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "" and "warning" not in done.stderr
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("run/finetune", step) for step in (1, 2, 3, 4)]
    assert [json.loads(metrics) for *_, metrics in rows] == [
        {"train/loss": 1 / step, "agreement_of/sw": 0.5} for step in (1, 2, 3, 4)
    ]


def test_a_tracker_that_is_not_installed_is_said_at_once(world: Path, tmp_path: Path) -> None:
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data, monitor={"tracker": "wandb"})
    done = tiny.alsace("finetune", str(tiny.write_config(tmp_path / "c.yaml", value)), check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert "monitor.tracker: wandb is not installed; `pip install wandb`" in done.stderr.splitlines()[-1]
