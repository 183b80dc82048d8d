"""T5Gemma 2: an encoder reads the prompt once, the decoder scores the candidates.

Text only: the module holds neither the vision tower nor the projector behind it. Their tensors are not trained, and the
export copies them. Encoder and decoder are transformers' own, without embeddings: one embedding, which is the output
head, too, serves the prompts, the decoder's inputs and the rows of the answers in one call, so that what is trained
stays tied and ZeRO-3 gathers it once.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alsace_dist.config import Mode
from alsace_dist.data.rows import GAP, Part
from alsace_dist.errors import UserError
from alsace_dist.models.decoding import DecoderFamily
from alsace_dist.models.family import WHOLE, Parameters, linear_widths
from alsace_dist.models.t5gemma2_module import GemmaScorer, T5Gemma2Geometry, vision_tower
from alsace_dist.models.weights import SOUND, Weights, read_config

EMBEDDING, END_OF_IMAGE = "embedding.weight", "embedding.eoi_embedding"
# Where checkpoints keep the encoder: transformers writes the first form, and reads the second one, too.
ENCODER = ("model.encoder.", "model.encoder.text_model.")
DECODER = "model.decoder."
# What no prompt of text reaches.
UNSCORED = re.compile(r"model\.encoder\.(vision_tower|multi_modal_projector)\..+")
# Copies of the embedding that checkpoints may hold -> the parameter that they are copies of.
COPIES = {
    "lm_head.out_proj.weight": EMBEDDING,
    f"{DECODER}embed_tokens.weight": EMBEDDING,
    f"{DECODER}embed_tokens.eoi_embedding": END_OF_IMAGE,
}


class T5Gemma2(DecoderFamily):
    """T5Gemma 2 from 270M-270M to 4B-4B, and checkpoints of the same architecture."""

    name = "T5Gemma 2"
    gap = ""  # nothing in its vocabulary stands for an answer: the decoder says it after the prompt
    config_changes: Mapping[str, Any] = {}
    vocabulary = frozenset({EMBEDDING, END_OF_IMAGE})
    # Small parameters that transformers would leave at zero if they were not loaded.
    delicate: tuple[str, ...] = (END_OF_IMAGE, "encoder.norm.weight", "decoder.norm.weight")

    @staticmethod
    def load_config(directory: Path) -> Any:
        from transformers import T5Gemma2Config

        value = read_config(directory, T5Gemma2Geometry)
        # How attention is computed is for this program to say, not for whoever saved the checkpoint.
        value = {key: one for key, one in value.items() if "attn_implementation" not in key}
        try:
            return T5Gemma2Config.from_dict(value)
        except Exception as error:  # transformers raises several kinds of errors
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{directory / 'config.json'}: {reason}; {SOUND}") from None

    def start_token(self) -> tuple[str, Any]:
        return "decoder.bos_token_id", self.config.decoder.bos_token_id

    # --- prompts ---------------------------------------------------------------------------------------------------

    def check_ends(self, ids: Sequence[int]) -> None:
        """Gemma's prompts begin with a token of control, and are not closed by one."""
        if ids[:1] != [self.tokenizer.bos_token_id]:
            raise UserError(f"{self.directory}: the tokenizer does not begin texts with its bos_token; {SOUND}")

    def num_pieces(self) -> int:
        """Tokens of control, which no text becomes, may lie beyond the embedding: Gemma's tokenizers have one for
        images there."""
        control = {token for token, about in self.tokenizer.added_tokens_decoder.items() if about.special}
        return 1 + max(set(self.tokenizer.get_vocab().values()) - control, default=0)

    def _written(self, prompt: Sequence[Part]) -> list[Part]:
        """Nothing stands for the answer, nor does the blank before it, which would be a token of its own."""
        following = [*prompt[1:], None]
        return super()._written(
            [
                part._replace(content=part.content.rstrip(" ")) if after == GAP else part
                for part, after in zip(prompt, following, strict=True)
            ]
        )

    # --- the module and its weights --------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's tensors."""
        return Weights(self.directory)

    def build(self, dropout: float, gradient_checkpointing: bool) -> GemmaScorer:
        return GemmaScorer(self.config, self.form, dropout, gradient_checkpointing, self.candidate_score)

    @cached_property
    def _encoder(self) -> str:
        """What names of the encoder's tensors begin with."""
        return ENCODER[any(key.startswith(ENCODER[1]) for key in self.weights)]

    def _key(self, name: str) -> str:
        """Where the checkpoint keeps a parameter."""
        part, _, rest = name.partition(".")
        return {"embedding": f"{self._encoder}embed_tokens.", "encoder": self._encoder, "decoder": DECODER}[part] + rest

    def check_weights(self, may_be_new: bool = False) -> list[str]:
        with torch.device("meta"):
            module = self.build(0.0, False)
        needed = {self._key(name): tuple(parameter.shape) for name, parameter in module.named_parameters()}
        known = {key for key in self.weights if UNSCORED.fullmatch(key)}
        problems = self.weights.problems(needed, known | COPIES.keys())
        for key, name in COPIES.items() if not problems else ():
            if key in self.weights and not torch.equal(self.weights.tensor(key), self.weights.tensor(self._key(name))):
                problems.append(f"{key} differs from {self._key(name)}, and only tied ones are supported")
        self.weights.refuse(problems)
        return []

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        return self.weights.tensor(self._key(name), part).float()

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        return {self._key(name): value}

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``: the vision tower, and parameters that were frozen.

        Of copies of the embedding nothing remains: they would differ from the trained one.
        """
        for key in sorted(self.weights.keys() - set(written) - COPIES.keys()):
            yield key, self.weights.tensor(key).float()

    # --- sizes -----------------------------------------------------------------------------------------------------

    @staticmethod
    def describe(config: Any) -> str:
        decoder = config.decoder
        layers = (
            f"{config.encoder.text_config.num_hidden_layers} encoder and {decoder.num_hidden_layers} decoder layers"
        )
        return f"T5Gemma 2, width {decoder.hidden_size}, {layers}, vocabulary {decoder.vocab_size:,}"

    @staticmethod
    def count_parameters(config: Any, num_head_rows: int | None, mode: Mode = "auto") -> Parameters:
        with torch.device("meta"):
            module = GemmaScorer(config, None, 0.0, False)
            beside = _num_parameters(vision_tower(config))
        vocabulary = config.decoder.vocab_size * config.decoder.hidden_size
        embedding = vocabulary + config.decoder.hidden_size  # with what stands for the end of an image
        linear = linear_widths(module)
        return Parameters(_num_parameters(module), embedding, 0, 0, vocabulary=vocabulary, beside=beside, linear=linear)

    @staticmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_answer_tokens: int) -> float:
        sizes = np.asarray(lengths, dtype=np.float64)
        num_inputs, num_outputs = sizes.sum(), num_answer_tokens * len(sizes)
        encoder, decoder = config.encoder.text_config, config.decoder
        # The decoder's attention projects the prompt, too, to keys and values, and reads it and the answer at once.
        prompt = decoder.num_hidden_layers * _keys_and_values(decoder) * num_inputs
        products = _per_token(encoder) * num_inputs + _per_token(decoder) * num_outputs + prompt
        pairs = _inner(encoder) * (sizes**2).sum()
        pairs += _inner(decoder) * num_answer_tokens * (num_outputs + num_inputs)
        return float(2 * (products + 2 * pairs))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _keys_and_values(stack: Any) -> int:
    """Multiplications of a layer for a position's keys and values, of which several heads share one pair."""
    return int(2 * stack.hidden_size * stack.num_key_value_heads * stack.head_dim)


def _per_token(stack: Any) -> int:
    """Multiplications of all layers for a position, but for those of pairs of positions."""
    queries_and_output = 2 * stack.hidden_size * stack.num_attention_heads * stack.head_dim
    feed_forward = 3 * stack.hidden_size * stack.intermediate_size  # gated: two matrices in, one out
    return int(stack.num_hidden_layers * (queries_and_output + _keys_and_values(stack) + feed_forward))


def _inner(stack: Any) -> int:
    """Multiplications of all layers for a pair of positions, once for the scores and once for the values."""
    return int(stack.num_hidden_layers * stack.num_attention_heads * stack.head_dim)
