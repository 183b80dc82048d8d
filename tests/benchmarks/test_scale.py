"""The benchmark of memory at scale, at its smallest size."""

import re
import subprocess
import sys
from pathlib import Path

import tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks/scale.py"


def test_the_smallest_size_keeps_its_bound_and_is_exported_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--sizes=tiny", f"--directory={tmp_path}"],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = re.search(r"\| tiny \| score \| \d+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", done.stdout)
    assert row and 0.1 < float(row[1]) <= float(row[2]) < 1.1 and float(row[1]) <= float(row[3])
    assert re.search(r"\| tiny \| distill \| \d+ \|  \|  \| [\d.]+ \|", done.stdout), done.stdout
    assert "exported: " in done.stdout
    assert len(list((tmp_path / "tiny/model").glob("*.safetensors"))) > 1  # several files, as large ones have
