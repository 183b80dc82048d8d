"""A small XLM-R with random weights and a tokenizer of its own class, as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
    XLMRobertaXLConfig,
    XLMRobertaXLForMaskedLM,
    XLMRobertaXLForSequenceClassification,
)

WORDS = ["yes", "no", "maybe", "not", "at", "all", "ja", "nein", "vielleicht", "word", "text", "Was", "it", "is"]
LETTERS = "abcdefghijklmnopqrstuvwxyz.?:<>是否字"
PAD, END, UNKNOWN, FIRST = 1, 2, 3, 0
XL = "xlm-roberta-xl"


def make_tokenizer(words: Sequence[str] = WORDS, letters: str = LETTERS) -> Any:
    """Special tokens as in every XLM-R, a blank, these words and letters, and the mask as the last one."""
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocabulary += [("▁" + word, -2.0) for word in words] + [(letter, -6.0) for letter in letters] + [("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocabulary)


def make_config(model_type: str = "xlm-roberta", vocab_size: int | None = None, **more: Any) -> Any:
    """A geometry of a few thousand weights, with 32 positions."""
    kind = XLMRobertaXLConfig if model_type == XL else XLMRobertaConfig
    size = len(make_tokenizer()) if vocab_size is None else vocab_size
    geometry: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    geometry |= {"intermediate_size": 24, "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return kind(vocab_size=size, **geometry | more)


def make_model(head: str, config: Any, seed: int = 0) -> Any:
    """A plain transformers model whose weights, biases too, are large enough for scores that differ.

    ``head``: "cloze" or "head".
    """
    is_xl = config.model_type == XL
    kinds: dict[str, Any] = {
        "cloze": XLMRobertaXLForMaskedLM if is_xl else XLMRobertaForMaskedLM,
        "head": XLMRobertaXLForSequenceClassification if is_xl else XLMRobertaForSequenceClassification,
    }
    torch.manual_seed(seed)
    model = kinds[head](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def write_model(directory: Path, model: Any, state: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A whole directory: tokenizer, config and the model's tensors, or these."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(directory)
    model.save_pretrained(directory)
    if state is not None:
        save_file(dict(state), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
