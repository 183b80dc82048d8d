"""How far a stage is: a bar for whoever watches, lines for a log, a file for ``alsace status``."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alsace_dist.files.progress import Progress, clear_progress, write_progress

EVERY_SECONDS = 10.0
Advance = Callable[..., None]


@contextmanager
def progress(name: str, directory: Path, total: int, done: int, enabled: bool) -> Iterator[Advance]:
    """A function ``advance(count=1, note="")``: a bar with ETA on a terminal, else a line now and then, on stderr.

    Either way ``directory/progress.json`` says it to other processes, until all is done. ``done``: units that an
    earlier start has done. Not ``enabled``: nothing is shown or written.
    """
    if not enabled:
        yield lambda count=1, note="": None
        return
    with _bar(name, total, done) if sys.stderr.isatty() else _lines(name, total, done) as show:
        counter = _Counter(directory, total, done)

        def advance(count: int = 1, note: str = "") -> None:
            show(count, note)
            counter.add(count)

        try:
            yield advance
        finally:
            counter.end()


class _Counter:
    """Keeps ``progress.json`` up to date, a write at most every few seconds."""

    def __init__(self, directory: Path, total: int, done: int) -> None:
        self.directory, self.total, self.done, self.first = directory, total, done, done
        self.start = self.last = time.monotonic()
        self._write(None)

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= EVERY_SECONDS / 5 and self.done > self.first:
            self.last = now
            self._write(_eta(now - self.start, self.done - self.first, self.total - self.done))

    def end(self) -> None:
        """Nobody goes on now: what is left, if anything, takes an unknown time."""
        if self.done >= self.total:
            clear_progress(self.directory)
        else:
            self._write(None)

    def _write(self, eta_seconds: float | None) -> None:
        write_progress(self.directory, Progress(done=self.done, total=self.total, eta_seconds=eta_seconds))


def _eta(elapsed: float, done: int, left: int) -> float:
    return elapsed / max(1, done) * left


@contextmanager
def _bar(name: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(name, total=total, completed=done, note="")

        def show(count: int, note: str) -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield show


@contextmanager
def _lines(name: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    yield _Lines(name, total, done)


class _Lines:
    """Progress in a log file: a line at the start, then at most one every ten seconds, and one at the end."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.done, self.first = name, total, done, done
        self.start = self.last = time.monotonic()
        self._print("")

    def __call__(self, count: int, note: str) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= EVERY_SECONDS or (count and self.done >= self.total):
            self.last = now
            self._print(note)

    def _print(self, note: str) -> None:
        parts: list[Any] = [f"{self.name}: {self.done}/{self.total}"]
        if self.done > self.first:
            elapsed = time.monotonic() - self.start
            eta = _eta(elapsed, self.done - self.first, self.total - self.done)
            parts += [f"{elapsed:.0f} s", f"eta {eta:.0f} s"]
        print(", ".join([*parts, note] if note else parts), file=sys.stderr)
