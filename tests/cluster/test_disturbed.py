"""On a real Slurm: requeued, told to stop, killed, out of memory, on other nodes; the results stay the same."""

import shutil
import sys
import time
from pathlib import Path

import pytest
import tiny
from cluster.local_slurm import LocalSlurm
from cluster.runs import LONG, SITE, log, losses, make_run, rank_of, scores, site, submit


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
    beta = rank_of("beta")
    beta.suspend()  # scoring must not end before
    if how == "requeue":
        slurm.client("scontrol", "requeue", job)
    else:
        slurm.client("scancel", "--batch", "--signal=USR2", job)
    assert scores(undisturbed).keys() - scores(tmp_path).keys(), "scored to the end before it was disturbed"
    if how == "signal":
        tiny.wait_for(lambda: "stopping at the next safe point" in log(tmp_path, "score"))
        beta.resume()
    slurm.wait_for_jobs(200)
    text = log(tmp_path, "score")
    assert "restart 1" in text
    if how == "signal":
        assert "requeued, 1 of at most 5 times" in text
    assert scores(tmp_path) == scores(undisturbed)


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
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    rank_of("beta").suspend()  # Slurm looks at memory every few seconds only: training must not end before
    slurm.wait_for_jobs(200)
    text = log(tmp_path, "finetune")
    assert "exceeded memory limit" in text
    assert "the step was killed (often: out of memory); the lines above say more" in text
    assert "requeued, 1 of at most 5 times" in text
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.parametrize("change", ["--nodes=1", "--engine.zero_stage=3"])
def test_a_run_may_go_on_with_another_number_of_nodes_or_zero_stage(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path, change: str
) -> None:
    config = make_run(world, tmp_path, finetune=LONG)
    (job,) = submit(config, "--stages=finetune").values()
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    assert f"{job}  finetune: cancelled" in tiny.alsace("cancel", "run").stdout
    slurm.wait_for_jobs(60)
    submit(config, "--stages=finetune", change)
    slurm.wait_for_jobs(200)
    assert [step for step, _ in losses(tmp_path)] == [step for step, _ in losses(undisturbed)]
    expected = [loss for _, loss in losses(undisturbed)]
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_controller_that_is_away_when_a_rank_dies(
    slurm: LocalSlurm, world: Path, tmp_path: Path, undisturbed: Path
) -> None:
    config = make_run(world, tmp_path, finetune=LONG)
    submit(config, "--stages=finetune")
    tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
    slurm.stop_controller()
    rank_of("beta").kill()
    tiny.wait_for(lambda: "srun: error: alpha: task 0: Exited" in log(tmp_path, "finetune"))
    time.sleep(30)  # the end of the step, or else the requeue, finds nobody
    slurm.start_controller()
    slurm.wait_for_jobs(200)
    assert "requeued, 1 of at most 5 times" in log(tmp_path, "finetune")
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.parametrize("where", ["the user's profile", "Python"])
def test_a_signal_before_the_ranks_can_take_it(
    slurm: LocalSlurm, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While files are read at the start: it requeues the job, which succeeds the next time."""
    text = f"[[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 ]] || {{ touch {tmp_path}/begun; sleep 4; }}\n"
    environment = {"MASTER_ADDR": "127.0.0.1"}
    if where == "Python":
        (tmp_path / "sitecustomize.py").write_text(
            "import os, time\nif os.environ.get('SLURM_RESTART_COUNT', '0') == '0':\n"
            f"    open('{tmp_path}/begun', 'w')\n    time.sleep(4)\n"
        )
        environment["PYTHONPATH"] = str(tmp_path)
    else:
        (tmp_path / ".bash_profile").write_text(text)
    config = make_run(world, tmp_path, finetune={"num_steps": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    profile = site(tmp_path, environment=environment)
    (job,) = submit(config, "--stages=finetune", "--nodes=1", site=profile).values()
    tiny.wait_for(lambda: (tmp_path / "begun").exists())
    slurm.client("scancel", "--batch", "--signal=USR2", job)
    slurm.wait_for_jobs(100)
    assert "exit code 75, requeued, 1 of at most 5 times" in log(tmp_path, "finetune")
    assert (tmp_path / "run/finetune/manifest.json").exists()
