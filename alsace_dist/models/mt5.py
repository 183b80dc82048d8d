"""mT5: an encoder reads the prompt once, the decoder scores the candidates.

The output head is kept apart from the body on purpose. transformers ties mT5's head to its input embedding although
the two differ in every released checkpoint, and under ZeRO-3 it then overwrites the head without a word. Here the body
(``MT5Model``) has no head at all; the rows that the candidates need are a small parameter of their own, filled from the
checkpoint's ``lm_head.weight`` and spliced back into the whole head on export.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from alsace_dist.config import Mode
from alsace_dist.data.rows import Answers
from alsace_dist.errors import UserError
from alsace_dist.models import attention
from alsace_dist.models.batches import SUM, CandidateScore, attention_over
from alsace_dist.models.decoding import CandidateForm, DecoderFamily, score_sequences, score_single_tokens
from alsace_dist.models.family import WHOLE, Parameters, linear_widths
from alsace_dist.models.footprint import encoder_decoder
from alsace_dist.models.vocabulary import token_log_probs
from alsace_dist.models.weights import SOUND, Activation, Depth, Extent, Geometry, Weights, read_config

HEAD = "lm_head.weight"
EMBEDDING = "shared.weight"


# --- the module ----------------------------------------------------------------------------------------------------


class CandidateHead(nn.Module):
    """Rows of the output head. ``weight``: [num_rows, d_model]."""

    def __init__(self, num_rows: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, d_model))

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """hidden [batch, d_model] -> float32 logits [batch, num_rows]; bf16 logits would quantise the loss.

        With ``tokens`` [batch], rows of a whole head: float32 log-probabilities of these tokens alone, [batch].
        """
        if tokens is not None:
            return token_log_probs(hidden, self.weight, tokens)
        return nn.functional.linear(hidden.float(), self.weight.float())


class CandidateScorer(nn.Module):
    """log P(candidate | prompt) over the candidates of each prompt: the encoder runs once, the decoder scores.

    One module with one ``forward``, because DeepSpeed hooks the root: calling a part of it would bypass the hooks.
    """

    head: CandidateHead

    def __init__(self, body: Any, form: CandidateForm, score: CandidateScore = SUM) -> None:
        super().__init__()
        self.body: Any = body
        self.score = score
        num_rows = len(form.vocabulary) if form.single_token else body.config.vocab_size
        self.head = CandidateHead(num_rows, body.config.d_model)

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
        and answer_ids [batch, K] indexes the head's rows. Otherwise decoder_input_ids is [batch, K, target] and
        answer_ids [batch, K, target] holds the token that each position predicts, counted the positions that predict
        one. -100 counts for nothing: a position without a token, a candidate that a row lacks.
        Returns float32 log-probabilities [batch, K] as ``CandidateScore`` makes them, normalised over the candidates of
        a row, -inf for those that it lacks.
        """
        mask = attention_over(attention_mask)
        if counted is None:
            output = self.body(
                input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids, use_cache=False
            )
            logits = self.head(output.last_hidden_state[:, -1])
            return score_single_tokens(self.score, logits, answer_ids)
        num_candidates = decoder_input_ids.shape[1]
        encoded = self.body.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        hidden = self.body.decoder(
            input_ids=decoder_input_ids.flatten(0, 1),
            encoder_hidden_states=encoded.repeat_interleave(num_candidates, dim=0),
            encoder_attention_mask=mask.repeat_interleave(num_candidates, dim=0),
            use_cache=False,
        ).last_hidden_state
        return score_sequences(self.score, hidden, answer_ids, counted, self.head)


def make_body(config: Any, dropout: float) -> Any:
    """An mT5 without a head. Encoder, decoder and ``shared`` hold one and the same embedding module."""
    from transformers import MT5Model
    from transformers.models.mt5.modeling_mt5 import MT5LayerNorm

    config.dropout_rate = dropout
    config.use_cache = False
    if config.dense_act_fn == "gelu_new":  # the same function in eight kernels, a quarter of a pass's memory traffic
        config.dense_act_fn = "gelu_pytorch_tanh"
    config._attn_implementation = attention.register()
    body = MT5Model(config)
    body.set_input_embeddings(body.shared)
    attention.share_bias(body)
    for name, module in list(body.named_modules()):
        if isinstance(module, MT5LayerNorm):  # the same function in six kernels, and twice the memory on a GPU
            norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
            body.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], norm)
    return body


def make_scorer(
    config: Any, form: CandidateForm, dropout: float, gradient_checkpointing: bool, score: CandidateScore = SUM
) -> CandidateScorer:
    """The module that scores candidates of this form."""
    body = make_body(config, dropout)
    if gradient_checkpointing:
        body.activation_checkpointing_enable({"use_reentrant": False})
    return CandidateScorer(body, form, score)


# --- files ---------------------------------------------------------------------------------------------------------


class MT5Geometry(Geometry):
    """What a module is made from."""

    d_model: Extent = 1
    d_kv: Extent = 1
    d_ff: Extent = 1
    num_heads: Extent = 1
    num_layers: Depth = 1
    num_decoder_layers: Depth | None = None
    relative_attention_num_buckets: Extent = 2
    relative_attention_max_distance: Extent = 1
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: Activation = "gelu_new"
    is_gated_act: bool = True


def load_config(directory: Path) -> Any:
    """The ``MT5Config`` of a directory. Raises ``UserError`` if config.json is broken."""
    from transformers import MT5Config

    value, file = read_config(directory, MT5Geometry), directory / "config.json"
    # How attention is computed is for this program to say, not for whoever saved the checkpoint.
    value = {key: one for key, one in value.items() if "attn_implementation" not in key}
    try:
        return MT5Config.from_dict(value)
    except Exception as error:  # transformers raises several kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: {reason}; {SOUND}") from None


def head_key(weights: Weights) -> str:
    """Where the output head is: its own tensor, or the embedding in a checkpoint that was saved tied.

    ``MT5Config`` says of every mT5 that it is tied; config.json of the released ones, and of what is exported here,
    says that it is not.
    """
    is_tied = read_config(weights.directory).get("tie_word_embeddings") is not False
    return EMBEDDING if is_tied and HEAD not in weights else HEAD


def check_weights(module: CandidateScorer, weights: Weights) -> None:
    """Compare names and shapes of a checkpoint with the model. Raises ``UserError`` with all that do not fit.

    Tensors that transformers itself leaves out or duplicates are allowed.
    """
    needed = {key: tuple(getattr(p, "ds_shape", p.shape)) for key, p in module.body.named_parameters()}
    known = {HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    known.add("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    problems = weights.problems(needed, known)
    if head_key(weights) not in weights:
        problems.append(f"{HEAD} is missing, and config.json says that it is not the embedding")
    head_shape = weights.shape(head_key(weights)) if not problems else needed[EMBEDDING]
    if head_shape != needed[EMBEDDING]:
        problems.append(f"{HEAD} has shape {head_shape}, not {needed[EMBEDDING]}")
    weights.refuse(problems)


# --- the family ----------------------------------------------------------------------------------------------------


class MT5(DecoderFamily):
    """mT5 from small to XXL, and checkpoints of the same architecture."""

    name = "mT5"
    gap = "<extra_id_0>"
    config_changes: Mapping[str, Any] = {"tie_word_embeddings": False}
    vocabulary = frozenset({"body.shared.weight"})
    delicate: tuple[str, ...] = ("head.weight",)

    load_config = staticmethod(load_config)

    def gap_after(self, text: str) -> str:
        """The sentinel; its piece of the vocabulary begins with a blank."""
        return self.gap if not text or text[-1].isspace() else f" {self.gap}"

    def with_gaps(self, answers: Answers) -> Answers:
        """The same, and an answer to a gap begins with the gap's name, as mT5 has learnt."""
        written = super().with_gaps(answers)
        has_gap = written.templates != answers.templates
        return replace(written, decoder_prefix=answers.decoder_prefix or (self.gap if has_gap else ""))

    def start_token(self) -> tuple[str, Any]:
        return "decoder_start_token_id", self.config.decoder_start_token_id

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's tensors."""
        return Weights(self.directory)

    def build(self, dropout: float, gradient_checkpointing: bool) -> CandidateScorer:
        config = self.load_config(self.directory)
        return make_scorer(config, self.form, dropout, gradient_checkpointing, self.candidate_score)

    def check_weights(self, may_be_new: bool = False) -> list[str]:
        with torch.device("meta"):
            check_weights(self.build(0.0, False), self.weights)
        return []

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        if name == "head.weight":
            key = head_key(self.weights)
            if self.head_rows is None:
                return self.weights.tensor(key, part).float()
            return self.weights.rows(key, self.head_rows[part]).float()
        return self.weights.tensor(name.removeprefix("body."), part).float()

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        if name != "head.weight":
            return {name.removeprefix("body."): value}
        if self.head_rows is None:
            return {HEAD: value}
        whole = self.weights.tensor(head_key(self.weights)).float().clone()
        whole[self.head_rows] = value
        return {HEAD: whole}

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for key in sorted(self.weights.keys() - set(written)):
            if not key.endswith("embed_tokens.weight"):  # a copy of the embedding that some checkpoints hold
                yield key, self.weights.tensor(key).float()

    @staticmethod
    def describe(config: Any) -> str:
        layers = f"{config.num_layers} encoder and {config.num_decoder_layers} decoder layers"
        return f"mT5, width {config.d_model}, {layers}, vocabulary {config.vocab_size:,}"

    @staticmethod
    def count_parameters(config: Any, num_head_rows: int | None, mode: Mode = "auto") -> Parameters:
        form = CandidateForm(num_head_rows is not None, tuple(range(num_head_rows or 0)), (0,), 0)
        with torch.device("meta"):
            scorer = make_scorer(config, form, 0.0, gradient_checkpointing=False)
        embedding = scorer.body.shared.weight.numel()
        body = sum(parameter.numel() for parameter in scorer.body.parameters())
        kept_head, linear = scorer.head.weight.numel(), linear_widths(scorer)
        return Parameters(body, embedding, embedding, kept_head, vocabulary=2 * embedding, linear=linear)

    activations = staticmethod(encoder_decoder)

    @staticmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_answer_tokens: int) -> float:
        width, inner = config.d_model, config.num_heads * config.d_kv
        feed_forward = 3 * width * config.d_ff  # gated: two matrices in, one out
        num_layers, num_decoder_layers = config.num_layers, config.num_decoder_layers
        per_encoder_token = num_layers * (4 * width * inner + feed_forward) + num_decoder_layers * 2 * width * inner
        per_decoder_token = num_decoder_layers * (6 * width * inner + feed_forward)
        sizes = np.asarray(lengths, dtype=np.float64)
        num_outputs = num_answer_tokens * len(sizes)
        pairs = num_layers * (sizes**2).sum() + num_decoder_layers * num_answer_tokens * (num_outputs + sizes.sum())
        return float(2 * (per_encoder_token * sizes.sum() + per_decoder_token * num_outputs + 2 * inner * pairs))
