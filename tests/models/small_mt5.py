"""A small mT5 with random weights and a tokenizer of one token per word, as files; and what transformers scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast

from alsace_dist.models.mt5 import HEAD

WORDS = ["<pad>", "</s>", "<unk>", "yes", "no", "not", "at", "all", "ja", "nein", "<x>"]
WORDS += [f"word{index}" for index in range(len(WORDS), 40)]
VOCABULARY = len(WORDS)
PAD, END = 0, 1


def make_state(seed: int = 0, tied: bool = False) -> tuple[MT5Config, dict[str, torch.Tensor]]:
    """Config and tensors; the head differs from the embedding as in every real mT5, or is not there."""
    config = MT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        architectures=["MT5ForConditionalGeneration"],
    )
    torch.manual_seed(seed)
    names = MT5ForConditionalGeneration(config).state_dict()
    state = {name: value.clone() for name, value in names.items() if not name.endswith("embed_tokens.weight")}
    state[HEAD] = 0.5 * torch.randn(VOCABULARY, 16)
    if tied:
        del state[HEAD]
    return config, state


def write_model(directory: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A whole directory: tokenizer, config and these tensors, or those of ``make_state``."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    config, whole = make_state()
    config.save_pretrained(directory)
    save_file(whole if state is None else state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_tokenizer(directory: Path) -> None:
    """The id of a word is its place in ``WORDS``."""
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.normalizer = normalizers.Replace("\u200b", "")  # as SentencePiece's own does
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)


def text_of(tokens: Sequence[int]) -> str:
    """The text that has these tokens, without the end token."""
    return " ".join(WORDS[token] for token in tokens if token != END)


def prompts(lengths: Sequence[int] = (3, 9, 1, 6, 9, 4)) -> list[list[int]]:
    """Token ids of prompts of these lengths, each with its end token."""
    generator = torch.Generator().manual_seed(1)
    return [[*torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), END] for length in lengths]


@torch.no_grad()
def full_log_probs(model: Any, row: list[int], decoder: Sequence[int]) -> torch.Tensor:
    """log-softmax over the whole vocabulary at every decoder position, of one prompt without padding."""
    logits = model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([list(decoder)])).logits
    return torch.log_softmax(logits[0].double(), dim=-1)
