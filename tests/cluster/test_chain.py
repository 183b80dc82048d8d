"""Runs on a real Slurm: submitted, stopped, requeued, killed, and finished with the results of an undisturbed run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml
from cluster.local_slurm import LocalSlurm

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


@pytest.mark.parametrize("how", ["requeue", "signal"])
def test_scoring_that_is_disturbed_ends_with_the_same_bytes(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path, how: str
) -> None:
    """After its first shard; small batches make the others last."""
    shutil.copytree(undisturbed / "run/finetune", tmp_path / "run/finetune")
    config = make_run(world, tmp_path, finetune=LONG)
    tiny.alsace("submit", str(config), f"--cluster={SITE}", "--dry-run", "--stages=score")
    (script,) = (tmp_path / "run/slurm").glob("*-score.sh")
    job = slurm.client("sbatch", "--parsable", str(script)).strip()
    tiny.wait_for(lambda: any(tmp_path.glob("run/scores/*/*.parquet")), every_seconds=0.001)
    if how == "requeue":
        slurm.client("scontrol", "requeue", job)
    else:
        slurm.client("scancel", "--batch", "--signal=USR2", job)
    assert len(scores(tmp_path)) < len(scores(undisturbed))  # in the middle of it
    slurm.wait_for_jobs(200)
    text = log(tmp_path, "score")
    assert "restart 1" in text
    if how == "signal":
        assert "requeued, 1 of at most 5 times" in text
    assert scores(tmp_path) == scores(undisturbed)


def test_a_chain_of_short_allocations_as_a_job_array(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Tasks one after the other: the first is told to stop and requeues itself, the second finds nothing to do."""
    config = make_run(world, tmp_path, finetune=LONG)
    tiny.alsace("submit", str(config), f"--cluster={SITE}", "--dry-run", "--stages=finetune")
    (script,) = (tmp_path / "run/slurm").glob("*-finetune.sh")
    job = slurm.client("sbatch", "--parsable", "--array=0-1%1", str(script)).strip()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    slurm.client("scancel", "--batch", "--signal=USR2", f"{job}_0")
    slurm.wait_for_jobs(200)
    assert losses(tmp_path) == losses(undisturbed)
    assert f"job {job}_0, restart 1" in log(tmp_path, "finetune") and f"job {job}_1, restart 0" in log(
        tmp_path, "finetune"
    )


def test_a_time_limit_is_met_with_a_checkpoint(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The rank on beta stands still until the signal has come: so the limit is always met in the middle of training."""
    config = make_run(world, tmp_path, finetune=LONG)
    submit(config, "--stages=finetune", site=site(tmp_path, time=2, lead_seconds=60))
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank = rank_of("beta")
    rank.suspend()
    tiny.wait_for(lambda: "stopping at the next safe point" in log(tmp_path, "finetune"), seconds=120)
    rank.resume()
    slurm.wait_for_jobs(200)
    assert "stopped after step" in log(tmp_path, "finetune")
    assert losses(tmp_path) == losses(undisturbed)


def test_a_node_that_dies_costs_nothing_but_time(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    config = make_run(world, tmp_path, finetune=LONG)
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank = rank_of("beta")
    rank.suspend()  # with its node
    slurm.kill("beta")
    tiny.wait_for(lambda: slurm.jobs().get(job) != "RUNNING", seconds=120)  # Slurm has noticed
    rank.kill()
    slurm.start_node("beta")
    slurm.wait_for_jobs(200)
    assert losses(tmp_path) == losses(undisturbed)


def test_a_step_that_takes_more_memory_than_the_job_has(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Beside the first start's ranks something in their step takes 4 GB, of 3: Slurm kills all that is in it."""
    config = make_run(world, tmp_path, finetune=LONG)
    hog = tmp_path / "hog.sh"
    hog.write_text(
        f"""\
[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 || $SLURMD_NODENAME == alpha ]] || {{
  until ls {tmp_path}/run/finetune/checkpoints/*/manifest.json >/dev/null 2>&1; do sleep 0.1; done
  exec {sys.executable} -c 'import time; taken = bytes([1]) * (4 << 30); time.sleep(600)'
}} &
"""
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "BASH_ENV": str(hog)}  # which slurm_task.sh reads, in the step
    submit(config, "--stages=finetune", site=site(tmp_path, memory="3G", environment=environment))
    slurm.wait_for_jobs(200)
    text = log(tmp_path, "finetune")
    assert "exceeded memory limit" in text
    assert "the step was killed (often: out of memory); the lines above say more" in text
    assert "requeued, 1 of at most 5 times" in text
    assert losses(tmp_path) == losses(undisturbed)


def test_a_hang_is_found_told_and_requeued(slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path) -> None:
    config = make_run(world, tmp_path, finetune=LONG, engine={"num_processes": 1, "hang_seconds": 5})
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank_of("beta").suspend()
    tiny.wait_for(lambda: "requeued, 1 of at most" in log(tmp_path, "finetune"), seconds=120)
    text = tiny.alsace("status", "run").stdout
    assert "no answer from rank 1" in text and "pending" in text
    slurm.wait_for_jobs(200)
    assert "hang: no progress for 5 s" in log(tmp_path, "finetune")
    assert (tmp_path / f"run/slurm/attempts/{job}/0/hang/rank00000.stacks").read_text()
    assert losses(tmp_path) == losses(undisturbed)


def test_a_run_may_go_on_with_another_number_of_nodes(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    config = make_run(world, tmp_path, finetune=LONG)
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    assert f"{job}  finetune: cancelled" in tiny.alsace("cancel", "run").stdout
    slurm.wait_for_jobs(60)
    submit(config, "--stages=finetune", "--nodes=1")
    slurm.wait_for_jobs(200)
    assert [step for step, _ in losses(tmp_path)] == [step for step, _ in losses(undisturbed)]
    expected = [loss for _, loss in losses(undisturbed)]
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx(expected, rel=1e-3, abs=1e-4)
