"""benchmarks/operations.py: what ``alsace plan`` takes for granted of a pass is what the benchmark counts."""

import subprocess
import sys
from pathlib import Path

from alsace_dist.plan import assumptions

BENCHMARK = Path(__file__).parents[2] / "benchmarks/operations.py"


def test_the_plan_takes_for_granted_what_is_counted() -> None:
    found = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True, timeout=300, check=True)
    rows = [line.split() for line in found.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [name for name in ("mt5-large", "mt5-xl", "mt5-xxl") for _ in range(2)]
    for row, plain in zip(rows[::2], rows[1::2], strict=True):
        forward, backward, kernels, _, moved, _, _, *moved_per_byte = map(float, row[2:])
        assert (forward, backward) == (assumptions.FORWARD_OPERATIONS, assumptions.BACKWARD_OPERATIONS)
        per_byte = assumptions.TRAFFIC_PER_KEPT_BYTE
        assert abs(moved_per_byte[0] - per_byte) < 0.25 and abs(moved_per_byte[1] - 2 * per_byte) < 0.25
        # Norms in one kernel take fewer kernels, and move half as much, as transformers' own.
        assert kernels < 0.7 * float(plain[4]) and moved < 0.6 * float(plain[6])
