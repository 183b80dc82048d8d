"""The files of a model directory, whatever the family: weights tensor by tensor, tokenizer, identity, the hub."""

import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from torch import Tensor

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_bytes, digest_json, read_json
from alsace_dist.reading import MAX_TEXT_BYTES, check_regular, shorten

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SOUND = "get a sound checkpoint"


class Weights:
    """The tensors of a ``transformers`` directory, read one at a time: safetensors, whole or sharded, or torch files.

    Torch files are opened with ``weights_only=True``: nothing in them is executed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._torch: dict[str, dict[str, Tensor]] = {}
        self._opened: dict[str, Any] = {}
        self._files = self._index()

    def _index(self) -> dict[str, str]:
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.directory / f"{stem}.{suffix}.index.json"
            single = self.directory / f"{stem}.{suffix}"
            if index.exists() and single.exists():
                raise UserError(
                    f"{self.directory}: holds {single.name} and {index.name}, which may be two models; remove one"
                )
            if index.exists():
                value = read_json(index, "get a sound checkpoint")
                files = value.get("weight_map") if isinstance(value, dict) else None
                if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                    raise UserError(f"{index}: holds no weight_map of file names; get a sound checkpoint")
                if bad := next((name for name in files.values() if Path(name).name != name), None):
                    raise UserError(f"{index}: names the file {bad!r} outside its directory; get a sound checkpoint")
                return files
            if single.exists():
                return dict.fromkeys(self._keys(single), single.name)
        raise UserError(
            f"{self.directory}: holds no model.safetensors and no pytorch_model.bin; "
            "model.path must name a transformers directory"
        )

    def _keys(self, file: Path) -> list[str]:
        if file.suffix == ".bin":
            return list(self._load_torch(file.name))
        return list(self._open(file.name).keys())

    def _open(self, name: str) -> Any:
        """A file of safetensors, which stays mapped: its header, of thousands of tensors, is read once."""
        if name not in self._opened:
            self._opened[name] = _open_safetensors(self.directory / name)
        return self._opened[name]

    def _load_torch(self, name: str) -> dict[str, Tensor]:
        if name not in self._torch:
            path = self.directory / name
            _check_file(path)
            try:
                # Files in the format from before torch 1.6 are no zip archives and cannot be mapped.
                mapped = zipfile.is_zipfile(path)
                self._torch = {name: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)}
            except Exception as error:  # torch raises many kinds of errors for unusable files
                # Of such a file torch says that weights_only=False, which executes what is in it, will likely succeed.
                is_other = isinstance(error, pickle.UnpicklingError)
                reason = "it holds something other than tensors" if is_other else shorten(error) or type(error).__name__
                raise UserError(f"{path}: cannot be read as weights ({reason}); get the file again") from None
        return self._torch[name]

    def _holding(self, key: str) -> Any:
        """The opened file that holds a tensor. Raises ``UserError`` if it does not, against the index."""
        opened = self._open(self._files[key])
        if key not in opened.keys():  # noqa: SIM118 (not a mapping)
            raise self._missing(key)
        return opened

    def _missing(self, key: str) -> UserError:
        return UserError(f"{self.directory / self._files[key]}: lacks {key}, which the index lists; get the file again")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def tensor(self, key: str, part: slice = slice(None)) -> Tensor:
        """One tensor, or part of its first dimension, on the CPU; of safetensors no more is read.

        Raises ``UserError`` if the file is broken.
        """
        name = self._files[key]
        if name.endswith(".bin"):
            found = self._load_torch(name)
            if not isinstance(found, dict) or not isinstance(found.get(key), Tensor):
                raise self._missing(key)
            return self._checked(key, found[key] if part == slice(None) else found[key][part])
        opened = self._holding(key)
        tensor: Tensor = opened.get_tensor(key) if part == slice(None) else opened.get_slice(key)[part]
        return self._checked(key, tensor)

    def _checked(self, key: str, tensor: Tensor) -> Tensor:
        """Raises ``UserError`` for a tensor that is no weight: of whole or complex numbers, or not finite."""
        where = f"{self.directory / self._files[key]}: {key}"
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":  # only torch files have such
            raise UserError(f"{where} is a sparse or an empty (meta) tensor, without plain values; {SOUND}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"{where} has numbers of kind {str(tensor.dtype).removeprefix('torch.')}; {SOUND}")
        # Least and largest: isfinite would make two copies of the tensor. Both are NaN if any value is.
        if tensor.numel() and not all(bool(torch.isfinite(one)) for one in tensor.aminmax()):
            raise UserError(f"{where} holds NaN or infinite numbers: its training has diverged; {SOUND}")
        return tensor

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix; of safetensors no others are read."""
        name = self._files[key]
        if name.endswith(".bin"):
            return self.tensor(key)[list(rows)]
        matrix = self._holding(key).get_slice(key)
        return self._checked(key, torch.cat([matrix[row : row + 1] for row in rows]))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor without reading it (safetensors)."""
        name = self._files[key]
        if name.endswith(".bin"):
            return tuple(self.tensor(key).shape)
        return tuple(self._holding(key).get_slice(key).get_shape())

    def problems(self, needed: Mapping[str, tuple[int, ...]], known: Collection[str]) -> list[str]:
        """What does not fit: tensors that are missing, of another shape, or neither needed nor otherwise known."""
        found = [f"{key} is missing" for key in sorted(needed.keys() - self.keys())]
        found += [f"{key} is not of this model" for key in sorted(self.keys() - needed.keys() - set(known))]
        return found + [
            f"{key} has shape {self.shape(key)}, not {shape}"
            for key, shape in sorted(needed.items())
            if key in self and self.shape(key) != shape
        ]

    def refuse(self, problems: Sequence[str]) -> None:
        """Raises ``UserError`` if there are problems, with the first five of them."""
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            rows = "; ".join(problems[:5])
            raise UserError(f"{self.directory}: does not fit its config.json: {rows}{more}; {SOUND}")


def _check_file(path: Path) -> None:
    """Raises ``UserError`` for a pipe or a device, which would be read for ever; a missing file is for the reader."""
    if path.exists():
        check_regular(path, "get the file again")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); get the file again") from None


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, always through AutoTokenizer. Raises ``UserError`` if there is none."""
    from transformers import AutoTokenizer

    remedy = "put the model's tokenizer files there"
    # Without any of these files, transformers makes an empty tokenizer of the model's type and says nothing.
    if not any(
        (directory / name).exists()
        for name in ("tokenizer.json", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
    ):
        raise UserError(f"{directory}: has no usable tokenizer (no tokenizer.json, no spiece.model); {remedy}")
    check_files(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for broken files
        for path in sorted(directory.glob("*token*.json")):  # where a file is no JSON, they speak of Python's types
            if not isinstance(read_json(path, remedy), dict):
                raise UserError(f"{path}: holds no mapping; {remedy}") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{directory}: has no usable tokenizer ({reason}); {remedy}") from None


def check_files(directory: Path) -> None:
    """Look at the files of a model directory before anything, transformers included, reads them.

    Raises ``UserError`` for a pipe or a device, which would be read for ever, and for a text of a size that none has.
    """
    for path in sorted(directory.iterdir()):
        is_text = path.suffix in (".json", ".model", ".txt", ".jinja")
        if is_text or path.suffix in (".safetensors", ".bin"):
            check_regular(path, SOUND, MAX_TEXT_BYTES if is_text else None)


def _is_activation(name: str) -> str:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"{shorten(name)!r} is no activation")
    return name


Extent = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Depth = Annotated[int, Field(strict=True, ge=1, le=1000)]
Activation = Annotated[str, AfterValidator(_is_activation)]


class Geometry(Section):
    """What a family makes its module from, by the keys of ``config.json``: beyond the bounds building it would fail
    within torch, or take for ever."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: Annotated[int, Field(strict=True, ge=1, le=100_000_000)] = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:  # some families end texts in several ways
                if one is not None and "vocab_size" in self.model_fields_set and not 0 <= one < self.vocab_size:
                    raise ValueError(f"{name}: {one} is no id of a vocabulary of {self.vocab_size:,}")
        return self


def read_config(directory: Path, geometry: type[Geometry] = Geometry) -> dict[str, Any]:
    """The content of ``config.json``. Raises ``UserError`` if it is not there, no mapping, or out of bounds."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; model.path must name a transformers directory")
    value = read_json(path, SOUND)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no mapping; {SOUND}")
    validate(geometry, value, f"{path}: ", SOUND)
    return value


CONFIG_FILES = ["*.json", "*.model"]
MODEL_FILES = [*CONFIG_FILES, "*.safetensors", "pytorch_model*.bin"]


def resolve_model(path: str, revision: str | None = None, patterns: list[str] = MODEL_FILES) -> Path:
    """Local directory of a model, downloading the files that ``patterns`` name from the hub if it is not a directory.

    Raises ``UserError`` if it is neither here nor to be had.
    """
    if Path(path).is_dir():
        if revision:
            raise UserError(f"model.revision: {path} is a directory, which has no revisions; remove it")
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except HFValidationError:  # speaks of the hub's rules for names, to people who meant a directory
        raise UserError(
            f"model.path: {shorten(path)!r} is no directory that is here, and no name on the hub, which is owner/name; "
            "correct the path"
        ) from None
    except Exception as error:  # the hub client raises dozens of kinds; to a person they mean the same
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path: {path!r} is neither a directory nor to be had from the hub ({reason}); "
            "check the name, or download it beforehand and give its directory"
        ) from None


def model_identity(directory: Path) -> dict[str, Any]:
    """What tells a model's files from another's without reading gigabytes.

    Size and first and last mebibyte of each weight file, and the configs whole.
    """
    identity: dict[str, Any] = {}
    check_files(directory)
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".model"):
            identity[file.name] = digest_bytes(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as opened:
                head = opened.read(1 << 20)
                opened.seek(max(0, file.stat().st_size - (1 << 20)))
                tail = opened.read()
            identity[file.name] = [file.stat().st_size, digest_bytes(head + tail)]
    return {"model": digest_json(identity)}
