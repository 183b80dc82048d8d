"""Runs on a real Slurm: submitted, stopped, requeued, killed, and finished with the results of an undisturbed run."""

import json
import sys
from pathlib import Path

import tiny
import yaml
from cluster.local_slurm import LocalSlurm
from cluster.runs import LONG, SITE, log, losses, make_run, rank_of, site, submit


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
    assert [line.split()[-1] for line in text.splitlines()[1 : len(jobs) + 1]] == ["done"] * len(jobs), text
    assert json.loads(Path("run/report.json").read_text())["source_language"] == "en"
    assert "alpha,beta" in log(tmp_path, "distill-round-1") and "beta" not in log(tmp_path, "select-round-1")
    assert Path(f"run/slurm/attempts/{jobs['finetune']}/0/rank00001.log").exists()  # a log per rank and restart
    again = tiny.alsace("submit", str(path), f"--cluster={SITE}")
    assert "nothing is left to do" in again.stdout


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
    submit(config, "--stages=finetune", site=site(tmp_path, time=3, lead_seconds=70))
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank = rank_of("beta")
    rank.suspend()
    tiny.wait_for(lambda: "stopping at the next safe point" in log(tmp_path, "finetune"))
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
    tiny.wait_for(lambda: slurm.jobs().get(job) != "RUNNING")  # Slurm has noticed
    rank.kill()
    slurm.start_node("beta")
    slurm.wait_for_jobs(200)
    assert losses(tmp_path) == losses(undisturbed)


def test_a_hang_is_found_told_and_requeued(slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path) -> None:
    config = make_run(world, tmp_path, finetune=LONG, engine={"num_processes": 1, "hang_seconds": 5})
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank_of("beta").suspend()
    tiny.wait_for(lambda: "requeued, 1 of at most" in log(tmp_path, "finetune"))
    text = tiny.alsace("status", "run").stdout
    assert "no answer from rank 1" in text and "pending" in text
    slurm.wait_for_jobs(200)
    assert "hang: no progress for 5 s" in log(tmp_path, "finetune")
    assert (tmp_path / f"run/slurm/attempts/{job}/0/hang/rank00000.stacks").read_text()
    assert losses(tmp_path) == losses(undisturbed)


def test_by_hand_in_an_allocation(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    """As slurm/README.md says."""
    config = make_run(world, tmp_path, finetune={"num_steps": 2})
    task = Path(__file__).parents[2] / "launchers/slurm_task.sh"
    slurm.client(
        *("salloc", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"),
        *("srun", "--kill-on-bad-exit=1", "--cpus-per-task=1", "bash", str(task)),
        *(sys.executable, "-m", "alsace_dist", "finetune", str(config)),
        extra={"MASTER_ADDR": "127.0.0.1"} | {name: tiny.environment()[name] for name in ("PYTHONPATH",)},
    )
    assert (tmp_path / "run/finetune/manifest.json").exists()
    assert len(list(tmp_path.glob("slurm-*/rank00001.log"))) == 1  # both nodes are in one group
