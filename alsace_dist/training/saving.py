"""Saves checkpoints while training goes on: a step waits for the copy of this rank's own state, a thread writes it."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import FileEntry, remove_own, write_manifest, write_text
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training import checkpoint
from alsace_dist.training.checkpoint import INDEX, KIND, OWN_FILES, Index, Slice
from alsace_dist.training.engine import TrainEngine
from alsace_dist.training.evaluator import Best
from alsace_dist.training.state import WEIGHT, shape_of
from alsace_dist.training.tensor_file import FILE_BYTES, write_tensors

LOOK_SECONDS = 0.5  # between two looks at how far the writers are


@dataclass
class _File:
    """A file to write: slices of parameters, and their elements one after the other in a flat tensor for each key."""

    slices: list[Slice] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(numel for _, _, numel in self.slices)


def cut(engine: TrainEngine, max_bytes: int) -> list[_File]:
    """What this rank is to write, in files of at most ``max_bytes`` (and Adafactor's moments); nothing is copied."""
    most = max(1, max_bytes // (4 * (1 + len(engine.moments or ()))))
    files = [_File()]
    for number, name in enumerate(engine.parameters):
        if not (own := engine.layout.own(name)):
            continue
        start, last = own[WEIGHT].offset, own[WEIGHT].end
        while start < last:
            if files[-1].numel >= most:
                files.append(_File())
            size = min(last - start, most - files[-1].numel)
            files[-1].slices.append((number, start, size))
            start += size
    return [file for file in files if file.slices]


def copy(engine: TrainEngine, files: list[_File]) -> None:
    """Copy this rank's state as it is now; on a GPU into pinned memory, which is the fastest way out of it."""
    on_gpu = engine.ranks.device.type == "cuda"
    names = list(engine.parameters)
    for file in files:
        for key in (WEIGHT, *(engine.moments or ())):
            file.tensors[key] = torch.empty(file.numel, pin_memory=on_gpu)
        position = 0
        for number, start, size in file.slices:
            for key, piece in engine.layout.own(names[number]).items():
                values = piece.values[start - piece.offset : start - piece.offset + size]
                file.tensors[key][position : position + size].copy_(values, non_blocking=True)
            position += size
            if start == 0:
                for key, value in engine.layout.own_extras(names[number]).items():
                    file.tensors[f"{names[number]}/{key}"] = value.detach().to("cpu", torch.float32, copy=True)
    if on_gpu:
        torch.cuda.synchronize()


class _Writer(threading.Thread):
    """Writes this rank's files of one checkpoint. ``error``: what has kept it from that. ``seconds``: from before the
    copy to the end."""

    def __init__(self, target: Path, rank: int, step: int, num_skipped: int, best: Best, files: list[_File]) -> None:
        super().__init__(daemon=True)  # a rank that fails meanwhile does not wait for a slow disk
        self.target, self.step, self.num_skipped, self.files = target, step, num_skipped, files
        self.names = [f"rank{rank:05d}-{number:05d}.safetensors" for number in range(len(files))]
        self.entries: dict[str, FileEntry] = {}
        self.error: Exception | None = None
        self.num_bytes, self.seconds, self._start = 0, 0.0, time.monotonic()
        self.best = best

    def run(self) -> None:
        try:
            for name, file in zip(self.names, self.files, strict=True):
                self.entries[name] = write_tensors(self.target / name, file.tensors, self._advance)
                file.tensors.clear()  # its memory is for the next checkpoint
        except Exception as error:
            self.error = error
        self.seconds = time.monotonic() - self._start

    def _advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def check(self) -> None:
        """Raises what has kept it from writing."""
        if self.error is not None:
            raise self.error


class Saver:
    """Saves the checkpoints of one training, one at a time. ``begin`` and ``finish`` are collective.

    A checkpoint counts once ``finish`` has written its manifest; until then the one before stays.
    """

    def __init__(
        self,
        directory: Path,
        engine: TrainEngine,
        fingerprint: dict[str, Any],
        keep: int,
        watchdog: Watchdog,
        on_saved: Callable[[int, int, float, float], None],
        max_bytes: int = FILE_BYTES,
    ) -> None:
        """``keep``: how many checkpoints stay. ``on_saved``: called with the step, the bytes of all ranks, the seconds
        that the step waited and those until all was written, of the slowest rank. ``max_bytes``: of a file."""
        self.directory, self.engine, self.fingerprint, self.keep = directory, engine, fingerprint, keep
        self.watchdog, self.on_saved, self.max_bytes = watchdog, on_saved, max_bytes
        self._writer: _Writer | None = None
        self._saved = 0, 0.0
        self._completed: int | None = None  # the step of the last checkpoint
        self.best = Best()

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not written all of its part yet."""
        return self._writer is not None and self._writer.is_alive()

    def begin(self, step: int) -> None:
        """Copy the state after ``step`` steps, and begin to write it; waits for a checkpoint that is being written.
        One that is complete already stays as it is: it may be the only one.

        Raises ``UserError`` on every rank, before anything is written, if there is no room for it.
        """
        begin = time.monotonic()
        self.finish()
        if step == self._completed:
            return
        ranks, target = self.engine.ranks, checkpoint.path_of(self.directory, step)
        files = cut(self.engine, self.max_bytes)
        num_bytes = 4 * sum(file.numel for file in files) * (1 + len(self.engine.moments or ()))
        (total,) = ranks.sum(num_bytes)
        ranks.main_first(lambda: _make_room(target, round(total)))
        self._writer = _Writer(target, ranks.rank, step, self.engine.num_skipped, replace(self.best), files)
        copy(self.engine, files)
        self._writer.start()
        self._saved = round(total), time.monotonic() - begin

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it.

        Raises on every rank if one could not write its part: there its own error, else ``PeerFailed``.
        """
        writer = self._writer
        if writer is None:
            return
        ranks, seen = self.engine.ranks, -1
        while True:  # agreed, so that progress of one rank is progress of all
            is_writing, has_moved = ranks.any_rank(writer.is_alive(), writer.num_bytes > seen)
            if not is_writing:
                break
            seen = writer.num_bytes
            if has_moved:
                self.watchdog.beat(f"the end of writing the checkpoint after step {writer.step}")
            writer.join(LOOK_SECONDS)
        self._writer = None
        ranks.each(writer.check)
        slices = dict(zip(writer.names, (file.slices for file in writer.files), strict=True))
        parts = ranks.to_main((writer.entries, slices))
        details: dict[str, Any] = {"step": writer.step}
        details |= {"skipped": writer.num_skipped} if writer.num_skipped else {}
        details |= {"best": asdict(writer.best)} if writer.best.step else {}
        ranks.main_first(lambda: self._complete(writer.target, details, parts or []))
        self._completed = writer.step
        num_bytes, blocking_seconds = self._saved
        self.on_saved(writer.step, num_bytes, *ranks.most(blocking_seconds, writer.seconds))

    def _complete(
        self, target: Path, details: dict[str, Any], parts: list[tuple[dict[str, FileEntry], dict[str, list[Slice]]]]
    ) -> None:
        """Write index and manifest, then delete all checkpoints but this one and the ``keep - 1`` before."""
        parameters = [(name, list(shape_of(parameter))) for name, parameter in self.engine.parameters.items()]
        files = {name: slices for _, one in parts for name, slices in one.items()}
        # Not as write_json does it, a line for each number: of 512 ranks there are a million.
        write_text(target / INDEX, json.dumps(Index(parameters=parameters, files=files).model_dump()) + "\n")
        entries = {name: entry for one, _ in parts for name, entry in one.items()}
        write_manifest(target, KIND, self.fingerprint, [target / INDEX], details, entries)
        # Checkpoints of later steps are broken: ``newest`` skipped them. They go, too.
        finished = [path for path in checkpoint.finished(self.directory) if path <= target]
        best = checkpoint.path_of(self.directory, details.get("best", {}).get("step", 0))
        kept = finished[: self.keep] + [path for path in finished if path == best]
        for old in set(checkpoint.directories(self.directory)) - set(kept):
            remove_own(old, OWN_FILES)


def _make_room(target: Path, num_bytes: int) -> None:
    """Remove what a start that was killed has left there. Raises ``UserError`` if the disk has too little room."""
    remove_own(target, OWN_FILES)
    target.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(target)
    if disk.total and disk.free < num_bytes:  # some file systems do not tell
        raise UserError(
            f"{target}: a checkpoint takes {num_bytes:,} bytes, and {disk.free:,} are free there; free space, then run "
            "the same command again"
        )
