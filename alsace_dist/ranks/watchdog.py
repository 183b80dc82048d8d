"""Notice that a rank hangs, leave what tells why, and end it, so that the run can go on from its last checkpoint."""

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from alsace_dist.errors import RankFailed
from alsace_dist.files.manifest import HANG, remove_own, write_text
from alsace_dist.ranks import failures, job
from alsace_dist.ranks.group import Ranks

JOIN_SECONDS = 10.0  # time for a message to the store to come back
WAIT_SECONDS = 15.0  # time for the other ranks to say where they are
# A C timer kills a rank whose main thread holds the GIL, so that the watching thread never runs; this much later.
GRACE_SECONDS = 60.0
# Files of functions that wait for other ranks; in a step the stopwatch is around whatever is waited for. And files
# whose functions called wait do, for what was asked for earlier.
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/comm.py", "alsace_dist/monitor/stopwatch.py")
HANDLES = ("alsace_dist/ranks/group.py", "deepspeed/runtime/zero/partition_parameters.py")
_LEFT = re.compile(r"rank\d{5,}\.(stacks|place|collectives\.json)")


class Watchdog:
    """Watches this rank's progress while it is entered: ``beat`` says that there was some.

    After ``seconds`` without any, every rank that still runs writes the stacks of its threads and how far it is into
    ``directory``, compares, and ends with the names of the ranks that are behind.
    """

    def __init__(self, ranks: Ranks, directory: Path, seconds: float | None) -> None:
        """``directory``: of the stage; in a job everything goes to what the job leaves of this start. Collective."""
        self.ranks, self.seconds = ranks, seconds
        self.directory = (job.attempt_directory() or directory) / HANG
        self.num_beats, self.last_beat, self.what = 0, time.monotonic(), "the start"
        self._ended, self._is_done = threading.Event(), False
        self._stacks: TextIO | None = None
        self._main_thread = threading.get_ident()
        self._name = ranks.own_name(f"watchdog/{self.directory}")
        ranks.main_first(self._clear)

    def _clear(self) -> None:
        """Remove what an earlier hang has left: it would be taken for this hang's."""
        remove_own(self.directory, _LEFT)

    def __enter__(self) -> Self:
        if self.seconds is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._stacks = self._file("stacks").open("w")
            self.beat(self.what)
            self._thread = threading.Thread(target=self._watch, args=(self.seconds, self._stacks), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._stacks is not None:
            self._thread.join(JOIN_SECONDS)  # a running thread might start the clock once more
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._file("stacks").unlink(missing_ok=True)  # nothing hung, so the file is empty
            with suppress(OSError):  # the directory still holds files of other ranks
                self.directory.rmdir()

    def beat(self, what: str) -> None:
        """There was progress; ``what``: what comes next, the same on all ranks at the same beat."""
        self.num_beats += 1
        self.what = what
        self._start_clock()

    def _start_clock(self) -> None:
        self.last_beat = time.monotonic()
        if self._stacks is not None and self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds + GRACE_SECONDS, file=self._stacks, exit=True)

    @contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """This rank is done; until all other ranks are done, their progress counts."""
        self._is_done, self.what = True, "the end of the other ranks"
        yield
        self._is_done = False

    def _watch(self, seconds: float, stacks: TextIO) -> None:
        try:
            self._watch_through_store(seconds, stacks)
        except RuntimeError as error:  # the store is gone, and with it the group: the main thread will raise, too
            print(f"watchdog: {error}", file=sys.stderr)

    def _watch_through_store(self, seconds: float, stacks: TextIO) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        store, total, next_look, name = _get_default_store(), 0, 0.0, self._name
        beats = [f"{name}/beats{rank}" for rank in range(self.ranks.world_size)]
        for key in beats:
            store.add(key, 0)
        while not self._ended.wait(min(1.0, seconds / 4)):
            store.set(beats[self.ranks.rank], str(self.num_beats))
            if (
                self._is_done and time.monotonic() > next_look
            ):  # seldom, for every idle rank asks for the beats of all ranks
                next_look = time.monotonic() + seconds / 10
                before, total = total, sum(int(value) for value in store.multi_get(beats))
                if total != before:
                    self._start_clock()
            # The first rank to detect a hang kills the group, so every rank must report its position as soon as one
            # has.
            if time.monotonic() - self.last_beat > seconds or store.check([f"{name}/hang"]):
                store.set(f"{name}/hang", "")
                self._end(seconds, stacks, store, name)

    def _end(self, seconds: float, stacks: TextIO, store: Any, name: str) -> None:
        faulthandler.dump_traceback(file=stacks)
        place = {"beats": self.num_beats, "what": self.what, "is_waiting": self._is_waiting(), "is_done": self._is_done}
        store.set(f"{name}/place{self.ranks.rank}", json.dumps(place))
        write_text(self._file("place"), json.dumps(place))
        self._dump_collectives()
        error = RankFailed(f"hang: {self._compare(seconds, store, name)}; stacks of all threads: {self.directory}")
        failures.record_failure(error)
        if failures.error_directory() is None:
            failures.record_cause(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(failures.exit_code(error))  # the main thread hangs, so this thread ends the process

    def _file(self, kind: str) -> Path:
        return self.directory / f"rank{self.ranks.rank:05d}.{kind}"

    def _is_waiting(self) -> bool:
        """Whether the main thread waits for other ranks, not they for it."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith(COLLECTIVES) or (file.endswith(HANDLES) and function == "wait"):
                return True
            frame = frame.f_back
        return False

    def _dump_collectives(self) -> None:
        """The flight recorder of this build of torch: this rank's last collectives (TORCH_FR_BUFFER_SIZE of them)."""
        from torch._C import _distributed_c10d

        for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
            dump: Any = getattr(_distributed_c10d, name, None)
            if dump is not None:
                write_text(self._file("collectives.json"), dump().decode())
                return

    def _compare(self, seconds: float, store: Any, name: str) -> str:
        """Wait for every rank to say where it is, and compare."""
        places: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + min(WAIT_SECONDS, seconds)
        while len(places) < self.ranks.world_size and time.monotonic() < deadline:
            time.sleep(0.2)
            for rank in set(range(self.ranks.world_size)) - places.keys():
                if store.check([f"{name}/place{rank}"]):
                    places[rank] = json.loads(store.get(f"{name}/place{rank}"))
        return f"no progress for {seconds:g} s before {self.what}; {who_is_behind(places, self.ranks.world_size)}"


def who_is_behind(places: Mapping[int, Mapping[str, Any]], world_size: int) -> str:
    """Which ranks hold the group up, in words.

    ``places``: of the ranks that have answered, ``beats``, ``what``, ``is_waiting`` (for other ranks) and ``is_done``.
    Behind are the ranks that do not answer; else, of those that are not done, the ranks with the fewest beats; if all
    of them have equally many, the ranks that do not wait for other ranks.
    """
    if silent := sorted(set(range(world_size)) - places.keys()):
        return f"no answer from {_names(silent)}"
    busy = {rank: place for rank, place in sorted(places.items()) if not place["is_done"]}
    behind = [rank for rank, place in busy.items() if place["beats"] == min(one["beats"] for one in busy.values())]
    if len(behind) == len(busy):
        behind = [rank for rank, place in busy.items() if not place["is_waiting"]]
    if behind and len(behind) < world_size:
        return f"behind: {_names(behind)}, at {busy[behind[0]]['what']}"
    return "all ranks are at the same point"


def _names(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"rank{'s' * (len(numbers) > 1)} {shown}{', ...' if len(numbers) > 8 else ''}"
