"""benchmarks/compiled.py, for real in small: compiled blocks compute what the plain ones do."""

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks/compiled.py"


def test_compiled_blocks_give_the_same_scores_and_are_timed() -> None:
    flags = ["--size=tiny", "--layers=1", "--dtype=fp32", "--blocks=1", "--only=scoring"]
    found = subprocess.run([sys.executable, BENCHMARK, *flags], capture_output=True, text=True, timeout=300, check=True)
    differences, order, times = found.stdout.splitlines()
    (most,) = re.findall(r"differ by (\S+) at most", differences)
    assert 0 < float(most) < 1e-5  # what is compiled rounds otherwise
    assert order.endswith("of them are other numbers")
    assert re.fullmatch(r"scoring: plain \S+ s, compiled \S+ s, ratio \S+ \(\S+ to \S+\); the first .* s", times)
