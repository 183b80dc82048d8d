"""Runs on the Slurm that the tests here share: how one is made and submitted, and what it leaves."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml

SITE = Path(__file__).parents[2] / "slurm/clusters/local-test.yaml"


def make_run(world: Path, directory: Path, **sections: Any) -> Path:
    """A config over the small world's prepared data: one rank per node, many small steps."""
    sections = {"engine": {"num_processes": 1}, "data": {"directory": str(world / "run/data")}} | sections
    config = tiny.make_config(world, run_dir=str(directory / "run"), **sections)
    return tiny.write_config(directory / "config.yaml", config)


def submit(config: Path, *flags: str, site: Path = SITE) -> dict[str, str]:
    """Submit; job name -> id."""
    tiny.alsace("submit", str(config), f"--cluster={site}", *flags)
    jobs = json.loads((config.parent / "run/slurm/jobs.json").read_text())["jobs"]
    return {job["name"]: job["job_id"] for job in jobs}


def site(directory: Path, **changes: Any) -> Path:
    """The test cluster's profile with other values."""
    path = directory / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SITE.read_text()) | changes))
    return path


def wrap(monkeypatch: pytest.MonkeyPatch, directory: Path, before: str, after: str = "") -> None:
    """Let commands of this test find an sbatch that does something before, and something else after its own work."""
    own = shutil.which("sbatch")
    (directory / "tools").mkdir(exist_ok=True)
    program = directory / "tools/sbatch"
    program.write_text(f'#!/bin/bash\n{before}\n{own} "$@"\nstatus=$?\n{after}\nexit $status\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}/tools:{os.environ['PATH']}")


def log(directory: Path, name: str) -> str:
    """What a job has said so far, over all its starts."""
    (path,) = (directory / "run/slurm/logs").glob(f"*-{name}.log")
    return path.read_text()


# Long enough to be stopped in the middle of, short enough to wait for.
LONG = {"num_steps": 120, "checkpoint_every_steps": 5, "log_every_steps": 1}


def losses(directory: Path) -> list[tuple[int, float]]:
    rows = (directory / "run/finetune/metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, rows)]


def scores(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("run/scores/*/*.parquet")}


def rank_of(node: str) -> psutil.Process:
    """The rank of this test's run on a node: the newest process with both in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if (
            environment.get("SLURMD_NODENAME") == node
            and "RANK" in environment
            and environment.get("ALSACE_ATTEMPT_DIR", "").startswith(str(Path.cwd()))
        ):
            found.append(process)
    return max(found, key=lambda process: process.create_time())
