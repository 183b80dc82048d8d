"""Models for people: trained weights as a ``transformers`` directory, in files that the ranks write together."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alsace_dist.config import ExportType
from alsace_dist.files.manifest import MANIFEST, STARTED, FileEntry, copy_file, read_json, write_json
from alsace_dist.models.family import TrainableModel, Unit
from alsace_dist.training.engine import TrainEngine
from alsace_dist.training.state import WEIGHT, shape_of
from alsace_dist.training.tensor_file import FILE_BYTES, write_tensors

DTYPES: dict[ExportType, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
COPIED = (".json", ".model")  # suffixes of a model's config and tokenizer
NOT_COPIED = (MANIFEST, STARTED)
WEIGHTS = re.compile(r"(part-\d{5,}|model|model-\d{5,}-of-\d{5,})\.safetensors|model\.safetensors\.index\.json")


class PartWriter:
    """Collects the tensors of a file in the type of the export, and writes them."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        self.entries: dict[str, FileEntry] = {}
        self.keys: dict[str, list[str]] = {}
        self._pending: dict[str, Tensor] = {}

    @property
    def names(self) -> set[str]:
        """Names of all tensors so far."""
        return {key for keys in self.keys.values() for key in keys} | self._pending.keys()

    @property
    def num_bytes(self) -> int:
        """Size of what is not written yet."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._pending.values())

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for the next file."""
        self._pending |= {key: tensor.to(self.dtype).contiguous() for key, tensor in tensors.items()}

    def write(self, number: int) -> None:
        """Write what is kept, if anything, as the part of this number."""
        if self._pending:
            name = f"part-{number:05d}.safetensors"
            self.entries[name] = write_tensors(self.directory / name, self._pending)
            self.keys[name] = list(self._pending)
            self._pending = {}


def export(
    directory: Path,
    engine: TrainEngine,
    model: TrainableModel,
    dtype: ExportType = "float32",
    max_bytes: int = FILE_BYTES,
) -> dict[str, FileEntry]:
    """Write the trained weights as a ``transformers`` directory. Collective.

    Files are dealt to the ranks: a parameter is gathered to the one that writes it, and as many files are written at a
    time as there are ranks. Which tensors a file holds does not depend on their number. What was not trained comes from
    the model that training began with, as do config and tokenizer: rank 0 writes that. ``max_bytes``: of a file; but a
    head of which some rows were trained is written whole, whatever its size. Returns, on rank 0, the files of weights
    for a manifest.
    """
    ranks = engine.ranks
    parts = _parts(engine, model, max_bytes // DTYPES[dtype].itemsize)
    writer = PartWriter(directory, DTYPES[dtype])
    last = len(parts) - 1
    for number, units in enumerate(parts):
        owner = (last - number) % ranks.world_size  # rank 0 has the last
        for unit in units:
            # Collective: ranks that do not write take part.
            values = {name: engine.layout.whole(name, WEIGHT, owner) for name in unit.names}
            if owner == ranks.rank:
                values = {name: value.detach().float().cpu() for name, value in values.items()}
                for name, value in model.merged(values).items():
                    writer.add(model.exported(name, value))
        if owner == 0:  # every rank has one now; into rank 0's last comes what was not trained, too
            is_kept = ranks.is_main and number == last
            ranks.each((lambda: None) if is_kept else partial(writer.write, number - ranks.rank))
    written = ranks.to_main((writer.entries, writer.keys))
    entries: dict[str, FileEntry] = {}

    def finish() -> None:
        for part_entries, keys in written or ():
            writer.entries |= part_entries
            writer.keys |= keys
        _write_remaining(writer, model, last, max_bytes)
        entries.update(_name_for_transformers(directory, writer))
        for file in model.directory.iterdir():
            if file.suffix in COPIED and file.name not in NOT_COPIED and "index" not in file.name:
                copy_file(file, directory / file.name)
        _change_config(directory / "config.json", model.config_changes, dtype)

    ranks.main_first(finish)
    return entries


def _parts(engine: TrainEngine, model: TrainableModel, most: int) -> list[list[Unit]]:
    """The trained parameters by file, of at most so many elements, or one unit."""
    parts: list[list[Unit]] = [[]]
    size = 0
    for unit in model.units({name: shape_of(parameter) for name, parameter in engine.parameters.items()}):
        if parts[-1] and size + unit.numel > most:
            parts.append([])
            size = 0
        parts[-1].append(unit)
        size += unit.numel
    return parts


def _write_remaining(writer: PartWriter, model: TrainableModel, number: int, max_bytes: int) -> None:
    """Write what is kept and the tensors that were not trained, in parts from this number on."""
    for key, value in model.remaining(writer.names):
        if writer.num_bytes and writer.num_bytes + value.numel() * writer.dtype.itemsize > max_bytes:
            writer.write(number)
            number += 1
        writer.add({key: value})
    writer.write(number)


def _change_config(path: Path, changes: Mapping[str, Any], dtype: ExportType) -> None:
    """Give keys of a config.json other values: those of ``changes``, and the type of the weights where it names one.

    ``from_pretrained`` would convert the weights to the type that config.json names, those of a part of the model, such
    as a vision tower, to the type that the part's section names.
    """
    config = read_json(path, "train again")
    name = str(DTYPES[dtype]).removeprefix("torch.")
    wanted = _in_type({**config, **changes}, name)
    if dtype != "float32" and "torch_dtype" not in wanted:
        wanted["dtype"] = name
    if wanted != config:
        write_json(path, wanted)


def _in_type(value: Any, name: str) -> Any:
    """A config, or a value of one, in which every type of weights is this one."""
    if not isinstance(value, dict):
        return value
    types = {key: name for key in ("dtype", "torch_dtype") if value.get(key)}
    return {key: _in_type(one, name) for key, one in value.items()} | types


def _name_for_transformers(directory: Path, writer: PartWriter) -> dict[str, FileEntry]:
    """Give the parts the names under which ``from_pretrained`` looks for them; the files of weights for a manifest."""
    names = dict.fromkeys(writer.keys, "model.safetensors")
    if len(names) > 1:
        order = enumerate(sorted(writer.keys), start=1)
        names = {part: f"model-{number:05d}-of-{len(names):05d}.safetensors" for number, part in order}
    for part, name in names.items():
        (directory / part).replace(directory / name)
    entries = {name: writer.entries[part] for part, name in names.items()}
    if len(names) > 1:
        weight_map = {key: names[part] for part, keys in writer.keys.items() for key in keys}
        total = sum(entry["bytes"] for entry in entries.values())
        index = directory / "model.safetensors.index.json"
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return entries
