"""Checkpoints for training: free of world size and ZeRO stage.

A checkpoint is a directory ``step-00000042`` of safetensors files, an index and a manifest. Each rank has written files
of its own with slices of the flattened parameters: the float32 weights and the optimizer's moments of the elements that
were its own. The index says which file holds which elements. So any number of ranks at any ZeRO stage finds what it
holds of them, whatever wrote them; and nothing is executed on loading, as DeepSpeed's pickles are. ``saving`` writes
checkpoints.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, Manifest, load_manifest, read_json, remove_own, verify_file
from alsace_dist.ranks.group import Ranks
from alsace_dist.reading import shorten
from alsace_dist.training.engine import TrainEngine
from alsace_dist.training.evaluator import Best
from alsace_dist.training.state import SQUARES, WEIGHT, shape_of

KIND = "checkpoint"
INDEX = "slices.json"
OWN_FILES = re.compile(r"rank\d{5,}-\d{5,}\.safetensors|slices\.json")
START_OVER = "delete it to start over"
_STEP = re.compile(r"step-\d{8,}")

_Number = Annotated[int, Field(strict=True, ge=0)]
# Elements of a parameter: its number in the index, the first element, how many.
Slice = tuple[_Number, _Number, _Number]


class Index(Section):
    """Where a checkpoint's elements are. ``parameters``: names and shapes. ``files``: the slices of each file, in the
    order in which they stand in its flat tensors, one for the weights and one for each of the optimizer's moments."""

    parameters: list[tuple[str, list[_Number]]]
    files: dict[str, list[Slice]]

    def name_of(self, one: Slice) -> str:
        """Name of the parameter that a slice is of."""
        return self.parameters[one[0]][0]


def drop(directory: Path) -> None:
    """Delete all checkpoints of a training that is complete."""
    for path in directories(directory):
        remove_own(path, OWN_FILES)
    with suppress(OSError):  # there was none, or a person keeps something there
        directory.rmdir()


def directories(directory: Path) -> list[Path]:
    """Checkpoints, finished or not, newest first. A copy that a person has made under another name is none of them."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(
        (path for path in found if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()), reverse=True
    )


def finished(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return [path for path in directories(directory) if (path / MANIFEST).exists()]


def path_of(directory: Path, step: int) -> Path:
    """Directory of the checkpoint after a step."""
    return directory / f"step-{step:08d}"


def newest(
    directory: Path, fingerprint: dict[str, Any], ranks: Ranks, step_wanted: int | None = None
) -> tuple[Path, int] | None:
    """The newest checkpoint whose files all verify, and its step; None if training has not got that far. Collective.

    ``step_wanted``: only the one after this step is looked at.
    Raises ``UserError`` if there are checkpoints but none that verifies: starting over must be a person's decision.
    """
    problems: list[str] = []
    remedy = "restore the file"
    listed = finished(directory) if step_wanted is None else [path_of(directory, step_wanted)]
    for path in ranks.from_main(listed):
        problem = ""
        try:
            manifest = load_manifest(path, KIND)
            if INDEX not in manifest.files:
                remedy = remedy if problems else "finish the training with that version"
                raise UserError(f"{path}: was written by an older alsace_dist, in a format that this one does not read")
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
        raise UserError(f"{problems[0]}; {remedy}, or delete {directory} to train from the start")
    return None


def step_of(path: Path, manifest: Manifest) -> int:
    """The step after which a checkpoint was written. Raises ``UserError`` if it is not that of its directory's name."""
    step = manifest.details.get("step")
    if type(step) is not int or path.name != f"step-{step:08d}":
        raise UserError(f"{path}: {MANIFEST} says step {shorten(repr(step))}, which is not that of its name")
    return step


def num_skipped_of(path: Path, step: int) -> int:
    """How many of the steps before a checkpoint have changed nothing. Raises ``UserError`` if it tells no such
    number."""
    found = load_manifest(path, KIND).details.get("skipped", 0)
    if type(found) is not int or not 0 <= found <= step:
        raise UserError(f"{path}: {MANIFEST} says {shorten(repr(found))} steps were skipped; {START_OVER}")
    return found


def best_of(path: Path) -> Best:
    """The best measurement before a checkpoint; that of none where there was none. Raises ``UserError`` if it is no
    such thing."""
    found = load_manifest(path, KIND).details.get("best", {})
    keys = {"step": int, "value": float, "num_since": int}
    if found and not (isinstance(found, dict) and {name: type(value) for name, value in found.items()} == keys):
        raise UserError(f"{path}: {MANIFEST} says of the best measurement {shorten(repr(found))}; {START_OVER}")
    return Best(**found)


def load(path: Path, engine: TrainEngine, step: int) -> None:
    """Set an engine to a checkpoint that ``newest`` found, whatever wrote it. Collective.

    Each rank reads the elements that it holds, and no others. Raises ``UserError`` on every rank if a rank finds what
    no training has left.
    """
    engine.ranks.each(lambda: _load(path, engine))
    engine.set_num_steps(step, num_skipped_of(path, step))


def _load(path: Path, engine: TrainEngine) -> None:
    shapes = {name: list(shape_of(parameter)) for name, parameter in engine.parameters.items()}
    index = validate(Index, read_json(path / INDEX), f"{path / INDEX}: ", START_OVER)
    check_index(index, shapes, path / INDEX)
    if index.files.keys() != load_manifest(path, KIND).files.keys() - {INDEX}:  # verified, and of this directory
        _refuse(path / INDEX, "", f"lists other files than {MANIFEST}")
    keys = (WEIGHT, *(engine.moments or ()))
    held = {name: {key: engine.layout.range_of(name, key) for key in keys} for name in shapes}
    engine.layout.release()
    for name, slices in index.files.items():
        if any(_shared(held[index.name_of(one)][key], one) for one in slices for key in keys):
            _load_file(path / name, index, slices, held, engine)


def _load_file(
    path: Path, index: "Index", slices: "list[Slice]", held: dict[str, dict[str, tuple[int, int]]], engine: TrainEngine
) -> None:
    """Read of one file what this rank holds; of Adafactor's moments, which all ranks hold whole, all there are."""
    with open_file(path, engine.moments, sum(one[2] for one in slices)) as file:
        position = 0  # of the slice within the file's flat tensors
        for one in slices:
            _, offset, numel = one
            name = index.name_of(one)
            for key, range_ in held[name].items():
                if shared := _shared(range_, one):
                    start, end = shared
                    values = file.get_slice(key)[position + start - offset : position + end - offset]
                    _refuse(path, f"{name}/{key}", problem_of(key, values))
                    engine.layout.put(name, key, start, values)
            position += numel
        extras: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, slash, part = key.rpartition("/")
            if slash:
                extras.setdefault(name, {})[part] = file.get_tensor(key)
                _refuse(path, key, problem_of(part, extras[name][part]))
        for name, values in extras.items():
            _refuse(path, name, "is no parameter of the model" if name not in engine.parameters else "")
            engine.layout.put_extras(name, values)


def _shared(range_: tuple[int, int], one: "Slice") -> tuple[int, int] | None:
    """The elements that are in a range and in a slice."""
    start, end = max(range_[0], one[1]), min(range_[1], one[1] + one[2])
    return (start, end) if start < end else None


def _refuse(path: Path, what: str, problem: str) -> None:
    if problem:
        raise UserError(f"{path}: {f'{what} ' if what else ''}{problem}; {START_OVER}")


def check_index(index: "Index", shapes: Mapping[str, list[int]], path: Path) -> None:
    """Raises ``UserError`` unless the index is of parameters of these names and shapes, and has each element once."""
    found = dict(index.parameters)
    if different := sorted(found.keys() ^ shapes.keys()) or sorted(
        name for name in shapes if found[name] != shapes[name]
    ):
        name = different[0]
        what = f"{name}: {found.get(name, 'not there')}, not {shapes.get(name, 'there')}"
        raise UserError(f"{path}: its parameters are not the model's ({what}); {START_OVER}")
    reached = [0] * len(index.parameters)
    for number, offset, numel in sorted(one for slices in index.files.values() for one in slices):
        if number >= len(reached) or offset != reached[number]:
            break
        reached[number] += numel
    else:
        if reached == [prod(shape) for _, shape in index.parameters]:
            return
    raise UserError(f"{path}: does not have each element of each parameter once; {START_OVER}")


def problem_of(key: str, values: Tensor) -> str:
    """What is wrong with elements of a weight or of a moment, in words; empty if nothing is."""
    if not bool(values.isfinite().all()):
        return "holds what is no finite number"
    if key == SQUARES and bool((values < 0).any()):
        return "has squares below 0"
    return ""


@contextmanager
def open_file(path: Path, moments: tuple[str, ...] | None, numel: int) -> Iterator[Any]:
    """A file of a checkpoint, opened with safetensors.

    ``moments``: of the optimizer; None: Adafactor's, of any names. ``numel``: elements that the index lists of it.
    Raises ``UserError`` if it does not hold so many of the weights and of each moment in float32.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); delete {path.parent}") from None
    with opened as file:
        wanted = {WEIGHT, *(moments or ())}
        keys = set(file.keys())
        if wanted != (keys if moments is not None else {key for key in keys if "/" not in key}):
            _refuse(path, "", f"has {', '.join(sorted(keys)[:4])}, not {', '.join(sorted(wanted))}")
        for key in sorted(keys):
            tensor = file.get_slice(key)
            if tensor.get_dtype() != "F32" or (key in wanted and tensor.get_shape() != [numel]):
                found = f"{tensor.get_dtype()} {tensor.get_shape()}"
                _refuse(path, key, f"is {found}, not {f'F32 [{numel}]' if key in wanted else 'F32'}")
        yield file
