"""How a submitted run stands while it runs, on a real Slurm; what is said of its ends, the other files here see."""

import re
from pathlib import Path

import tiny
from cluster.local_slurm import LocalSlurm
from cluster.runs import make_run, site, submit

from alsace_dist.files.progress import read_progress

NUM_STEPS = 2000


def test_a_stage_that_runs_says_where_and_how_far_it_is(slurm: LocalSlurm, world: Path, tmp_path: Path) -> None:
    steps = {"num_steps": NUM_STEPS, "checkpoint_every_steps": NUM_STEPS}
    config = make_run(world, tmp_path, finetune=steps)
    (job,) = submit(config, "--stages=finetune").values()
    directory = tmp_path / "run/finetune"
    tiny.wait_for(lambda: (now := read_progress(directory)) is not None and now.eta_seconds is not None)
    text = tiny.alsace("status", "run").stdout
    rows = {line.split("  ")[0]: line.rstrip() for line in text.splitlines()}
    expected = rf"finetune +{job} +running on alpha,beta +[1-9]\d*/{NUM_STEPS}, eta \d+ s"
    assert re.fullmatch(expected, rows["finetune"]), text
    assert re.fullmatch(r"score +to do", rows["score"]), text
    tiny.alsace("cancel", "run")


def test_a_job_that_leaves_no_cause_is_known_by_its_log_and_by_slurm(
    slurm: LocalSlurm, world: Path, tmp_path: Path
) -> None:
    config = make_run(world, tmp_path)
    submit(config, "--stages=finetune", site=site(tmp_path, venv="/nonexistent"))
    slurm.wait_for_jobs(60)
    assert "failed: no virtual environment there" in tiny.alsace("status", "run").stdout
    # Another job of that stage dies before it says a word: the error in the log is not its own.
    (script,) = tmp_path.glob("run/slurm/*-finetune.sh")
    script.write_text(script.read_text().replace("\nrefuse() {", "\nkill -KILL $$\nrefuse() {"))
    slurm.client("sbatch", "--parsable", "--no-requeue", str(script))
    slurm.wait_for_jobs(60)
    text = tiny.alsace("status", "run").stdout
    assert "no virtual environment" not in text.partition("Last lines")[0], text
    assert "failed: Slurm says: " in text and "signal 9" in text, text
