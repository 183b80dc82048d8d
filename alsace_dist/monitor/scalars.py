"""Scalars: one table of everything that training and scoring log by step, and where it goes.

A scalar is computed where its value is known, under a name of this table; ``ScalarWriter`` refuses names that are not
in it. docs/formats.md lists the table; a test holds the two together.
"""

import json
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from alsace_dist.errors import UserError, warn
from alsace_dist.files.manifest import write_text
from alsace_dist.reading import parse_json, read_text, shorten

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


class Sink(Protocol):
    """A place where scalars go. What it raises is said once, and the run goes on without it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Write what is left."""


class LinesSink:
    """``metrics.jsonl``: one object a line. Lines of an earlier start beyond ``first_step`` are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [row for row in read_scalars(path) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As in ``Sink``."""
        self._file.write(json.dumps({"step": step} | dict(values)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """As in ``Sink``."""
        self._file.close()


class BoardSink:
    """A log of TensorBoard, in which what an earlier start logged beyond ``first_step`` is hidden."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _say_once()
        self._board = SummaryWriter(str(directory), purge_step=first_step + 1, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As in ``Sink``. TensorBoard writes in a thread: what fails there is raised at a later call."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """As in ``Sink``."""
        self._board.close()


@cache
def _say_once() -> None:
    """Keep TensorBoard's threads from printing a traceback as they die of an error that is raised later, too."""
    otherwise = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            otherwise(args)

    threading.excepthook = hook


class ScalarWriter:
    """Scalars by step, into ``metrics.jsonl`` and TensorBoard. Writes nothing on ranks other than 0.

    A place that cannot be written (a full disk, a directory that is gone) ends no run: it is said once, and the others
    are written on.
    """

    def __init__(self, directory: Path, tensorboard: Path, first_step: int, is_main: bool) -> None:
        """``first_step``: where this process goes on. Raises ``UserError`` if a ``metrics.jsonl`` is there that no
        stage wrote."""
        self._sinks: dict[Path, Sink] = {}
        if is_main:
            path = directory / METRICS
            self._begin(path, lambda: LinesSink(path, first_step))
            self._begin(tensorboard, lambda: BoardSink(tensorboard, first_step))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values of one step."""
        assert values.keys() <= NAMES, f"not in the table of scalars: {values.keys() - NAMES}"
        for place, sink in list(self._sinks.items()):
            self._try(place, partial(sink.write, step, values))

    def close(self) -> None:
        """Write what is left."""
        for place, sink in list(self._sinks.items()):
            self._try(place, sink.close)

    def _begin(self, place: Path, make: Callable[[], Sink]) -> None:
        try:
            self._sinks[place] = make()
        except OSError as error:
            self._give_up(place, error)

    def _try(self, place: Path, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a writer of another library raises
            self._give_up(place, error)

    def _give_up(self, place: Path, error: Exception) -> None:
        self._sinks.pop(place, None)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shorten(error)
        warn(
            f"{place}: cannot be written ({reason}); the run goes on, and logs nothing there until it is started again"
        )


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
