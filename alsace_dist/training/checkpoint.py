"""Checkpoints for training: free of world size and ZeRO stage.

A checkpoint is a directory ``step-00000042`` of safetensors files (per trainable parameter the float32 weight and the
optimizer's moments, whole) and a manifest. It holds nothing of the ZeRO stage or the world size, so a run may go on
with others; and nothing that is executed on loading, as DeepSpeed's pickles are.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, Manifest, load_manifest, remove_own, verify_file, write_manifest
from alsace_dist.ranks.group import Ranks
from alsace_dist.reading import shorten
from alsace_dist.training.engine import WEIGHT, TrainEngine
from alsace_dist.training.export import PartWriter

KIND = "checkpoint"
_STEP = re.compile(r"step-\d{8,}")
_PART = re.compile(r"rank\d{5,}-\d{5,}\.safetensors")


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
        for old in set(_directories(directory)) - set(kept):
            remove_own(old, _PART)

    ranks.main_first(finish)


def drop(directory: Path) -> None:
    """Delete all checkpoints of a training that is complete."""
    for path in _directories(directory):
        remove_own(path, _PART)
    with suppress(OSError):  # there was none, or a person keeps something there
        directory.rmdir()


def _directories(directory: Path) -> list[Path]:
    """Checkpoints, finished or not, newest first. A copy that a person has made under another name is none of them."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(
        (path for path in found if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()), reverse=True
    )


def _steps(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return [path for path in _directories(directory) if (path / MANIFEST).exists()]


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
            step = step_of(path, manifest)
        except UserError as error:
            problem = str(error).split("; ")[0]
        found = [text for text in ranks.gather(problem) if text]
        if not found:
            return path, step
        problems += found
    if problems:
        raise UserError(f"{problems[0]}; restore the file, or delete {directory} to train from the start")
    return None


def step_of(path: Path, manifest: Manifest) -> int:
    """The step after which a checkpoint was written. Raises ``UserError`` if it is not that of its directory's name."""
    step = manifest.details.get("step")
    if type(step) is not int or path.name != f"step-{step:08d}":
        raise UserError(f"{path}: {MANIFEST} says step {shorten(repr(step))}, which is not that of its name")
    return step


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
        if problem := problem_of(state, tuple(getattr(parameter, "ds_shape", parameter.shape)), engine.moments):
            raise UserError(f"{path}: {name} {problem}; delete it to start over")
        engine.load_weight(name, state.pop(WEIGHT))
        engine.load_moments(name, state)
    engine.set_num_steps(step)


def problem_of(state: dict[str, Tensor], shape: tuple[int, ...], moments: tuple[str, ...] | None) -> str:
    """What is wrong with one parameter's weight and moments, in words; empty if nothing is.

    ``moments``: the names of the optimizer's moments, which have the weight's shape; None: shapes of their own.
    """
    if WEIGHT not in state or (moments is not None and state.keys() != {WEIGHT, *moments}):
        return f"has {', '.join(sorted(state))}, not {', '.join((WEIGHT, *(moments or ())))}"
    for part, value in state.items():
        if tuple(value.shape) != shape and (part == WEIGHT or moments is not None):
            return f"has another shape than the model's ({part}: {tuple(value.shape)}, not {shape})"
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            return f"holds what is no finite number ({part}, {str(value.dtype).removeprefix('torch.')})"
    if moments is not None and bool((state[moments[-1]] < 0).any()):
        return f"has squares below 0 ({moments[-1]})"
    return ""


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); delete {path.parent}") from None
