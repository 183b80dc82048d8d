"""Runs on a real Slurm: submitted, stopped, requeued, killed, and finished with the results of an undisturbed run."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
from local_slurm import LocalSlurm

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


def log(directory: Path, name: str) -> str:
    (path,) = (directory / "run/slurm/logs").glob(f"*-{name}.log")
    return path.read_text()


def losses(directory: Path) -> list[tuple[int, float]]:
    rows = (directory / "run/finetune/metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, rows)]


def scores(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("run/scores/*/*.parquet")}


def rank_of(node: str) -> psutil.Process:
    """The rank that runs on a node: the newest process of ours with its name in the environment."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get("SLURMD_NODENAME") == node and "RANK" in environment:
            found.append(process)
    return max(found, key=lambda process: process.create_time())


# Long enough to be stopped in the middle of, short enough to wait for.
LONG = {"num_steps": 300, "checkpoint_every_steps": 5, "log_every_steps": 1}


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finetuned and scored on two ranks of this machine, without Slurm."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = make_run(world, directory, finetune=LONG, engine={"num_processes": 2})
    tiny.alsace("finetune", str(config), timeout=300)
    tiny.alsace("score", str(config))
    return directory


def test_the_demos_pipeline_over_two_nodes(slurm: LocalSlurm, tmp_path: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/demo.yaml").read_text()) | {"run_dir": "run"}
    config["data"]["inputs"][0]["num_groups"] = 450
    config["data"]["splits"] = {"pretrain": 200, "labeled": 100, "unlabeled": 80, "test": 60}
    config["data"]["groups_per_shard"] = 20
    config["pretrain"]["num_steps"] = config["finetune"]["num_steps"] = config["distill"]["num_steps"] = 6
    config["finetune"]["num_epochs"] = config["distill"]["num_epochs"] = None
    config["engine"]["num_processes"] = 1
    path = tiny.write_config(tmp_path / "config.yaml", config)
    jobs = submit(path)
    assert list(jobs)[:3] == ["prepare", "pretrain-nano", "finetune"] and list(jobs)[-1] == "report"
    refused = tiny.alsace("submit", str(path), f"--cluster={SITE}", check=False)
    assert refused.returncode == 2 and "has jobs in the queue" in refused.stderr
    slurm.wait_for_jobs(400)
    text = tiny.alsace("status", "run").stdout
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["done"] * len(jobs), text
    assert json.loads(Path("run/report.json").read_text())["source_language"] == "en"
    assert "alpha,beta" in log(tmp_path, "distill-round-1") and "beta" not in log(tmp_path, "select-round-1")
    assert Path(f"run/slurm/attempts/{jobs['finetune']}/0/rank00001.log").exists()  # a log per rank and restart
    again = tiny.alsace("submit", str(path), f"--cluster={SITE}")
    assert "nothing is left to do" in again.stdout


@pytest.mark.parametrize("how", ["requeue", "signal", "kill a rank"])
def test_training_that_is_disturbed_ends_the_same(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path, how: str
) -> None:
    config = make_run(world, tmp_path, finetune=LONG)
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    if how == "requeue":
        slurm.client("scontrol", "requeue", job)
    elif how == "signal":
        slurm.client("scancel", "--batch", "--signal=USR2", job)
    else:
        rank_of("beta").kill()
    slurm.wait_for_jobs(200)
    assert losses(tmp_path) == losses(undisturbed)
    text = log(tmp_path, "finetune")
    assert "restart 1" in text
    if how == "signal":
        assert "stopped after step" in text and "requeued, 1 of at most 5 times" in text
    if how == "kill a rank":
        assert "was killed by SIGKILL" in text
    assert (tmp_path / "run/finetune/manifest.json").exists()
