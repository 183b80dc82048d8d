"""``costs.jsonl``: how long each start of a stage took, and on how many ranks and nodes. Lines are only added.

A start that is killed adds none itself: it leaves a mark beside its stage's lock, from which the next start does.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.lines import append_line, readable_lines
from alsace_dist.files.manifest import read_json, write_json
from alsace_dist.files.progress import PROGRESS

COSTS = "costs.jsonl"
Count = Annotated[int, Field(ge=1, le=10**7)]


class Cost(Section):
    """One start of a stage. ``time``: of its end (UTC); ``is_done``: whether it completed the stage."""

    time: str
    stage: str
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    num_ranks: Count
    num_nodes: Count
    is_done: bool


class Begun(Section):
    """The mark of a start. Since when it runs is the time at which the disk has it."""

    num_ranks: Count
    num_nodes: Count


class Start:
    """A start of a stage, from its beginning on; whoever makes it holds the stage's lock.

    A full disk is told by what the disk is needed for, not by this.
    """

    def __init__(
        self, run: Path, stage: str, mark: Path, directories: Sequence[Path], num_ranks: int, num_nodes: int
    ) -> None:
        """``mark``: a file that only this stage's starts write; ``directories``: in which the stage says how far it
        is."""
        self.run, self.stage, self.mark = run, stage, mark
        self.num_ranks, self.num_nodes, self._begin = num_ranks, num_nodes, time.monotonic()
        self._is_marked = False
        with suppress(UserError, OSError):  # a file of that name that no start has written stays
            self._add_killed(directories)
            write_json(mark, Begun(num_ranks=num_ranks, num_nodes=num_nodes).model_dump())
            self._is_marked = True

    def end(self, is_done: bool) -> None:
        """Keep what this start has taken, complete or not. ``is_done``: whether the stage is complete."""
        self._add(time.time(), time.monotonic() - self._begin, self.num_ranks, self.num_nodes, is_done)
        if self._is_marked:
            with suppress(OSError):
                self.mark.unlink(missing_ok=True)

    def _add_killed(self, directories: Sequence[Path]) -> None:
        """A start that was killed has taken until it last said how far it is, as far as anybody knows. Raises
        ``UserError`` for a mark that no start has written."""
        if not os.path.lexists(self.mark):
            return
        if self.mark.is_symlink():
            raise UserError(f"{self.mark}: is a link")
        begun = validate(Begun, read_json(self.mark), f"{self.mark}: ")
        signs = [path for directory in directories if (path := directory / PROGRESS).exists()]
        begin = self.mark.stat().st_mtime
        end = max([begin, *(path.stat().st_mtime for path in signs)])
        self._add(end, end - begin, begun.num_ranks, begun.num_nodes, is_done=False)

    def _add(self, end: float, seconds: float, num_ranks: int, num_nodes: int, is_done: bool) -> None:
        cost = Cost(
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end)),
            stage=self.stage,
            seconds=round(seconds, 1),
            num_ranks=num_ranks,
            num_nodes=num_nodes,
            is_done=is_done,
        )
        with suppress(OSError):
            append_line(self.run / COSTS, cost.model_dump())


def read_costs(run: Path) -> list[Cost]:
    """All of a run, in their order. Lines that nobody can read are left out."""
    return list(readable_lines(run / COSTS, Cost))
