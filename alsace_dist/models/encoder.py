"""An encoder as a scorer: at the template's mask with the masked language model's head, or with a classification head.

The body is transformers' own, without a head; batches of cloze prompts are made here, too.
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alsace_dist.config import Pooling
from alsace_dist.data.rows import Candidates, EncodedRow
from alsace_dist.models.batches import IGNORED, MOST_KEPT, CandidateScore, Inputs, attention_over, pad_prompts, stack
from alsace_dist.models.vocabulary import token_log_probs
from alsace_dist.models.weights import Activation, Depth, Extent, Geometry

XL = "xlm-roberta-xl"


class EncoderGeometry(Geometry):
    """What a body is made from."""

    hidden_size: Extent = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Extent = 12
    intermediate_size: Extent = 3072
    max_position_embeddings: Annotated[int, Field(strict=True, ge=4, le=1 << 20)] = 512
    type_vocab_size: Extent = 2
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    hidden_act: Activation = "gelu"
    chunk_size_feed_forward: Literal[0] = 0  # cuts batches, whose length it must divide
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads, {self.num_attention_heads}"
            )
        return self


# --- the module ----------------------------------------------------------------------------------------------------


class _Float32Linear(nn.Linear):
    """A linear layer with float32 results: bf16 logits would quantise the loss."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class ClozeHead(nn.Module):
    """The masked language model's head for some rows of the vocabulary. ``bias``: [num_rows]; ``rows``: [num_rows,
    width], or None where they are the embedding's."""

    def __init__(self, config: Any, num_rows: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(num_rows))
        self.rows = None if config.tie_word_embeddings else nn.Parameter(torch.empty(num_rows, config.hidden_size))

    def forward(self, hidden: Tensor, rows: Tensor | None, places: Tensor, tokens: Tensor) -> Tensor:
        """hidden [positions, width] -> float32 log-probabilities of tokens, in their shape. ``tokens``: rows of the
        head; ``places``: the position that each is read at; ``rows``: where the head has none."""
        hidden = self.layer_norm(nn.functional.gelu(self.dense(hidden)))
        weight = self.rows if rows is None else rows
        assert weight is not None
        return token_log_probs(hidden, weight, tokens, places, self.bias)


class ClassificationHead(nn.Module):
    """As transformers' own for XLM-R: dropout, a dense layer, tanh, dropout, one output per label."""

    def __init__(self, config: Any, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = _Float32Linear(config.hidden_size, num_labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled [batch, width] -> float32 logits [batch, num_labels]."""
        logits: Tensor = self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled)))))
        return logits


class Scorer(nn.Module):
    """What both modes share: the encoder.

    A mode has one ``forward``, because DeepSpeed hooks the root: calling a part of it would bypass the hooks.
    """

    def __init__(self, config: Any, dropout: float, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.first_position = config.pad_token_id + 1
        self.body: Any = make_body(config, dropout, gradient_checkpointing)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of pieces of the vocabulary, [..., width]."""
        embeddings: Tensor = self.body.embeddings.word_embeddings(ids)
        return embeddings

    def encode(self, embedded: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [batch, length, width] of prompts whose pieces are embedded.

        Positions and types are given, for transformers would take them from buffers, which have no values in a module
        that was built on the meta device.
        """
        positions = attention_mask.cumsum(dim=1) * attention_mask + self.first_position - 1
        hidden: Tensor = self.body(
            inputs_embeds=embedded,
            attention_mask=attention_over(attention_mask),
            position_ids=positions,
            token_type_ids=torch.zeros_like(attention_mask),
        ).last_hidden_state
        return hidden


class ClozeScorer(Scorer):
    """log P(candidate | prompt), read at the template's mask.

    A candidate of m tokens stands in the prompt as m masks: its log-likelihood is the sum of those of its tokens, each
    at its own mask. ``vocabulary``: ids of the pieces that the head scores.
    """

    def __init__(
        self,
        config: Any,
        dropout: float,
        gradient_checkpointing: bool,
        vocabulary: Sequence[int] | range,
        score: CandidateScore,
    ) -> None:
        super().__init__(config, dropout, gradient_checkpointing)
        self.score = score
        self.head = ClozeHead(config, len(vocabulary))
        self.vocabulary = vocabulary

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, masks: Tensor, mask_of: Tensor, tokens: Tensor
    ) -> Tensor:
        """Score candidates.

        input_ids, attention_mask: [sequences, length]; a row has as many sequences as its candidates need. masks
        [positions]: where they stand, in sequences * length. mask_of, tokens [rows, K, m]: for each token of a
        candidate which of the masks it stands at, and which row of the head it is; -100 counts for nothing: a token
        that a candidate lacks, a candidate that a row lacks.
        Returns float32 log-probabilities [rows, K] as ``CandidateScore`` makes them, normalised over the candidates of
        a row, -inf for those that it lacks.
        """
        if self.head.rows is None:
            vocabulary = self._ids(input_ids.device)
            embedded, rows = self.embed(torch.cat([input_ids.flatten(), vocabulary])).split(
                [input_ids.numel(), len(vocabulary)]
            )
        else:
            embedded, rows = self.embed(input_ids.flatten()), None
        hidden = self.encode(embedded.view(*input_ids.shape, -1), attention_mask)
        lacks = tokens == IGNORED
        log_probs = self.head(hidden.flatten(0, 1)[masks], rows, mask_of, tokens.clamp(min=0))
        by_token = log_probs.masked_fill(lacks, 0.0)
        return self.score.log_probs(by_token.sum(dim=-1), (~lacks).sum(dim=-1))

    def _ids(self, device: torch.device) -> Tensor:
        if isinstance(self.vocabulary, range):
            return torch.arange(len(self.vocabulary), device=device)
        return torch.tensor(self.vocabulary, device=device)


class HeadScorer(Scorer):
    """log P(label | prompt) of a classification head."""

    def __init__(
        self, config: Any, dropout: float, gradient_checkpointing: bool, num_labels: int, pooling: Pooling
    ) -> None:
        super().__init__(config, dropout, gradient_checkpointing)
        self.pooling = pooling
        self.head = ClassificationHead(config, num_labels, dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Float32 log-probabilities [batch, num_labels] of prompts [batch, length]."""
        return torch.log_softmax(self.logits(input_ids, attention_mask), dim=-1)

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's float32 outputs [batch, num_labels]."""
        hidden = self.encode(self.embed(input_ids), attention_mask)
        if self.pooling == "mean":
            weights = attention_mask / attention_mask.sum(dim=1, keepdim=True)
            pooled = (hidden.float() * weights[..., None]).sum(dim=1).to(hidden.dtype)
        else:
            pooled = hidden[:, 0]
        found: Tensor = self.head(pooled)
        return found


class ChoiceScorer(HeadScorer):
    """log P(candidate | prompt) of a multiple-choice head, which gives a number to each prompt with one candidate."""

    def __init__(self, config: Any, dropout: float, gradient_checkpointing: bool, pooling: Pooling) -> None:
        super().__init__(config, dropout, gradient_checkpointing, 1, pooling)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, sequence_of: Tensor) -> Tensor:  # type: ignore[override]
        """Score candidates.

        input_ids, attention_mask: [sequences, length], prompts with a candidate each; sequence_of [rows, K]: where the
        candidates of a row are, -100 for those that it lacks. Returns float32 log-probabilities [rows, K], normalised
        over the candidates of a row, -inf for those that it lacks.
        """
        logits = self.logits(input_ids, attention_mask)[:, 0][sequence_of.clamp(min=0)]
        return torch.log_softmax(logits.masked_fill(sequence_of == IGNORED, -torch.inf), dim=-1)


def make_body(config: Any, dropout: float, gradient_checkpointing: bool) -> Any:
    """An encoder without a head, and without a padding token: what is padded reaches no score and no gradient.

    transformers would set the padding's embedding to zero here, which under ``zero.Init`` is on another rank.
    """
    from transformers import XLMRobertaModel, XLMRobertaXLModel

    config = copy.copy(config)
    config.pad_token_id = None
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    kind = XLMRobertaXLModel if config.model_type == XL else XLMRobertaModel
    body = kind(config, add_pooling_layer=False)
    if gradient_checkpointing:
        body.activation_checkpointing_enable({"use_reentrant": False})
    return body


# --- batches -------------------------------------------------------------------------------------------------------


def collate_choices(rows: Sequence[EncodedRow], pad_id: int, end_id: int) -> Inputs:
    """What ``ChoiceScorer`` takes: every candidate behind its row's prompt, as a second text: ``<s> prompt </s></s>
    candidate </s>``."""
    sequences = [[*row.input_ids, end_id, *candidate, end_id] for row in rows for candidate in row.candidates.tokens]
    numbers = torch.arange(len(sequences)).split([len(row.candidates) for row in rows])
    places = stack(numbers, IGNORED)
    return Inputs(*pad_prompts(sequences, pad_id), (places,), places.shape[1])


# --- batches of cloze prompts --------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """How a row's candidates are read.

    ``fillings``: one sequence each, what stands in the place of the template's mask; ``scored``: the masks that are
    read, each as the number of its filling and its place there. ``mask_of``: [K, m] which of these masks; ``tokens``:
    [K, m] rows of the head; -100: none.
    """

    fillings: list[tuple[int, ...]]
    scored: list[tuple[int, int]]
    mask_of: Tensor
    tokens: Tensor


class Collator:
    """Batches of encoded rows; what belongs to equal candidates is made once.

    ``left_to_right``: the token of a candidate is read where the tokens before it are filled in and those behind it are
    masks; else all of them are read where all are masks.
    """

    def __init__(self, vocabulary: Sequence[int] | range, mask_id: int, pad_id: int, left_to_right: bool) -> None:
        self._row_of = {token: row for row, token in enumerate(vocabulary)}
        self._mask_id, self._pad_id, self._left_to_right = mask_id, pad_id, left_to_right
        self._made: dict[Candidates, _Places] = {}

    def __call__(self, rows: Sequence[EncodedRow]) -> Inputs:
        """Prompts with as many masks as their candidates need, and the rest that ``ClozeScorer`` takes."""
        sequences: list[list[int]] = []
        masks: list[tuple[int, int]] = []  # sequence, position
        mask_of, tokens = [], []
        for row in rows:
            places = self._places(row.candidates)
            at, first = row.input_ids.index(self._mask_id), len(masks)
            masks += [(len(sequences) + filling, at + offset) for filling, offset in places.scored]
            sequences += [row.input_ids[:at] + list(one) + row.input_ids[at + 1 :] for one in places.fillings]
            mask_of.append(places.mask_of + first)
            tokens.append(places.tokens)
        ids, attention_mask = pad_prompts(sequences, self._pad_id)
        flat = torch.tensor([sequence * ids.shape[1] + position for sequence, position in masks])
        filled = stack(tokens, IGNORED)
        return Inputs(ids, attention_mask, (flat, stack(mask_of, 0), filled), filled.shape[1])

    def _places(self, candidates: Candidates) -> _Places:
        if candidates not in self._made:
            if len(self._made) >= MOST_KEPT:  # candidates of each row's own, which do not come again
                self._made.clear()
            # What a token is read in -> its number, in an order that does not depend on that of the candidates.
            needed = {self._read_in(tokens, place) for tokens in candidates.tokens for place in range(len(tokens))}
            ordered = sorted(needed)
            fillings = sorted({filling for filling, _ in ordered}, key=lambda filling: (len(filling), filling))
            number_of = {filling: number for number, filling in enumerate(fillings)}
            scored = [(number_of[filling], place) for filling, place in ordered]
            mask_at = {one: mask for mask, one in enumerate(ordered)}
            mask_of = [
                torch.tensor([mask_at[self._read_in(tokens, place)] for place in range(len(tokens))])
                for tokens in candidates.tokens
            ]
            rows = [torch.tensor([self._row_of[token] for token in tokens]) for tokens in candidates.tokens]
            self._made[candidates] = _Places(fillings, scored, stack(mask_of, 0), stack(rows, IGNORED))
        return self._made[candidates]

    def _read_in(self, tokens: tuple[int, ...], place: int) -> tuple[tuple[int, ...], int]:
        """Where a token of a candidate is read: what stands in the place of the template's mask, and at which of its
        places."""
        num_filled = place if self._left_to_right else 0
        return tokens[:num_filled] + (self._mask_id,) * (len(tokens) - num_filled), place
