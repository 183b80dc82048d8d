"""Checkpoints for training, and models for people.

A checkpoint is a directory ``step-00000042`` of safetensors files (per trainable parameter the float32 weight and the
optimizer's moments, whole) and a manifest. It holds nothing of the ZeRO stage or the world size, so a run may go on
with others; and nothing that is executed on loading, as DeepSpeed's pickles are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import (
    MANIFEST,
    STARTED,
    Manifest,
    atomic_path,
    file_entry,
    load_manifest,
    verify_file,
    write_json,
    write_manifest,
)
from alsace_dist.models.mt5 import HEAD, Weights, head_key
from alsace_dist.ranks.group import Runtime
from alsace_dist.training.engine import WEIGHT, TrainEngine

KIND = "checkpoint"
NOT_COPIED = (MANIFEST, STARTED)
FILE_BYTES = 4 << 30  # largest part that a rank holds in memory before it writes


def save(directory: Path, engine: TrainEngine, step: int, fingerprint: dict[str, Any], keep: int) -> None:
    """Write a checkpoint after ``step`` optimizer steps and delete all but it and the ``keep - 1`` before. Collective.

    Parameters are gathered one at a time; each rank keeps and writes its share.
    """
    runtime = engine.runtime
    target = directory / f"step-{step:08d}"
    writer = _PartWriter(target, f"rank{runtime.rank:05d}")
    loads = [0] * runtime.world_size
    for name, parameter in engine.parameters.items():
        owner = loads.index(min(loads))
        loads[owner] += getattr(parameter, "ds_numel", parameter.numel())
        tensors = engine.state(name)  # collective, so also on ranks that do not keep it
        if owner == runtime.rank:
            writer.add({f"{name}/{key}": value for key, value in tensors.items()})
    writer.flush()
    entries = {name: entry for part in runtime.gather(writer.entries) for name, entry in part.items()}

    def finish() -> None:
        write_manifest(target, KIND, fingerprint, [], {"step": step}, entries)
        # One of a later step did not verify, or training would have gone on from there.
        kept = [path for path in _steps(directory) if path <= target][:keep]
        for old in set(directory.glob("step-*")) - set(kept):
            (old / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
            shutil.rmtree(old)

    runtime.main_first(finish)


class _PartWriter:
    """Collects tensors and writes them as safetensors files of a bounded size."""

    def __init__(self, directory: Path, prefix: str, max_bytes: int = FILE_BYTES) -> None:
        self.directory, self.prefix, self.max_bytes = directory, prefix, max_bytes
        self.entries: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, list[str]] = {}
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._bytes + size > self.max_bytes:
            self.flush()
        self._pending |= tensors
        self._bytes += size

    def flush(self) -> None:
        if not self._pending:
            return
        path = self.directory / f"{self.prefix}-{len(self.entries):05d}.safetensors"
        with atomic_path(path) as temporary:
            try:
                save_file(self._pending, temporary, metadata={"format": "pt"})
            except SafetensorError as error:  # how it says that the disk is full
                raise UserError(f"{path}: {error}; free space, then run the same command again") from None
        self.entries[path.name] = file_entry(path)
        self.keys[path.name] = list(self._pending)
        self._pending, self._bytes = {}, 0


def _steps(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return sorted((path.parent for path in directory.glob(f"step-*/{MANIFEST}")), reverse=True)


def newest(directory: Path, fingerprint: dict[str, Any], runtime: Runtime) -> tuple[Path, int] | None:
    """The newest checkpoint whose files all verify, and its step; None if training has not got that far. Collective.

    Raises ``UserError`` if there are checkpoints but none that verifies: starting over must be a person's decision.
    """
    problems: list[str] = []
    for path in runtime.gather(_steps(directory))[0]:
        problem = ""
        try:
            manifest = load_manifest(path, KIND)
            if manifest.fingerprint != json.loads(json.dumps(fingerprint)):
                raise UserError(f"{path}: of another configuration; delete {directory}")
            for name in sorted(manifest.files)[runtime.rank :: runtime.world_size]:
                verify_file(path, manifest, name)
            step = int(manifest.details["step"])
        except UserError as error:
            problem = str(error).split("; ")[0]
        found = [text for text in runtime.gather(problem) if text]
        if not found:
            return path, step
        problems += found
    if problems:
        raise UserError(f"{problems[0]}; restore the file, or delete {directory} to train from the start")
    return None


def load(path: Path, engine: TrainEngine, step: int) -> None:
    """Set an engine to a checkpoint that ``newest`` found, whatever wrote it. Collective under ZeRO-3."""
    manifest: Manifest = load_manifest(path, KIND)
    where: dict[str, dict[str, Any]] = {}
    opened = [_open(path / name) for name in manifest.files]
    for file in opened:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, _, part = key.rpartition("/")
            where.setdefault(name, {})[part] = file
    if where.keys() != engine.parameters.keys():
        different = sorted(where.keys() ^ engine.parameters.keys())
        raise UserError(f"{path}: its parameters are not the model's (first: {different[0]}); delete it to start over")
    for name, parameter in engine.parameters.items():
        state = {part: file.get_tensor(f"{name}/{part}") for part, file in where[name].items()}
        if state[WEIGHT].shape != getattr(parameter, "ds_shape", parameter.shape):
            raise UserError(f"{path}: {name} has another shape than the model's; delete it to start over")
        engine.load_weight(name, state.pop(WEIGHT))
        engine.load_moments(name, state)
    engine.set_num_steps(step)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def export(
    directory: Path, engine: TrainEngine, source: Path, head_rows: list[int] | None, max_bytes: int = FILE_BYTES
) -> None:
    """Write the trained weights as a ``transformers`` directory, in float32. Collective; rank 0 writes.

    What was not trained comes from ``source``, the model that training began with, as do config and tokenizer.
    ``head_rows``: vocabulary ids of the rows that the engine's head holds, which are spliced into the source's whole
    head; None: the engine's head is whole, and the source has no weights.
    """
    runtime = engine.runtime
    writer = _PartWriter(directory, "part", max_bytes)
    weights = Weights(source) if head_rows is not None else None
    trained = set()
    for name in engine.parameters:
        value = engine.state(name)[WEIGHT]  # collective, so also on ranks that do not write
        key = HEAD if name == "head.weight" else name.removeprefix("body.")
        trained.add(key)
        if runtime.is_main:
            if key == HEAD and weights is not None:
                whole = weights.tensor(head_key(weights)).float().clone()
                whole[head_rows] = value
                value = whole
            writer.add({key: value})

    def finish() -> None:
        for key in sorted(weights.keys() - trained) if weights else ():
            if not key.endswith("embed_tokens.weight"):  # a copy of the embedding that some checkpoints hold
                writer.add({key: weights.tensor(key).float()})  # type: ignore[union-attr]
        writer.flush()
        _name_for_transformers(directory, writer)
        for file in source.iterdir():
            if file.suffix in (".json", ".model") and file.name not in NOT_COPIED and "index" not in file.name:
                with atomic_path(directory / file.name) as temporary:
                    shutil.copyfile(file, temporary)

    runtime.main_first(finish)


def _name_for_transformers(directory: Path, writer: _PartWriter) -> None:
    """Give the parts the names under which ``from_pretrained`` looks for them."""
    if len(writer.keys) == 1:
        (directory / next(iter(writer.keys))).replace(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (part, keys) in enumerate(writer.keys.items(), start=1):
        name = f"model-{number:05d}-of-{len(writer.keys):05d}.safetensors"
        (directory / part).replace(directory / name)
        weight_map |= dict.fromkeys(keys, name)
    total = sum(entry["bytes"] for entry in writer.entries.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
