"""Where scalars go by step: ``metrics.jsonl``, TensorBoard, and any other place that is a ``Sink``.

A place that cannot be written ends no run.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alsace_dist.errors import UserError, warn
from alsace_dist.files.manifest import write_text
from alsace_dist.monitor.board import Board
from alsace_dist.monitor.scalars import tag_of
from alsace_dist.monitor.trackers import Tracker, open_tracker
from alsace_dist.reading import parse_json, read_text, shorten

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Places:
    """Where the scalars of one stage go. ``directory``: the stage's own, for metrics.jsonl; ``tensorboard``: of the log
    for TensorBoard; ``tracker``: another one, if any."""

    directory: Path
    tensorboard: Path
    tracker: Tracker | None = None


class Sink(Protocol):
    """A place where scalars go. What it raises is said once, and the run goes on without it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text, such as a warning, that belongs to a step."""

    def close(self) -> None:
        """Write what is left."""


class LinesSink:
    """``metrics.jsonl``: one object a line. Lines of an earlier start beyond ``first_step`` are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [row for row in read_scalars(path) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As in ``Sink``."""
        self._path.stat()  # a file that was removed could be written on, for nobody
        self._file.write(json.dumps({"step": step} | dict(values)) + "\n")
        self._file.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Texts are not kept here: warnings have a file of their own."""

    def close(self) -> None:
        """As in ``Sink``."""
        self._file.close()


class BoardSink:
    """A log of TensorBoard, in which what an earlier start logged beyond ``first_step`` is hidden."""

    def __init__(self, directory: Path, first_step: int) -> None:
        self._board = Board(directory, first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As in ``Sink``."""
        for name, value in values.items():
            self._board.scalar(tag_of(name), value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """As in ``Sink``."""
        self._board.text(name, text, step)

    def close(self) -> None:
        """As in ``Sink``."""
        self._board.close()


class FurtherSink:
    """Another sink, of a tracker that forgets nothing: steps that a killed start has logged there are left out."""

    def __init__(self, sink: Sink, last_step: int) -> None:
        self._sink, self._last_step = sink, last_step
        self.text, self.close = sink.text, sink.close

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As in ``Sink``."""
        if step > self._last_step:
            self._sink.write(step, values)


class ScalarWriter:
    """Scalars by step, into ``metrics.jsonl`` and TensorBoard. Writes nothing on ranks other than 0.

    A place that cannot be written (a full disk, a directory that is gone) ends no run: it is said once, and the others
    are written on.
    """

    def __init__(self, places: Places, first_step: int, is_main: bool) -> None:
        """``first_step``: where this process goes on. Raises ``UserError`` if a ``metrics.jsonl`` is there that no
        stage wrote, or a tracker is asked for that is not installed."""
        self._sinks: dict[Path, Sink] = {}
        if is_main:
            path = places.directory / METRICS
            last_step = -1
            with suppress(OSError):  # LinesSink meets the same error, which is said once
                last_step = max((row["step"] for row in read_scalars(path)), default=-1)
            self._begin(path, lambda: LinesSink(path, first_step))
            self._begin(places.tensorboard, lambda: BoardSink(places.tensorboard, first_step))
            if (tracker := places.tracker) is not None:
                self._begin(Path(tracker.kind), lambda: FurtherSink(open_tracker(tracker), last_step))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values of one step. Raises ``KeyError`` for a name that the table of scalars lacks."""
        for name in values:
            tag_of(name)
        for place, sink in list(self._sinks.items()):
            self._try(place, partial(sink.write, step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text of one step."""
        for place, sink in list(self._sinks.items()):
            self._try(place, partial(sink.text, step, name, text))

    def close(self) -> None:
        """Write what is left."""
        for place, sink in list(self._sinks.items()):
            self._try(place, sink.close)

    def _begin(self, place: Path, make: Callable[[], Sink]) -> None:
        try:
            self._sinks[place] = make()
        except UserError:
            raise
        except Exception as error:  # whatever another library raises; a disk's own errors are OSErrors
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
    lines = read_text(path, remedy).removesuffix("\n").split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}: "
        try:
            row = parse_json(line, place, remedy)
        except UserError:
            if number < len(lines):
                raise
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
            raise UserError(f"{place}is no line of scalars; {remedy}")
        rows.append(row)
    return rows
