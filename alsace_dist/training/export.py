"""Models for people: trained weights as a ``transformers`` directory, and tensors written in files of bounded size."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import MANIFEST, STARTED, FileEntry, atomic_path, file_entry, read_json, write_json
from alsace_dist.models.family import TrainableModel
from alsace_dist.training.engine import TrainEngine
from alsace_dist.training.state import WEIGHT
from alsace_dist.training.tensor_file import FILE_BYTES

COPIED = (".json", ".model")  # suffixes of a model's config and tokenizer
NOT_COPIED = (MANIFEST, STARTED)
WEIGHTS = re.compile(r"(part-\d{5,}|model|model-\d{5,}-of-\d{5,})\.safetensors|model\.safetensors\.index\.json")


class PartWriter:
    """Collects tensors and writes them as safetensors files of a bounded size."""

    def __init__(self, directory: Path, prefix: str, max_bytes: int = FILE_BYTES) -> None:
        self.directory, self.prefix, self.max_bytes = directory, prefix, max_bytes
        self.entries: dict[str, FileEntry] = {}
        self.keys: dict[str, list[str]] = {}
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0

    @property
    def names(self) -> set[str]:
        """Names of all tensors so far."""
        return {key for keys in self.keys.values() for key in keys} | self._pending.keys()

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Keep tensors, and write those from before once these would be too many."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._bytes + size > self.max_bytes:
            self.flush()
        self._pending |= tensors
        self._bytes += size

    def flush(self) -> None:
        """Write what is kept. Raises ``UserError`` if the disk is full."""
        if not self._pending:
            return
        path = self.directory / f"{self.prefix}-{len(self.entries):05d}.safetensors"
        with atomic_path(path) as temporary:
            try:
                save_file(self._pending, temporary, metadata={"format": "pt"})
            except SafetensorError as error:  # safetensors raises this when the disk is full
                raise UserError(f"{path}: {error}; free space, then run the same command again") from None
        self.entries[path.name] = file_entry(path)
        self.keys[path.name] = list(self._pending)
        self._pending, self._bytes = {}, 0


def export(directory: Path, engine: TrainEngine, model: TrainableModel, max_bytes: int = FILE_BYTES) -> None:
    """Write the trained weights as a ``transformers`` directory, in float32. Collective; rank 0 writes.

    What was not trained comes from the model that training began with, as do config and tokenizer.
    """
    ranks = engine.ranks
    writer = PartWriter(directory, "part", max_bytes)
    for name in engine.parameters:
        value = engine.state(name, (WEIGHT,))[WEIGHT]  # collective: ranks that do not write take part
        if ranks.is_main:
            writer.add(model.exported(name, value))

    def finish() -> None:
        for key, value in model.remaining(writer.names):
            writer.add({key: value})
        writer.flush()
        _name_for_transformers(directory, writer)
        for file in model.directory.iterdir():
            if file.suffix in COPIED and file.name not in NOT_COPIED and "index" not in file.name:
                with atomic_path(directory / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        _change_config(directory / "config.json", model.config_changes)

    ranks.main_first(finish)


def _change_config(path: Path, changes: Mapping[str, Any]) -> None:
    """Give keys of a config.json other values: those of ``changes``, and float32 where it names another type.

    ``from_pretrained`` would round the weights to the type that config.json names, those of a part of the model, such
    as a vision tower, to the type that the part's section names.
    """
    config = read_json(path, "train again")
    wanted = _in_float32({**config, **changes})
    if wanted != config:
        write_json(path, wanted)


def _in_float32(value: Any) -> Any:
    """A config, or a value of one, in which every type of weights is float32."""
    if not isinstance(value, dict):
        return value
    types = {key: "float32" for key in ("dtype", "torch_dtype") if value.get(key)}
    return {key: _in_float32(one) for key, one in value.items()} | types


def _name_for_transformers(directory: Path, writer: PartWriter) -> None:
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
