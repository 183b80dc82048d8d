"""How a submitted run stands while it runs, on a real Slurm; what is said of its ends, the other files here see."""

import re
from pathlib import Path

import tiny
from cluster.local_slurm import LocalSlurm
from cluster.runs import make_run, submit

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
