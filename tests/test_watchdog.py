"""A rank that hangs: found, named, and the group ended within a bounded time."""

import os
import signal
import time
from pathlib import Path

import pytest
import tiny

from alsace_dist.errors import EXIT_USER_ERROR


@pytest.mark.parametrize("command", ["finetune", "score"])
def test_a_rank_that_stands_still_is_named_and_all_end(world: Path, tmp_path: Path, command: str) -> None:
    config = tiny.make_config(world, run_dir=str(tmp_path / "run"), data={"directory": str(world / "run/data")})
    config["finetune"] |= {"num_steps": 3000, "checkpoint_every_steps": 50}
    config["engine"] |= {"hang_seconds": 4, "zero_stage": 2}
    if command == "score":
        config["finetune"] = None
        config["score"] = {"tokens_per_batch": 1}
    path = tiny.write_config(tmp_path / "config.yaml", config)
    sign = "finetune/checkpoints/*/manifest.json" if command == "finetune" else "scores/unlabeled/started.json"
    with tiny.started(command, str(path)) as process:
        tiny.wait_for(lambda: any((tmp_path / "run").glob(sign)), every_seconds=0.001)
        stopped = tiny.ranks_of(process)[-1]
        os.kill(stopped, signal.SIGSTOP)
        begin = time.monotonic()
        assert process.wait(timeout=90) not in (0, EXIT_USER_ERROR)
        assert time.monotonic() - begin < 60
        assert process.stderr is not None
        lines = process.stderr.read().strip().splitlines()
    assert "hang: no progress for 4 s" in lines[-1] and "no answer from rank 1" in lines[-1], lines
    (stacks,) = (tmp_path / "run").glob("*/**/hang/rank00000.stacks")
    assert "distributed_c10d.py" in stacks.read_text()
