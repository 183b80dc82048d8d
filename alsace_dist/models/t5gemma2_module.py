"""The module of T5Gemma 2, and the geometry that it is made from.

Encoder and decoder are transformers' own, but for what a module that is built on the meta device or under ``zero.Init``
would have wrong: their buffers. Rotary frequencies and the embedding's scale are made when the module first runs.
"""

import copy
from functools import cache
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from alsace_dist.config import Section
from alsace_dist.models.batches import SUM, CandidateScore, attention_over
from alsace_dist.models.decoding import CandidateForm, score_sequences, score_single_tokens
from alsace_dist.models.vocabulary import token_log_probs
from alsace_dist.models.weights import Activation, Depth, Extent, Geometry

FULL, SLIDING = "full_attention", "sliding_attention"


# --- geometry ------------------------------------------------------------------------------------------------------


def _is_tied(value: bool) -> bool:
    if not value:
        raise ValueError("false, and an output head that is not the embedding is not supported for T5Gemma 2")
    return value


Tied = Annotated[bool, AfterValidator(_is_tied)]
Finite = Annotated[float, Field(gt=0, lt=1e12)]


class _Part(Section):
    """Part of a config.json, in which transformers writes more than is looked at here."""

    model_config = Geometry.model_config


class RotaryGeometry(_Part):
    """Rotary positions of one kind of layers."""

    rope_type: Literal["default", "linear"] = "default"
    rope_theta: Finite = 1.0
    factor: Finite | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope_type == "linear" and self.factor is None:
            raise ValueError("factor is needed with rope_type: linear, and missing")
        return self


class RotaryOfLayers(_Part):
    """Rotary positions of both kinds of layers."""

    full_attention: RotaryGeometry | None = None
    sliding_attention: RotaryGeometry | None = None


class StackGeometry(Geometry):
    """What an encoder or a decoder is made from; defaults are those of transformers."""

    vocab_size: Annotated[int, Field(strict=True, ge=1, le=100_000_000)] = 262_208
    bos_token_id: int = 2
    hidden_size: Extent = 2304
    intermediate_size: Extent = 9216
    num_hidden_layers: Depth = 26
    num_attention_heads: Extent = 8
    num_key_value_heads: Extent = 4
    head_dim: Extent = 256
    hidden_activation: Activation = "gelu_pytorch_tanh"
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    query_pre_attn_scalar: Extent = 256
    sliding_window: Extent = 4096
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    max_position_embeddings: Extent = 131_072
    rope_parameters: RotaryOfLayers | None = None
    rope_scaling: RotaryGeometry | None = None
    attention_bias: bool = False
    final_logit_softcapping: Finite | None = None
    attn_logit_softcapping: None = None
    """Refused: transformers' T5Gemma 2 ignores a cap on the logits of attention, so there is nothing to agree with."""
    tie_word_embeddings: Tied = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, total, part in (
            ("hidden_size", self.hidden_size, "num_attention_heads"),
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads"),
        ):
            if total % getattr(self, part):
                raise ValueError(f"{name}: {total} is no multiple of {part}, {getattr(self, part)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd, and rotary positions turn pairs")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types: names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        return self


class VisionGeometry(_Part):
    """The vision tower, whose parameters are counted."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    hidden_size: Extent = 768
    intermediate_size: Extent = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Extent = 12
    num_channels: Extent = 3
    image_size: Extent = 224
    patch_size: Extent = 16

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads, {self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size: {self.patch_size} is more than image_size, {self.image_size}")
        return self


class EncoderSection(_Part):
    """What surrounds the encoder of text."""

    text_config: StackGeometry
    vision_config: VisionGeometry | None = None
    mm_tokens_per_image: Extent = 256
    eoi_token_index: Annotated[int, Field(strict=True, ge=0)] = 256_000


class T5Gemma2Geometry(Geometry):
    """What a module is made from."""

    encoder: EncoderSection
    decoder: StackGeometry
    tie_word_embeddings: Tied = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("hidden_size", "vocab_size"):
            mine, its = getattr(self.decoder, name), getattr(self.encoder.text_config, name)
            if mine != its:
                raise ValueError(f"decoder.{name}: {mine:,}, and the encoder's is {its:,}")
        if "vocab_size" in self.model_fields_set and self.vocab_size != self.decoder.vocab_size:
            raise ValueError(f"vocab_size: {self.vocab_size:,}, and the decoder's is {self.decoder.vocab_size:,}")
        return self


# --- the module ----------------------------------------------------------------------------------------------------


class SharedEmbedding(nn.Module):
    """The embedding of encoder and decoder, whose rows are those of the output head.

    ``eoi_embedding``: what stands for the end of an image, instead of that token's row, which is the head's alone.
    """

    def __init__(self, vocab_size: int, width: int, eoi_token_index: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.eoi_embedding = nn.Parameter(torch.empty(width))
        self.eoi_token_index = eoi_token_index

    def forward(self, ids: Tensor, head_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings of pieces [tokens, width], and the output head's rows of others (None: of all).

        Both in one call, because under ZeRO-3 the weights are here only while it lasts.
        """
        rows = self.weight.clone() if head_ids is None else nn.functional.embedding(head_ids, self.weight)
        embedded = nn.functional.embedding(ids, self.weight) * _rounded(self.weight.shape[1] ** 0.5, self.weight.dtype)
        return torch.where((ids == self.eoi_token_index)[:, None], self.eoi_embedding, embedded), rows


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a type of weights has it: so does Gemma round the scale of its embeddings."""
    return float(torch.tensor(value).to(dtype))


class Rotary(nn.Module):
    """transformers' rotary positions, made at the first forward: whatever its frequencies are when a module is built on
    the meta device, under ``zero.Init`` or for bf16, they must be those of float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._made: dict[torch.device, Any] = {}  # none of them is a submodule, or ``to`` would round its buffers

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines, in the type of ``x`` [batch, length, width]."""
        if x.device not in self._made:
            from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RotaryEmbedding

            with torch.device("cpu"):
                self._made[x.device] = T5Gemma2RotaryEmbedding(self.config).to(x.device)
        found: tuple[Tensor, Tensor] = self._made[x.device](x, position_ids, layer_type)
        return found


class GemmaScorer(nn.Module):
    """log P(candidate | prompt) over the candidates of each prompt: the encoder runs once, the decoder scores.

    One module with one ``forward``, because DeepSpeed hooks the root: calling a part of it would bypass the hooks.
    ``form``: None for a module that is only looked at.
    """

    def __init__(
        self,
        config: Any,
        form: CandidateForm | None,
        dropout: float,
        gradient_checkpointing: bool,
        score: CandidateScore = SUM,
    ) -> None:
        from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Decoder, T5Gemma2TextEncoder

        super().__init__()
        self.form, self.score = form, score
        self.cap: float | None = config.decoder.final_logit_softcapping
        self.embedding = SharedEmbedding(config.decoder.vocab_size, config.decoder.hidden_size, config.eoi_token_index)
        self.encoder: Any = _stack(T5Gemma2TextEncoder, config.encoder.text_config, dropout, gradient_checkpointing)
        self.decoder: Any = _stack(T5Gemma2Decoder, config.decoder, dropout, gradient_checkpointing)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        answer_ids: Tensor,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Score candidates.

        input_ids, attention_mask: [batch, length]. With single-token candidates decoder_input_ids is [batch, prefix]
        and answer_ids [batch, K] indexes the form's vocabulary. Otherwise decoder_input_ids is [batch, K, target] and
        answer_ids [batch, K, target] holds the token that each position predicts, counted the positions that predict
        one. -100 counts for nothing: a position without a token, a candidate that a row lacks.
        Returns float32 log-probabilities [batch, K] as ``CandidateScore`` makes them, normalised over the candidates of
        a row, -inf for those that it lacks.
        """
        assert self.form is not None
        kept = torch.tensor(self.form.vocabulary, device=input_ids.device) if self.form.single_token else None
        pieces = torch.cat([input_ids.flatten(), decoder_input_ids.flatten()])
        embedded, rows = self.embedding(pieces, kept)
        prompts, answers = embedded.split([input_ids.numel(), decoder_input_ids.numel()])
        encoded = self.encoder(
            inputs_embeds=prompts.view(*input_ids.shape, -1),
            attention_mask=prompt_masks(attention_mask, self.encoder.config.sliding_window),
        ).last_hidden_state
        if counted is None:
            hidden = self._decode(answers.view(*decoder_input_ids.shape, -1), encoded, attention_mask)
            return score_single_tokens(self.score, self._logits(hidden[:, -1], rows), answer_ids)
        num_candidates, length = decoder_input_ids.shape[1:]
        hidden = self._decode(
            answers.view(-1, length, encoded.shape[-1]),
            encoded.repeat_interleave(num_candidates, dim=0),
            attention_mask.repeat_interleave(num_candidates, dim=0),
        )

        def log_probs(states: Tensor, tokens: Tensor) -> Tensor:
            return token_log_probs(states, rows, tokens, cap=self.cap)

        return score_sequences(self.score, hidden, answer_ids, counted, log_probs)

    def _decode(self, embedded: Tensor, encoded: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [sequences, target, width]. No mask of its own padding: it stands behind all that counts,
        and no position looks ahead."""
        num_sequences, length, _ = embedded.shape
        own = answer_masks(num_sequences, length, self.decoder.config.sliding_window, embedded.device)
        prompt = attention_over(attention_mask).expand(-1, 1, length, -1)
        hidden: Tensor = self.decoder(
            inputs_embeds=embedded,
            attention_mask=own,
            encoder_hidden_states=encoded,
            encoder_attention_mask={FULL: prompt},
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """float32 logits, for those of bf16 would quantise the loss. They are capped one by one, so that the softmax
        over some of them is the full one renormalised, too."""
        logits = nn.functional.linear(hidden.float(), rows.float())
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def _stack(kind: Any, config: Any, dropout: float, gradient_checkpointing: bool) -> Any:
    """transformers' encoder or decoder, without an embedding and without buffers."""
    config = copy.deepcopy(config)
    # transformers makes an embedding whatever happens; let it be one row, without a padding that it would set to zero.
    config.vocab_size, config.pad_token_id = 1, None
    config.dropout_rate = config.attention_dropout = dropout
    config.use_cache = False
    stack = kind(config)
    del stack.embed_tokens
    stack.rotary_emb = Rotary(config)
    if gradient_checkpointing:
        stack.activation_checkpointing_enable({"use_reentrant": False})
    return stack


def vision_tower(config: Any) -> nn.Module:
    """The parts that score nothing here: the vision tower, and the projector from it to the encoder."""
    from transformers import AutoModel
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2MultiModalProjector

    tower = AutoModel.from_config(config.encoder.vision_config)
    return nn.ModuleList([tower, T5Gemma2MultiModalProjector(config.encoder)])


# --- masks ---------------------------------------------------------------------------------------------------------
# The masks are bool, as SDPA takes them. transformers' own would ask for values of the padding mask, for which an
# accelerator would have to wait, and let padding that is far from all tokens look at nothing, whose softmax is not a
# number on some kernels.


def prompt_masks(attention_mask: Tensor, window: int) -> dict[str, Tensor]:
    """What each position of a prompt may look at, by the kind of layer: bool [batch, 1, length or 1, length].

    ``attention_mask``: [batch, length]. Sliding layers look at about half a window to each side.
    """
    from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

    full = attention_over(attention_mask)
    length = attention_mask.shape[1]
    if length <= (window + 1) // 2:  # every position is within reach of every other
        return {FULL: full, SLIDING: full}
    places = torch.arange(length, device=attention_mask.device)
    near = sliding_window_mask_function(window, is_causal=False)(0, 0, places[:, None], places[None, :])
    itself = torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    return {FULL: full, SLIDING: (full & near) | itself}


def answer_masks(num_sequences: int, length: int, window: int, device: torch.device) -> dict[str, Tensor]:
    """What each position of an answer may look at of it, by the kind of layer: bool [sequences, 1, length, length]."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    shape = (num_sequences, 1, length, length)
    return {FULL: (distance >= 0).expand(shape), SLIDING: ((distance >= 0) & (distance < window)).expand(shape)}
