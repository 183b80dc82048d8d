"""``costs.jsonl``: how long each start of a stage took, and on how many ranks and nodes. Lines are only added."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import append_line
from alsace_dist.reading import parse_json, read_text

COSTS = "costs.jsonl"


class Cost(Section):
    """One start of a stage. ``time``: of its end (UTC); ``is_done``: whether it completed the stage."""

    time: str
    stage: str
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    num_ranks: Annotated[int, Field(ge=1, le=10**7)]
    num_nodes: Annotated[int, Field(ge=1, le=10**7)]
    is_done: bool


def add_cost(run: Path, stage: str, seconds: float, num_ranks: int, num_nodes: int, is_done: bool) -> None:
    """Keep what a start has taken. A full disk is told by what the disk is needed for, not by this."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    cost = Cost(
        time=now, stage=stage, seconds=round(seconds, 1), num_ranks=num_ranks, num_nodes=num_nodes, is_done=is_done
    )
    with suppress(OSError):
        append_line(run / COSTS, cost.model_dump())


def read_costs(run: Path) -> list[Cost]:
    """All of a run, in their order. Lines that nobody can read are left out."""
    path, found = run / COSTS, list[Cost]()
    with suppress(UserError, OSError):
        for line in read_text(path, "remove it").split("\n") if path.exists() else ():
            with suppress(UserError):
                found.append(validate(Cost, parse_json(line, f"{path}: ", "remove it"), f"{path}: "))
    return found
