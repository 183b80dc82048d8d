"""The cost of watching is read of a run's own lines."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_share_outside_a_steps_parts_is_what_is_left(tmp_path: Path) -> None:
    parts = {"data_seconds": 0.01, "forward_seconds": 0.2, "backward_seconds": 0.5, "optimizer_seconds": 0.06}
    parts["communication_seconds"] = 0.04
    rows = [{"step": step, "step_seconds": 0.9, **parts} for step in (1, 2, 3)]
    (tmp_path / "run/finetune").mkdir(parents=True)
    (tmp_path / "run/finetune/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "benchmarks/monitor_cost.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "| run/finetune | 900.0 | 10.0% |" in done.stdout.splitlines()
    assert "observing 64 rows: " in done.stdout and "timing a phase with 100 collectives: " in done.stdout
