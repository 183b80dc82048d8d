"""Writes safetensors files in a stream: no second copy in memory, and hashed on the way to the disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from alsace_dist.files.manifest import FileEntry, atomic_path

# Names of types in the format: https://huggingface.co/docs/safetensors
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
FILE_BYTES = 4 << 30  # largest file that a rank writes
CHUNK_BYTES = 16 << 20


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], on_progress: Callable[[int], None] = lambda num_bytes: None
) -> FileEntry:
    """Write contiguous tensors on the CPU, in float32 or bf16, atomically; their entry in a manifest.

    ``on_progress`` is called with the number of bytes after each chunk. Raises ``OSError`` with the path if the disk
    is full.
    """
    digest, size = hashlib.sha256(), 0
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                for chunk in _chunks(tensors):
                    digest.update(chunk)
                    file.write(chunk)
                    size += len(chunk)
                    on_progress(len(chunk))
        except OSError as error:  # does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from None
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file: length of the header, header in JSON, then the tensors without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
