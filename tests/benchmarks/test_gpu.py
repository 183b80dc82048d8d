"""benchmarks/gpu.py, for real in small on the CPU: what it prints and writes, and what it says where it cannot run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alsace_dist.models.mt5 import MT5

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# It must run where little more is installed than torch, transformers and DeepSpeed.
NOT_NEEDED = ("webdataset", "pyarrow", "tensorboard", "rich", "datasets", "fire", "pandas", "scipy")


def run(*arguments: str, blocked: tuple[str, ...] = NOT_NEEDED, before: str = "") -> "subprocess.CompletedProcess[str]":
    """The benchmark on the CPU, where some modules cannot be imported; ``before``: Python to run first."""
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({blocked!r}))
sys.argv[0] = {str(BENCHMARKS / "gpu.py")!r}
sys.path.insert(0, {str(BENCHMARKS)!r})
{before}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_work

    geometry = gpu_work.SIZES["tiny"].geometry | {"num_layers": 3, "num_decoder_layers": 2}
    size = gpu_work.Size(geometry, gpu_work.SIZES["tiny"].section)
    weights = gpu_work.RandomWeights(size, torch.device("cpu"))
    module = weights.build(0.0, False)
    batch, length, width = 5, 7, geometry["d_model"]
    prompts = [gpu_work.encoded([4] * length)] * batch
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        module(*gpu_work.collate(prompts).to(torch.device("cpu")))
    head = 2 * batch * width * len(gpu_work.CANDIDATES)  # which the formula leaves out
    assert counted.get_total_flops() - head == MT5.forward_flops(size.config, [length] * batch, 2)


def test_a_tiny_run_checks_measures_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "gpu.json"
    done = run("--size=tiny", f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["device"].startswith("CPU") and report["peak_flops"] is None and report["notes"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["checks"]) == 16 and all(row["good"] for row in report["checks"])
    bf16 = [row["difference"] for row in report["checks"] if row["what"].startswith("bf16")]
    assert min(bf16) > 0  # it did compute in bf16
    scoring, training, adapters = report["rows"]
    assert [scoring["part"], training["part"]] == ["score tiny", "train tiny"] and "ZeRO-1" in training["settings"]
    assert adapters["part"] == "train tiny, adapters" and adapters["settings"].endswith("LoRA of rank 16")
    assert adapters["flops_per_sequence"] == pytest.approx(training["flops_per_sequence"] * 2 / 3)
    for row in report["rows"]:
        pairs = list(zip(row["rates"]["ours"], row["rates"]["bare"], strict=True))
        assert len(pairs) == 2
        ratios = [ours / bare for ours, bare in pairs]
        assert [row["ratio_min"], row["ratio_max"]] == [min(ratios), max(ratios)]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)
        assert row["tokens_per_second"] == pytest.approx(row["sequences_per_second"] * row["tokens_per_sequence"])
        assert 0 < row["collating_share"] < 1 and row["plan_bytes"] > 0 and row["plan_activation_bytes"] > 0
        assert row["mfu"] is row["states_bytes"] is row["peak_bytes"]["ours"] is row["peak_bytes"]["bare"] is None
    lines = done.stdout.splitlines()
    assert lines[0].startswith(report["device"]) and "deepspeed" in lines[0]
    assert sum(line.endswith("| good |") for line in lines) == 16
    header = next(line for line in lines if line.startswith("| part |")).split("|")
    cells = next(line for line in lines if line.startswith("| train tiny |")).split("|")
    assert len(header) == len(cells)
    shown = {name.strip(): cell.strip() for name, cell in zip(header, cells, strict=True)}
    assert shown["MFU"] == shown["states GB"] == shown["peak GB"] == "-"
    assert float(shown["sequences/s"].replace(",", "")) == pytest.approx(training["sequences_per_second"], rel=0.01)
    assert any(line.startswith("Every part at 95% of the bare loop's speed or more: ") for line in lines)


def test_wrong_numbers_fail_and_without_deepspeed_the_rest_is_measured(tmp_path: Path) -> None:
    """Here bf16 log-probabilities are made wrong by 0.2."""
    wrong = """
import gpu_work
right = gpu_work.log_probs
def log_probs(module, *others):
    return right(module, *others) + 0.2 * (module.head.weight.element_size() == 2)
gpu_work.log_probs = log_probs
"""
    out = tmp_path / "gpu.json"
    done = run("--size=tiny", f"--out={out}", blocked=("deepspeed",), before=wrong)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    report = json.loads(out.read_text())
    assert [row["good"] for row in report["checks"]] == [True, False]
    assert done.stdout.count("| FAILED |") == 1
    assert len(report["notes"]) == 1 and report["notes"][0].startswith("DeepSpeed cannot be used (ModuleNotFoundError")
    scoring, training = report["rows"]
    assert scoring["ratio"] > 0
    assert training["ratio"] is None and training["rates"].keys() == {"bare"} and "ZeRO" not in training["settings"]


def test_large_models_need_a_gpu() -> None:
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks/gpu.py: there is no GPU here, and without one only --size=tiny runs\n"


def test_a_part_that_fails_or_comes_too_late_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def fail() -> None:
        raise torch.OutOfMemoryError("no memory\nfor this")

    def finish() -> gpu.Row:
        row = gpu.Row("score xl", "", 100, 50.0, 2e12, 6_000_000_000, states_bytes=7_000_000_000, collating_seconds=0.1)
        row.plan_activation_bytes = 1_500_000_000
        row.rates = {"ours": [90.0, 110.0, 100.0], "bare": [100.0, 100.0, 125.0]}
        row.peak_bytes = {"ours": 8_000_000_000, "bare": 9_000_000_000}
        return row

    report: dict[str, Any] = {"peak_flops": 1e15, "checks": [], "rows": [], "notes": []}
    later = time.monotonic() + 100
    assert not gpu.measure([("one", fail), ("two", finish)], report, later, tmp_path / "out.json")
    assert gpu.measure([("three", finish)], report, 0.0, None)  # too late
    assert report["notes"] == ["one: failed: OutOfMemoryError: no memory", "three: not started, the time limit is over"]
    assert "no memory" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == report["rows"]
    cells = [cell.strip() for cell in gpu.table(report["rows"]).splitlines()[2].split("|")[1:-1]]
    speed = ["100", "5,000", "20.0%", "100", "90.0% 80.0% 110.0%", "10.0%"]
    assert cells == ["score xl", "", *speed, "6.00", "7.00", "7.50", "8.00", "9.00"]
