"""mT5: an encoder reads the prompt once, the decoder scores the candidates.

The output head is kept apart from the body on purpose. transformers ties mT5's head to its input embedding although
the two differ in every released checkpoint, and under ZeRO-3 it then overwrites the head without a word. Here the body
(``MT5Model``) has no head at all; the rows that the candidates need are a small parameter of their own, filled from the
checkpoint's ``lm_head.weight`` and spliced back into the whole head on export.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alsace_dist.data.rows import Answers, Candidates, EncodedRow
from alsace_dist.errors import UserError
from alsace_dist.models.batches import IGNORED, Inputs, pad
from alsace_dist.models.family import WHOLE, Family, Parameters
from alsace_dist.models.weights import SOUND, Weights, read_config

HEAD = "lm_head.weight"
EMBEDDING = "shared.weight"


# --- the form of the candidates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateForm:
    """How candidates are scored.

    ``single_token``: every candidate is one token long, scored at one position of the decoder; then the rows of
    ``vocabulary`` (sorted ids of all candidates) are all that is needed of the output head. Otherwise candidates are
    sequences that end with the end-of-sequence token, so that none wins for being the beginning of another, and the
    head is kept whole. ``decoder_prefix``: what the decoder starts with, the start token first. ``longest``: tokens to
    which shorter sequences are filled up, so that shapes, and with them last bits, do not vary from batch to batch.
    """

    single_token: bool
    vocabulary: tuple[int, ...]
    decoder_prefix: tuple[int, ...]
    pad_id: int
    longest: int = 1

    @classmethod
    def of(
        cls, candidates: Iterable[Candidates], decoder_prefix: tuple[int, ...], single_token: bool, pad_id: int
    ) -> "CandidateForm":
        """The form of fixed candidates, which are all there will be."""
        rows = [row for one in candidates for row in one.tokens]
        vocabulary = sorted({token for row in rows for token in row}) if single_token else ()
        longest = max((len(row) for row in rows), default=1)
        return cls(single_token, tuple(vocabulary), decoder_prefix, pad_id, longest)

    @property
    def head_rows(self) -> list[int] | None:
        """Rows of the output head that are kept; None: all."""
        return list(self.vocabulary) if self.single_token else None


class Collator:
    """Batches of encoded rows; what belongs to equal candidates is made once."""

    def __init__(self, form: CandidateForm) -> None:
        self._form = form
        self._row_of = {token: row for row, token in enumerate(form.vocabulary)}
        self._made: dict[Candidates, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Sequence[EncodedRow]) -> Inputs:
        """Prompts padded to the longest; decoder inputs and predicted tokens as ``CandidateScorer`` takes them."""
        ids = pad([row.input_ids for row in rows], self._form.pad_id)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        decoder_inputs, answer_ids = zip(*(self._candidates(row.candidates) for row in rows), strict=True)
        return Inputs(ids, mask, _stack(decoder_inputs, self._form.pad_id), _stack(answer_ids, IGNORED))

    def _candidates(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        if candidates not in self._made:
            prefix = torch.tensor(self._form.decoder_prefix)
            if self._form.single_token:
                rows = torch.tensor([self._row_of[row[0]] for row in candidates.tokens])
                self._made[candidates] = (prefix, rows)
            else:
                self._made[candidates] = self._sequences(candidates)
        return self._made[candidates]

    def _sequences(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Decoder inputs and predicted tokens [K, prefix + longest - 1]: position i predicts what comes after it."""
        prefix = list(self._form.decoder_prefix)
        longest = max(self._form.longest, *(len(row) for row in candidates.tokens))
        inputs = torch.full((len(candidates), len(prefix) + longest - 1), self._form.pad_id)
        targets = torch.full_like(inputs, IGNORED)
        for index, row in enumerate(candidates.tokens):
            inputs[index, : len(prefix) + len(row) - 1] = torch.tensor(prefix + list(row[:-1]))
            targets[index, len(prefix) - 1 : len(prefix) - 1 + len(row)] = torch.tensor(row)
        return inputs, targets


def _stack(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors of one rank as one, each filled up at its ends with ``value`` to the largest size."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    shape = np.max([tensor.shape for tensor in tensors], axis=0).tolist()
    whole = torch.full((len(tensors), *shape), value, dtype=tensors[0].dtype)
    for row, tensor in zip(whole, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


# --- the module ----------------------------------------------------------------------------------------------------


class CandidateHead(nn.Module):
    """Rows of the output head. ``weight``: [num_rows, d_model]."""

    def __init__(self, num_rows: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, d_model))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, d_model] -> float32 logits [batch, num_rows]; bf16 logits would quantise the loss."""
        return nn.functional.linear(hidden.float(), self.weight.float())


class CandidateScorer(nn.Module):
    """log P(candidate | prompt) over the candidates of each prompt: the encoder runs once, the decoder scores.

    One module with one ``forward``, because DeepSpeed hooks the root: calling a part of it would bypass the hooks.
    """

    head: CandidateHead

    def __init__(self, body: Any, form: CandidateForm) -> None:
        super().__init__()
        self.body: Any = body
        self.single_token = form.single_token
        num_rows = len(form.vocabulary) if form.single_token else body.config.vocab_size
        self.head = CandidateHead(num_rows, body.config.d_model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        """Score candidates.

        input_ids, attention_mask: [batch, length]. With single-token candidates decoder_input_ids is [batch, prefix]
        and answer_ids [batch, K] indexes the head's rows. Otherwise decoder_input_ids is [batch, K, target] and
        answer_ids [batch, K, target] holds the token that each position predicts. -100 counts for nothing: a position
        without a token, a candidate that a row lacks.
        Returns float32 log-probabilities [batch, K], normalised over a row's candidates, -inf for those that it lacks.
        """
        if self.single_token:
            output = self.body(
                input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
            )
            # The softmax over K logits is the full softmax renormalised over the candidates: exact without full logits.
            lacks = answer_ids == IGNORED
            logits = self.head(output.last_hidden_state[:, -1]).gather(1, answer_ids.clamp(min=0))
            return torch.log_softmax(logits.masked_fill(lacks, -torch.inf), dim=-1)
        return self._score_sequences(input_ids, attention_mask, decoder_input_ids, answer_ids)

    def _score_sequences(
        self, input_ids: Tensor, mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        batch, num_candidates, _ = decoder_input_ids.shape
        encoded = self.body.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        hidden = self.body.decoder(
            input_ids=decoder_input_ids.flatten(0, 1),
            encoder_hidden_states=encoded.repeat_interleave(num_candidates, dim=0),
            encoder_attention_mask=mask.repeat_interleave(num_candidates, dim=0),
            use_cache=False,
        ).last_hidden_state
        counted = answer_ids.flatten(0, 1) != IGNORED
        tokens = answer_ids.flatten(0, 1)[counted]
        token_log_probs = -nn.functional.cross_entropy(self.head(hidden[counted]), tokens, reduction="none")
        # index_add would not do: its order of summation, and so the last bits, vary on GPUs.
        by_position = torch.zeros(counted.shape, device=hidden.device)
        by_position[counted] = token_log_probs
        lacks = ~counted.any(dim=1).view(batch, num_candidates)
        sums = by_position.sum(dim=1).view(batch, num_candidates)
        return torch.log_softmax(sums.masked_fill(lacks, -torch.inf), dim=-1)


def make_body(config: Any, dropout: float) -> Any:
    """An mT5 without a head. Encoder, decoder and ``shared`` hold one and the same embedding module."""
    from transformers import MT5Model

    config.dropout_rate = dropout
    config.use_cache = False
    body = MT5Model(config)
    body.set_input_embeddings(body.shared)
    return body


def make_scorer(config: Any, form: CandidateForm, dropout: float, gradient_checkpointing: bool) -> CandidateScorer:
    """The module that scores candidates of this form."""
    body = make_body(config, dropout)
    if gradient_checkpointing:
        body.activation_checkpointing_enable({"use_reentrant": False})
    return CandidateScorer(body, form)


# --- files ---------------------------------------------------------------------------------------------------------


def load_config(directory: Path) -> Any:
    """The ``MT5Config`` of a directory. Raises ``UserError`` if config.json is broken."""
    from transformers import MT5Config

    value = read_config(directory)
    try:
        return MT5Config.from_dict(value)
    except Exception as error:  # transformers raises several kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory / 'config.json'}: {reason}; {SOUND}") from None


def head_key(weights: Weights) -> str:
    """Where the output head is: its own tensor, or the embedding in a checkpoint that was saved tied."""
    return HEAD if HEAD in weights else EMBEDDING


def check_weights(module: CandidateScorer, weights: Weights) -> None:
    """Compare names and shapes of a checkpoint with the model. Raises ``UserError`` with all that do not fit.

    Tensors that transformers itself leaves out or duplicates are allowed.
    """
    needed = {key: tuple(getattr(p, "ds_shape", p.shape)) for key, p in module.body.named_parameters()}
    known = {HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    known.add("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    problems = [f"{key} is missing" for key in sorted(needed.keys() - weights.keys())]
    problems += [f"{key} is not of this model" for key in sorted(weights.keys() - needed.keys() - known)]
    problems += [
        f"{key} has shape {weights.shape(key)}, not {shape}"
        for key, shape in sorted(needed.items())
        if key in weights and weights.shape(key) != shape
    ]
    head_shape = weights.shape(head_key(weights)) if not problems else needed[EMBEDDING]
    if head_shape != needed[EMBEDDING]:
        problems.append(f"{HEAD} has shape {head_shape}, not {needed[EMBEDDING]}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        rows = "; ".join(problems[:5])
        raise UserError(f"{weights.directory}: does not fit its config.json: {rows}{more}; {SOUND}")


# --- the family ----------------------------------------------------------------------------------------------------


class MT5(Family):
    """mT5 from small to XXL, and checkpoints of the same architecture."""

    vocabulary = frozenset({"body.shared.weight"})
    delicate: tuple[str, ...] = ("head.weight",)

    def __init__(self, directory: Path, answers: Answers) -> None:
        super().__init__(directory, answers)
        start = self.config.decoder_start_token_id
        if not isinstance(start, int) or not 0 <= start < self.config.vocab_size:
            raise UserError(
                f"{directory / 'config.json'}: decoder_start_token_id is {start!r}, no id of its vocabulary; {SOUND}"
            )
        # Decide it over all languages of the task: finetuning encodes the source language only, but must train the same
        # form of score that the later scoring pass uses.
        self.is_single_token = bool(answers.fixed) and all(len(self.token_ids(text)) == 1 for text in answers.every)
        fixed = [self.candidates(texts, language) for language, texts in answers.fixed.items()]
        prefix = self.token_ids(answers.decoder_prefix) if answers.decoder_prefix else ()
        if self.tokenizer.unk_token_id in prefix:
            raise UserError(f"task.decoder_prefix: {answers.decoder_prefix!r} holds unknown tokens; choose another")
        prefix = (self.config.decoder_start_token_id, *prefix)
        self.form = CandidateForm.of(fixed, prefix, self.is_single_token, self.tokenizer.pad_token_id)
        self._collator = Collator(self.form)

    load_config = staticmethod(load_config)

    @property
    def head_rows(self) -> list[int] | None:
        return self.form.head_rows

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's tensors."""
        return Weights(self.directory)

    def encode_candidates(self, texts: tuple[str, ...]) -> Candidates:
        end = () if self.is_single_token else (self.tokenizer.eos_token_id,)
        return Candidates(tuple(self.token_ids(text) + end for text in texts))

    def collate(self, rows: Sequence[EncodedRow]) -> Inputs:
        return self._collator(rows)

    def build(self, dropout: float, gradient_checkpointing: bool) -> CandidateScorer:
        return make_scorer(self.load_config(self.directory), self.form, dropout, gradient_checkpointing)

    def check_weights(self) -> None:
        with torch.device("meta"):
            check_weights(self.build(0.0, False), self.weights)

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        if name == "head.weight":
            key = head_key(self.weights)
            if self.head_rows is None:
                return self.weights.tensor(key)[part].float()
            return self.weights.rows(key, self.head_rows[part]).float()
        return self.weights.tensor(name.removeprefix("body."))[part].float()

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
    def count_parameters(config: Any, num_head_rows: int | None) -> Parameters:
        form = CandidateForm(num_head_rows is not None, tuple(range(num_head_rows or 0)), (0,), 0)
        with torch.device("meta"):
            scorer = make_scorer(config, form, 0.0, gradient_checkpointing=False)
        embedding = scorer.body.shared.weight.numel()
        body = sum(parameter.numel() for parameter in scorer.body.parameters())
        return Parameters(body, embedding, embedding, scorer.head.weight.numel())

    @staticmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_decoder_tokens: int) -> float:
        width, inner = config.d_model, config.num_heads * config.d_kv
        feed_forward = 3 * width * config.d_ff  # gated: two matrices in, one out
        num_layers, num_decoder_layers = config.num_layers, config.num_decoder_layers
        per_encoder_token = num_layers * (4 * width * inner + feed_forward) + num_decoder_layers * 2 * width * inner
        per_decoder_token = num_decoder_layers * (6 * width * inner + feed_forward)
        sizes = np.asarray(lengths, dtype=np.float64)
        num_outputs = num_decoder_tokens * len(sizes)
        pairs = num_layers * (sizes**2).sum() + num_decoder_layers * num_decoder_tokens * (num_outputs + sizes.sum())
        return float(2 * (per_encoder_token * sizes.sum() + per_decoder_token * num_outputs + 2 * inner * pairs))
