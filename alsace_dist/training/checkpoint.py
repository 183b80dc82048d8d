"""Checkpoints for training: free of world size and ZeRO stage.

A checkpoint is a directory ``step-00000042`` of safetensors files (per trainable parameter the float32 weight and the
optimizer's moments, whole) and a manifest. It holds nothing of the ZeRO stage or the world size, so a run may go on
with others; and nothing that is executed on loading, as DeepSpeed's pickles are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, Manifest, load_manifest, verify_file, write_manifest
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.engine import WEIGHT, TrainEngine
from alsace_dist.training.export import PartWriter

KIND = "checkpoint"


def save(directory: Path, engine: TrainEngine, step: int, fingerprint: dict[str, Any], keep: int) -> None:
    """Write a checkpoint after ``step`` optimizer steps and delete all but it and the ``keep - 1`` before. Collective.

    Parameters are gathered one at a time; each rank keeps and writes its share.
    """
    ranks = engine.ranks
    target = directory / f"step-{step:08d}"
    writer = PartWriter(target, f"rank{ranks.rank:05d}")
    loads = [0] * ranks.world_size
    for name, parameter in engine.parameters.items():
        owner = loads.index(min(loads))
        loads[owner] += getattr(parameter, "ds_numel", parameter.numel())
        tensors = engine.state(name)  # collective: ranks that do not keep the tensors take part
        if owner == ranks.rank:
            writer.add({f"{name}/{key}": value for key, value in tensors.items()})
    writer.flush()
    entries = {name: entry for part in ranks.gather(writer.entries) for name, entry in part.items()}

    def finish() -> None:
        write_manifest(target, KIND, fingerprint, [], {"step": step}, entries)
        # Checkpoints of later steps are broken: ``newest`` skipped them. They go, too.
        kept = [path for path in _steps(directory) if path <= target][:keep]
        for old in set(directory.glob("step-*")) - set(kept):
            (old / MANIFEST).unlink(
                missing_ok=True
            )  # the manifest goes first: no half-deleted checkpoint is taken for whole
            shutil.rmtree(old)

    ranks.main_first(finish)


def _steps(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return sorted((path.parent for path in directory.glob(f"step-*/{MANIFEST}")), reverse=True)


def newest(directory: Path, fingerprint: dict[str, Any], ranks: Ranks) -> tuple[Path, int] | None:
    """The newest checkpoint whose files all verify, and its step; None if training has not got that far. Collective.

    Raises ``UserError`` if there are checkpoints but none that verifies: starting over must be a person's decision.
    """
    problems: list[str] = []
    for path in ranks.from_main(_steps(directory)):
        problem = ""
        try:
            manifest = load_manifest(path, KIND)
            if manifest.fingerprint != json.loads(json.dumps(fingerprint)):
                raise UserError(f"{path}: of another configuration; delete {directory}")
            for name in sorted(manifest.files)[ranks.rank :: ranks.world_size]:
                verify_file(path, manifest, name)
            step = int(manifest.details["step"])
        except UserError as error:
            problem = str(error).split("; ")[0]
        found = [text for text in ranks.gather(problem) if text]
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
