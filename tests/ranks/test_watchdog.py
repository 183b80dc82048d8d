"""A rank that hangs: found, named, and the group ended within a bounded time."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist

from alsace_dist.errors import EXIT_USER_ERROR
from alsace_dist.monitor.stopwatch import Stopwatch
from alsace_dist.ranks import watchdog
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import import_deepspeed


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
    assert "hang: no progress for 4 s before " in lines[-1] and "no answer from rank 1" in lines[-1], lines
    (stacks,) = (tmp_path / "run").glob("*/**/hang/rank00000.stacks")
    # Within a collective, or where what was begun earlier is waited for: by the moment at which rank 1 was stopped.
    assert any(place in stacks.read_text() for place in ("distributed_c10d.py", "ranks/group.py"))


def beat_while_another_waits(group: Ranks, directory: str) -> str:
    """Rank 1 is done at once; rank 0 works for longer than both limits together."""
    grace, watchdog.GRACE_SECONDS = watchdog.GRACE_SECONDS, 1.0
    try:
        dog = watchdog.Watchdog(group, Path(directory), seconds=1.5)
        with dog:
            end = time.monotonic() + 6
            while group.is_main and time.monotonic() < end:
                dog.beat("the next batch")
                time.sleep(0.1)
            with dog.waiting_for_others():
                group.barrier()
    finally:
        watchdog.GRACE_SECONDS = grace  # the ranks stay for other tests
    return "well"


def test_a_rank_that_is_done_may_wait_as_long_as_others_work(tmp_path: Path) -> None:
    assert tiny.run_ranks(beat_while_another_waits, 2, directory=str(tmp_path)) == ["well", "well"]


def in_a_step(group: Ranks) -> None:
    """Wait for a collective that was begun before, as DeepSpeed does within a step."""
    handle = dist.all_reduce(torch.ones(1), group=group.control, async_op=True)
    with Stopwatch(group.device).phase("forward"):
        handle.wait()


def in_a_pass(group: Ranks) -> None:
    """As a pass under ZeRO-3 waits for weights, in scoring."""
    from deepspeed.runtime.zero.partition_parameters import AllGatherHandle, ZeroParamStatus

    handle = dist.all_reduce(torch.ones(1), group=group.control, async_op=True)
    AllGatherHandle(handle, SimpleNamespace(ds_status=ZeroParamStatus.INFLIGHT)).wait()


def who_waits(group: Ranks, directory: str) -> list[bool]:
    """Rank 1 is late; whether rank 0 is said to wait meanwhile, in each of the ways to wait, and rank 1 not."""
    import_deepspeed()  # once
    dog, found = watchdog.Watchdog(group, Path(directory), seconds=None), list[bool]()
    ways: list[Callable[[], object]] = [group.barrier, lambda: group.most(1.0), lambda: group.most_later(1.0)()]
    ways += [lambda: group.sum(1.0), lambda: in_a_step(group), lambda: in_a_pass(group)]
    for collective in ways:
        group.barrier()
        look = threading.Timer(0.3, lambda: found.append(dog._is_waiting()))
        look.start()
        time.sleep(0.0 if group.is_main else 0.8)
        collective()
        look.join()
    return found


def test_a_rank_that_waits_for_a_late_one_is_not_taken_for_it(tmp_path: Path) -> None:
    assert tiny.run_ranks(who_waits, 2, directory=str(tmp_path)) == [[True] * 6, [False] * 6]


def place(beats: int, is_done: bool = False, is_waiting: bool = False) -> dict[str, Any]:
    return {"beats": beats, "what": f"step {beats}", "is_done": is_done, "is_waiting": is_waiting}


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([place(7), place(6), place(7)], "behind: rank 1, at step 6"),
        ([place(7, is_waiting=True), place(7), place(7, is_waiting=True)], "behind: rank 1, at step 7"),
        # In scoring a rank that is done has fewer beats than one that hangs on.
        ([place(3, is_done=True), place(20), place(4, is_done=True)], "behind: rank 1, at step 20"),
        ([place(7, is_waiting=True)] * 3, "all ranks are at the same point"),
        ([place(7), None, None], "no answer from ranks 1, 2"),
    ],
)
def test_who_is_behind(places: list[dict[str, Any] | None], words: str) -> None:
    answered = {rank: one for rank, one in enumerate(places) if one is not None}
    assert watchdog.who_is_behind(answered, len(places)) == words
