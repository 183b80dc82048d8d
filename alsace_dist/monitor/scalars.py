"""Scalars: one table of everything that training and scoring log by step, and where it goes.

A scalar is computed where its value is known, under a name of this table; ``ScalarWriter`` refuses names that are not
in it. docs/formats.md lists the table; a test holds the two together.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text
from alsace_dist.reading import parse_json, read_text

METRICS = "metrics.jsonl"


class Scalar(NamedTuple):
    """A row of the table: what the number is, in which unit, and which stages log it."""

    name: str
    unit: str
    meaning: str
    logged_by: str = "training"


SCALARS = (
    Scalar("loss", "nats", "mean over the step's global batch"),
    Scalar("learning_rate", "", "of the step"),
    Scalar("gradient_norm", "", "global norm before clipping; left out where DeepSpeed reports none"),
    Scalar("sequences_per_second", "1/s", "examples, over all ranks", "training and scoring"),
    Scalar("tokens_per_second", "1/s", "encoder tokens without padding, over all ranks", "training and scoring"),
    Scalar("padding_share", "", "share of the encoder tokens that are padding", "training and scoring"),
    Scalar("data_wait_share", "", "share of the time that ranks wait for their next batch"),
)
NAMES = frozenset(scalar.name for scalar in SCALARS)


class ScalarWriter:
    """Scalars by step, into ``metrics.jsonl`` and TensorBoard. Writes nothing on ranks other than 0."""

    def __init__(self, directory: Path, tensorboard: Path, first_step: int, is_main: bool) -> None:
        """``first_step``: where this process goes on; later lines of an earlier attempt are dropped."""
        self._file: TextIO | None = None
        self._board: Any = None
        if not is_main:
            return
        path = directory / METRICS
        kept = [row for row in read_scalars(path) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier start logged beyond the checkpoint that this start goes on from.
        self._board = SummaryWriter(str(tensorboard), purge_step=first_step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values of one step."""
        assert values.keys() <= NAMES, f"not in the table of scalars: {values.keys() - NAMES}"
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_scalars(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a killed process left unfinished is not a row."""
    rows: list[dict[str, Any]] = []
    remedy = "it is not what a stage writes: move it away"
    lines = read_text(path, remedy).splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}: "
        try:
            row = parse_json(line, place, remedy)
        except UserError:
            if number < len(lines):
                raise
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise UserError(f"{place}is no line of scalars; {remedy}")
        rows.append(row)
    return rows
