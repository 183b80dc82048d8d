"""A small T5Gemma 2, vision tower included, with random weights and a tokenizer of Gemma's class, as files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GemmaTokenizer, T5Gemma2Config, T5Gemma2ForConditionalGeneration

WORDS = ["yes", "no", "maybe", "not", "at", "all", "ja", "nein", "word", "text", "Was", "it", "is"]
LETTERS = "abcdefghijklmnopqrstuvwxyz.?:,<>/WZ是否字"
PAD, END, START, UNKNOWN = 0, 1, 2, 3
END_OF_IMAGE, IMAGE = 5, 6
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<end_of_image>", "<image>"]


def make_tokenizer(words: Sequence[str] = WORDS, letters: str = LETTERS) -> Any:
    """Special tokens as in every Gemma, letters, and these words with a blank in front and without one.

    Pieces are merged as Gemma's are; no text ends with a token of control.
    """
    pieces = [*SPECIAL, "▁", *letters]
    merges: list[tuple[str, str]] = []
    for word in [f"▁{word}" for word in words] + list(words):  # with a blank first, or it would be left over
        for end in range(1, len(word)):
            if (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
                pieces.append(word[: end + 1])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *"".join(words)]))}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens=SPECIAL[5:])


def make_config(vocab_size: int | None = None, dtype: str | None = None, **decoder: Any) -> T5Gemma2Config:
    """A geometry of a few thousand weights: two heads share keys, and a layer of each kind sees less than a prompt.

    ``decoder``: what the decoder has otherwise than the encoder.
    """
    size = len(make_tokenizer()) if vocab_size is None else vocab_size
    stack: dict[str, Any] = {"vocab_size": size, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    stack |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    stack |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}  # as all that were released
    stack |= {"rope_parameters": {"full_attention": linear, "sliding_attention": {"rope_theta": 1e4}}}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False}
    encoder = {"text_config": stack, "vision_config": vision, "mm_tokens_per_image": 4}
    encoder |= {"eoi_token_index": END_OF_IMAGE, "image_token_index": IMAGE}
    more = {} if dtype is None else {"dtype": dtype}
    return T5Gemma2Config(encoder=encoder, decoder=stack | decoder, image_token_index=IMAGE, **more)


def make_model(config: Any, seed: int = 0, size: float = 0.3) -> T5Gemma2ForConditionalGeneration:
    """Plain transformers, with weights, those of norms and of the end of an image too, that make scores differ."""
    torch.manual_seed(seed)
    model = T5Gemma2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
    return model


def write_model(directory: Path, model: Any, state: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A whole directory: tokenizer, config and the model's tensors, or these."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(directory)
    model.save_pretrained(directory)
    if state is not None:
        save_file(dict(state), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def change_config(directory: Path, path: str, value: Any) -> None:
    """Give a key of config.json, such as decoder.head_dim, another value."""
    config = json.loads((directory / "config.json").read_text())
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[key] = value
    (directory / "config.json").write_text(json.dumps(config))
