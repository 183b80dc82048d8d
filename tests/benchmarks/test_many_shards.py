"""The benchmark of many shards, with few of them."""

import re
import subprocess
import sys
from pathlib import Path

import tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks/many_shards.py"


def test_every_step_is_measured(tmp_path: Path) -> None:
    sizes = ["--shards=6", "--groups-per-shard=5", "--languages=3", "--ranks=2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, f"--directory={tmp_path}"],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("6 shards, 90 rows, 2 ranks;")
    rows = re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows][:2] == ["nothing", "open the dataset"] and rows[-1][0] == "select"
    assert len(rows) == 9
    assert all(20 < int(peak) < 1000 and float(cpu) < 60 for _, _, cpu, peak in rows)
    assert not list(tmp_path.glob("*/*"))  # what was generated is gone
