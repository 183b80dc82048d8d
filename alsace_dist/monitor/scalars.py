"""What training and scoring say of themselves: TensorBoard, a JSONL file, a progress bar, throughput."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from alsace_dist.files.manifest import write_text

METRICS = "metrics.jsonl"
# Dense bf16 peaks of the makers' data sheets, FLOP/s; for model FLOPs utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "A10G": 70e12}


class MetricsWriter:
    """Scalars by step, into ``metrics.jsonl`` and TensorBoard. Writes nothing on ranks other than 0."""

    def __init__(self, directory: Path, tensorboard: Path, first_step: int, is_main: bool) -> None:
        """``first_step``: where this process goes on; later lines of an earlier attempt are dropped."""
        self._file: TextIO | None = None
        self._board: Any = None
        if not is_main:
            return
        path = directory / METRICS
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier attempt logged beyond the checkpoint that this one goes on from.
        self._board = SummaryWriter(str(tensorboard), purge_step=first_step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values of one step."""
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a killed process left unfinished is not a row."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextmanager
def progress(name: str, total: int, done: int, enabled: bool) -> Iterator[Any]:
    """A function ``advance(count, note)``: a bar with ETA on a terminal, else a line now and then, on stderr."""
    if not enabled:
        yield lambda count=1, note="": None
        return
    if not sys.stderr.isatty():
        yield _LineProgress(name, total, done)
        return
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

        def advance(count: int = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


class _LineProgress:
    """Progress in a log file: a line at the start, then at most one every ten seconds, and one at the end."""

    def __init__(self, name: str, total: int, done: int, every_seconds: float = 10.0) -> None:
        self.name, self.total, self.done, self.first = name, total, done, done
        self.start = self.last = time.monotonic()
        self.every_seconds = every_seconds
        self._print("")

    def __call__(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every_seconds or self.done >= self.total:
            self.last = now
            self._print(note)

    def _print(self, note: str) -> None:
        elapsed = time.monotonic() - self.start
        eta = elapsed / max(1, self.done - self.first) * (self.total - self.done) if self.done > self.first else 0
        parts = [f"{self.name}: {self.done}/{self.total}", f"{elapsed:.0f} s", f"eta {eta:.0f} s"]
        print(
            ", ".join(parts if self.done > self.first else parts[:1]) + (f", {note}" if note else ""), file=sys.stderr
        )


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by its name, None if it is not in the table."""
    return next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)
