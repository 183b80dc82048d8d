"""Seconds by phase on ranks that wait for each other, under each ZeRO stage."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from training import test_engine

from alsace_dist.monitor.stopwatch import COLLECTIVES, COMMUNICATION, Stopwatch
from alsace_dist.ranks.group import Ranks

LATE_SECONDS = 0.4


class Collectives(TorchDispatchMode):
    """Counts every collective that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += str(operator).startswith("c10d.")
        return operator(*args, **(kwargs or {}))


def methods() -> list[Any]:
    return [vars(dist.ProcessGroup).get(name) for name in COLLECTIVES] + [vars(dist.Work)["wait"]]


def one_step(group: Ranks, world: str, settings: dict[str, Any]) -> tuple[int, Counter[str], bool]:
    """How many collectives a step asks for; the spans that the stopwatch has of it; whether all is as it was."""
    trained, model = test_engine.load(group, world, "mt5", settings)
    mine = test_engine.examples(model)[group.rank :: group.world_size]
    before = methods()
    with Collectives() as seen:
        trained.step([test_engine.loss_of(model, mine, group)], 1e-3)
    return seen.num, Counter(name for name, *_ in trained.stopwatch._spans), methods() == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_collective_is_timed_where_it_starts_and_where_it_is_waited_for(world: Path, stage: int) -> None:
    for num, spans, is_restored in tiny.run_ranks(
        one_step, 2, world=str(world), settings={"zero_stage": stage, "dtype": "fp32"}
    ):
        assert num > 0 and is_restored
        assert spans == {"forward": 1, "backward": 1, "optimizer": 1, COMMUNICATION: 2 * num}


def one_is_late(group: Ranks) -> dict[str, float]:
    """Seconds of a rank that computes for a while, and of one that waits for it, in one phase of three."""
    watch = Stopwatch(group.device)
    dist.barrier(group=group.control)
    with watch.phase("first"):
        time.sleep(LATE_SECONDS / 4)
    with watch.phase("second"):
        time.sleep(LATE_SECONDS if group.rank == 1 else 0.0)
        dist.all_reduce(torch.ones(3), group=group.control)
    handle = dist.all_reduce(torch.ones(3), group=group.control, async_op=True)  # in no phase
    handle.wait()
    with watch.phase("first"):
        time.sleep(LATE_SECONDS / 4)
    return watch.read() | {f"{name} again": seconds for name, seconds in watch.read().items()}


def test_waiting_for_a_rank_that_is_late_is_communication_and_no_part_of_its_phase() -> None:
    waiting, late = tiny.run_ranks(one_is_late, 2)
    assert waiting.keys() == late.keys() == {"first", "second", COMMUNICATION}
    assert waiting[COMMUNICATION] > LATE_SECONDS * 0.7 and waiting["second"] < LATE_SECONDS * 0.3
    assert late[COMMUNICATION] < LATE_SECONDS * 0.3 and late["second"] >= LATE_SECONDS
    assert min(waiting["first"], late["first"]) >= LATE_SECONDS / 2


def test_a_phase_that_fails_puts_torch_back() -> None:
    before = methods()
    with pytest.raises(ZeroDivisionError), Stopwatch(torch.device("cpu")).phase("first"):
        raise ZeroDivisionError
    assert methods() == before


class Moment:
    """Stands in for an event of a GPU: the bookkeeping of streams needs none."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any) -> None:
        time.sleep(LATE_SECONDS / 4)

    def elapsed_time(self, later: "Moment") -> float:
        return 1000 * (later.seconds - self.seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def test_on_a_gpu_only_what_the_computing_stream_waits_for_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        """With the one method of torch's that says what a stream waits for."""

        def wait_event(self, event: Moment) -> None:
            event.wait(self)

        def synchronize(self) -> None:
            time.sleep(LATE_SECONDS / 4)

    computing, other = Stream(), Stream()
    current = [computing]
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    watch = Stopwatch(torch.device("cuda"))
    with watch.phase("forward"):
        computing.wait_event(Moment())  # timed
        other.wait_event(Moment())
        other.synchronize()  # timed
        current[0] = other
        computing.wait_event(Moment())
        current[0] = computing
    found = watch.read()
    assert found.keys() == {"forward", COMMUNICATION}
    assert min(found.values()) >= LATE_SECONDS / 2 and max(found.values()) < LATE_SECONDS * 0.8


def test_many_spans_between_two_readings_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alsace_dist.monitor.stopwatch.MOST_SPANS", 3)
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(20):
        with watch.phase("first"):
            time.sleep(0.002)
    assert len(watch._spans) <= 4 and watch.read()["first"] >= 0.04 and watch.read() == {}
