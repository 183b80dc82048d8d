"""Variables of the environment that people have for programs of their own."""

import os
import subprocess
import sys

import pytest

from alsace_dist import environment


def alsace(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "alsace_dist", *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONWARNINGS", "error"),
        ("PYTHONOPTIMIZE", "2"),
        ("PYTHONINSPECT", "1"),
        ("PYTHONTRACEMALLOC", "5"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"),
        ("DS_ACCELERATOR", "cpu"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "30"),
    ],
)
def test_what_does_no_harm(name: str, value: str) -> None:
    """--help is made of docstrings, which PYTHONOPTIMIZE=2 would take away."""
    done = alsace("score", "--help", **{name: value})
    assert (done.returncode, done.stderr) == (0, "")
    assert "show tracebacks" in done.stdout


@pytest.mark.parametrize("name", environment.OF_LIBRARIES)
def test_what_a_library_would_stumble_over(name: str) -> None:
    done = alsace("plan", "configs/demo.yaml", **{name: "non sense"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name}: is 'non sense' in the environment, where ")
    assert done.stderr.count("\n") == 1
