"""XLM-R: an encoder that scores candidates at the template's mask (cloze), or with a classification head (head).

The body is transformers' own, without a head. In released checkpoints the output rows of the masked language model
*are* the input embedding, and so they are here: one look-up gives the embeddings of the prompts and the rows of the
answers. What is trained stays tied, under ZeRO-3 the embedding is gathered once, and the export is a checkpoint like
the one that training began with. A checkpoint that is not tied (``tie_word_embeddings: false``) has rows of its own.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alsace_dist.config import Mode, Pooling
from alsace_dist.data.rows import Answers, Candidates, EncodedRow
from alsace_dist.errors import UserError
from alsace_dist.models.batches import Inputs, pad_prompts
from alsace_dist.models.encoder import (
    XL,
    ChoiceScorer,
    ClassificationHead,
    ClozeHead,
    ClozeScorer,
    Collator,
    EncoderGeometry,
    HeadScorer,
    collate_choices,
    make_body,
)
from alsace_dist.models.family import DEFAULTS, HEAD_PART, WHOLE, Family, Options, Parameters, linear_widths
from alsace_dist.models.footprint import encoder
from alsace_dist.models.heads import (
    CHOICE,
    CLASSIFICATION,
    POOLING_KEY,
    HeadKind,
    config_of_head,
    new_values,
)
from alsace_dist.models.weights import SOUND, Weights, read_config

MASK = "<mask>"
BLANK = "▁"  # SentencePiece's sign of a blank
EMBEDDING = "body.embeddings.word_embeddings.weight"
BODY, LM_HEAD = "roberta.", "lm_head."  # where checkpoints keep the parts
BIAS, ROWS, ROWS_BIAS = "lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias"
PARTIAL = ("head.bias", "head.rows")  # parameters of which the module may hold a part
# Tensors that checkpoints may hold and no score depends on: the other head, a pooler, buffers of old versions.
UNSCORED = re.compile(
    r"lm_head\.(bias|(dense|decoder|layer_norm)\.(weight|bias))|classifier\.((dense|out_proj)\.)?(weight|bias)"
    r"|(roberta\.)?(pooler\.dense\.(weight|bias)|embeddings\.(position_ids|token_type_ids))"
)
NO_NAME = re.compile(r"label_\d+", re.IGNORECASE)  # what transformers calls labels that were given no names


# --- the family ----------------------------------------------------------------------------------------------------


class XLMR(Family):
    """XLM-R base and large, XL and XXL (``xlm-roberta-xl``, which normalises before each layer), and encoders of the
    same architecture."""

    name = "XLM-R"
    modes = ("cloze", "head")
    gap = MASK
    vocabulary = frozenset({EMBEDDING})

    def __init__(self, directory: Path, answers: Answers, options: Options = DEFAULTS) -> None:
        super().__init__(directory, answers, options)
        self.pooling = self._pooling()
        self.config_changes = self._config_changes()
        longest_prompt = self.config.max_position_embeddings - self.config.pad_token_id - 1
        self._num_spare = longest_prompt - answers.max_tokens
        if self._num_spare < 0:
            raise UserError(
                f"task.max_tokens: {answers.max_tokens} for a model of {longest_prompt} positions; lower it"
            )
        fixed = [self.candidates(texts, language) for language, texts in answers.fixed.items()]
        self.delicate: tuple[str, ...] = ("head.out_proj.weight",)
        if self.mode == "cloze":
            self._vocabulary = self._scored_vocabulary(fixed)
            mask_id, pad_id = self.tokenizer.mask_token_id, self.tokenizer.pad_token_id
            self._collator = Collator(self._vocabulary, mask_id, pad_id, options.masks == "left_to_right")
            self.delicate = ("head.bias",) if self.is_tied else ("head.bias", "head.rows")

    @classmethod
    def mode_of(cls, answers: Answers, options: Options) -> Mode:
        mode = super().mode_of(answers, options)
        templates = cls.templates_with(MASK, answers)
        counts = [template.count(MASK) for template in templates]
        if mode == "auto":
            mode = "cloze" if any(counts) else "head"
        if answers.decoder_prefix:
            raise UserError("task.decoder_prefix: XLM-R has no decoder; remove it")
        if mode == "cloze":
            if wrong := next((one for one, count in zip(templates, counts, strict=True) if count != 1), None):
                num = wrong.count(MASK)
                raise UserError(f"task.template: {wrong!r} holds {MASK} {num} times; write it once, for the answer")
            if options.pooling:
                raise UserError("model.pooling: is what a classification head reads, and this is cloze; remove it")
        elif options.masks != "together":
            raise UserError("model.masks: is how a cloze is filled, and this is a classification head; remove it")
        elif answers.by_token or answers.less_context_free:
            raise UserError(
                "task.candidate_score: a head gives a candidate one number, whatever its tokens; remove it, or set "
                "model.mode: cloze"
            )
        elif any(texts != answers.labels for texts in answers.fixed.values()):
            raise UserError(
                f"task.verbalizers: a classification head answers with labels and reads no words; remove them, or "
                f"write {MASK} into the template and set model.mode: cloze"
            )
        return mode

    def gap_after(self, text: str) -> str:
        return "" if self.mode == "head" else MASK

    @staticmethod
    def load_config(directory: Path) -> Any:
        from transformers import XLMRobertaConfig, XLMRobertaXLConfig

        value = read_config(directory, EncoderGeometry)
        kind = XLMRobertaXLConfig if value.get("model_type") == XL else XLMRobertaConfig
        try:
            config = kind.from_dict(value)
        except Exception as error:  # transformers raises several kinds of errors
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{directory / 'config.json'}: {reason}; {SOUND}") from None
        if config.is_decoder or not isinstance(config.pad_token_id, int):
            raise UserError(f"{directory / 'config.json'}: is_decoder, or no pad_token_id, is no XLM-R's; {SOUND}")
        return config

    # --- prompts and candidates ------------------------------------------------------------------------------------

    def check_tokenizer(self) -> None:
        super().check_tokenizer()
        if self.tokenizer.pad_token_id != self.config.pad_token_id:
            raise UserError(
                f"{self.directory}: pad_token_id is {self.tokenizer.pad_token_id} in the tokenizer and "
                f"{self.config.pad_token_id} in config.json, and positions count from there; {SOUND}"
            )
        if self.mode == "cloze" and self.tokenizer.mask_token != MASK:
            raise UserError(f"{self.directory}: the tokenizer has no {MASK}; get a sound one, or set model.mode: head")
        first = self.tokenizer("")["input_ids"][:1]
        if self.mode == "head" and first != [self.tokenizer.cls_token_id]:
            raise UserError(f"{self.directory}: the tokenizer puts no <s> before a text; {SOUND}")

    def candidates(self, texts: tuple[str, ...], language: str) -> Candidates:
        if self.mode == "head" and self.answers.fixed:  # labels are outputs, not words
            return Candidates(((),) * len(texts))
        return super().candidates(texts, language)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """A text as token ids. A blank that is a token by itself is left out: no mask stands for a blank.

        In scripts without blanks words would begin with one, and take two masks.
        """
        ids = super().token_ids(text)
        return ids[1:] if ids and self.tokenizer.convert_ids_to_tokens(ids[0]) == BLANK else ids

    def encode_candidates(self, texts: tuple[str, ...]) -> Candidates:
        tokens = tuple(self.token_ids(text) for text in texts)
        longest = max(map(len, tokens))
        if self.mode == "head" and longest + 2 > self._num_spare:
            raise UserError(
                f"task.max_tokens: {self.answers.max_tokens} leaves no room for a candidate of {longest} tokens behind "
                f"the prompt; lower it to {self.answers.max_tokens + self._num_spare - longest - 2}"
            )
        if self.mode == "cloze" and longest - 1 > self._num_spare:  # the template's mask is counted already
            most = self.answers.max_tokens + self._num_spare - (longest - 1)
            raise UserError(
                f"task.max_tokens: {self.answers.max_tokens} leaves no room for the {longest} masks of the longest "
                f"answer; lower it to {most}"
            )
        return Candidates(tokens)

    def _scored_vocabulary(self, fixed: Sequence[Candidates]) -> Sequence[int] | range:
        """Ids of the pieces that the head scores: those of the fixed candidates, or all.

        The softmax over a few pieces is the whole softmax but for a constant at each mask, which cancels if all
        candidates of a row are read at the same masks: if they are equally long, and not read after what they begin
        with.
        """
        lengths = [{len(tokens) for tokens in one.tokens} for one in fixed]
        if fixed and all(own == {1} or (len(own) == 1 and self.options.masks == "together") for own in lengths):
            return sorted({token for one in fixed for tokens in one.tokens for token in tokens})
        return range(self.config.vocab_size)

    def collate(self, rows: Sequence[EncodedRow]) -> Inputs:
        if self.mode == "cloze":
            return self._collator(self.with_context_free(rows))
        if self.head_kind is CHOICE:
            return collate_choices(rows, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return Inputs(
            *pad_prompts([row.input_ids for row in rows], self.tokenizer.pad_token_id),
            num_candidates=len(self.answers.labels),
        )

    def num_tokens(self, row: EncodedRow) -> int:
        if self.mode == "head" and self.head_kind is CHOICE:
            return sum(len(row.input_ids) + len(tokens) + 2 for tokens in row.candidates.tokens)
        return super().num_tokens(row)

    @property
    def head_kind(self) -> HeadKind:
        """In mode head: over the task's labels, or over candidates of each example's own."""
        return CLASSIFICATION if self.answers.fixed else CHOICE

    @property
    def num_head_rows(self) -> int | None:
        if self.mode == "head":
            return 1 if self.head_kind is CHOICE else len(self.answers.labels)
        return None if isinstance(self._vocabulary, range) else len(self._vocabulary)

    @property
    def answers_in_words(self) -> str:
        if self.mode == "head":
            kind = "multiple-choice" if self.head_kind is CHOICE else "classification"
            return f"by a {kind} head over the {self.pooling} token{'s' * (self.pooling == 'mean')}"
        order = "left to right" if self.options.masks == "left_to_right" else "together"
        return "at the mask" if self.num_head_rows else f"at several masks {order}, which take the whole output head"

    # --- the module and its weights --------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's tensors."""
        return Weights(self.directory)

    @property
    def is_tied(self) -> bool:
        """Whether the rows of the output head are the embedding's."""
        return bool(self.config.tie_word_embeddings)

    def build(self, dropout: float, gradient_checkpointing: bool) -> ClozeScorer | HeadScorer | ChoiceScorer:
        if self.mode == "cloze":
            about = (self.config, dropout, gradient_checkpointing, self._vocabulary, self.candidate_score)
            return ClozeScorer(*about)
        if self.head_kind is CHOICE:
            return ChoiceScorer(self.config, dropout, gradient_checkpointing, self.pooling)
        return HeadScorer(self.config, dropout, gradient_checkpointing, len(self.answers.labels), self.pooling)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape in the module."""
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in self.build(0.0, False).named_parameters()}

    @property
    def trained_whole(self) -> Collection[str]:  # type: ignore[override]
        """As in ``TrainableModel``: a classification head, which adapters could not make from random values."""
        return [name for name in self._shapes if name.startswith(HEAD_PART)] if self.mode == "head" else []

    @cached_property
    def _prefix(self) -> str:
        """What names of the encoder's tensors begin with; nothing if the encoder was saved by itself."""
        return BODY if any(key.startswith(BODY) for key in self.weights) else ""

    def _key(self, name: str) -> str:
        """Where the checkpoint keeps a parameter."""
        part, _, rest = name.partition(".")
        if part == "body":
            return self._prefix + rest
        if self.mode == "head":
            return self.head_kind.key(rest)
        return {"rows": ROWS, "bias": BIAS if self.is_tied else ROWS_BIAS}.get(rest, LM_HEAD + rest)

    def check_weights(self, may_be_new: bool = False) -> list[str]:
        remarks = self._check_head(may_be_new)
        shapes = {name: shape for name, shape in self._shapes.items() if not self._is_new(name)}
        size = self.config.vocab_size
        needed = {self._key(name): (size, *shape[1:]) if name in PARTIAL else shape for name, shape in shapes.items()}
        problems = self.weights.problems(needed, {key for key in self.weights if UNSCORED.fullmatch(key)})
        if self.mode == "cloze" and self.is_tied and not problems:
            for key, twin in ((ROWS, self._key(EMBEDDING)), (ROWS_BIAS, BIAS)):
                if key in self.weights and not torch.equal(self._rows(key, WHOLE), self._rows(twin, WHOLE)):
                    problems.append(f"{key} differs from {twin}, so tie_word_embeddings there must be false")
        self.weights.refuse(problems)
        return remarks

    def _check_head(self, may_be_new: bool) -> list[str]:
        """Raises ``UserError`` if the checkpoint's head is of no use for the mode; what to know of a new head."""
        if self.mode == "cloze":
            if not any(key.startswith(LM_HEAD) for key in self.weights):
                raise UserError(
                    f"{self.directory}: has no masked language model's head (lm_head.*), which scores the answers at "
                    f"{MASK}; get a checkpoint that has one, or set model.mode: head"
                )
            return []
        misfit, labels = self._head_misfit, ", ".join(self.answers.labels)
        is_of_labels = self.head_kind is CLASSIFICATION
        if misfit and is_of_labels and sorted(self._labels_of_head) == sorted(map(str.casefold, self.answers.labels)):
            raise UserError(f"task.labels: {labels}; {self.directory} {misfit}: give task.labels in that order")
        if misfit and not may_be_new:
            raise UserError(
                f"{self.directory}: {misfit}, and a new one would answer at random; finetune it (finetune: in the "
                f"config), or write {MASK} into the template to ask the masked language model"
            )
        is_replaced = self._has_head and misfit
        for_what = f" for {labels}" * is_of_labels
        return [f"{self.directory}: {misfit}; finetuning starts with a new one{for_what}"] if is_replaced else []

    # --- the classification head -----------------------------------------------------------------------------------

    @property
    def _has_head(self) -> bool:
        """Whether the checkpoint holds a classification head, of whatever task."""
        return all(self._key(name) in self.weights for name in self._shapes if name.startswith(HEAD_PART))

    @property
    def _labels_of_head(self) -> list[str]:
        if self.head_kind is CHOICE:
            return []
        return [str(label).casefold() for label in self.config.id2label.values()]

    @cached_property
    def _head_misfit(self) -> str:
        """Why the checkpoint's head is none for this task; empty if it is one."""
        if not self._has_head:
            return f"has no {self.head_kind.name}"
        num_outputs, labels = self.weights.shape(self.head_kind.outputs)[0], self._labels_of_head
        if self.head_kind is CHOICE:
            return "" if num_outputs == 1 else f"has a head with {num_outputs} outputs, and choices need one"
        if num_outputs != len(self.answers.labels):
            return f"has a classification head with {num_outputs} outputs for {len(self.answers.labels)} labels"
        if labels == [label.casefold() for label in self.answers.labels] or all(map(NO_NAME.fullmatch, labels)):
            return ""
        return f"has a classification head for {', '.join(map(str, self.config.id2label.values()))}"

    def _is_new(self, name: str) -> bool:
        return self.mode == "head" and name.startswith(HEAD_PART) and bool(self._head_misfit)

    @cached_property
    def _new_head(self) -> dict[str, Tensor]:
        """Initial values of a new head: alike on all ranks."""
        shapes = {name: shape for name, shape in self._shapes.items() if name.startswith(HEAD_PART)}
        return new_values(shapes, self.config.initializer_range, self.options.seed)

    def _pooling(self) -> Pooling:
        stored = read_config(self.directory).get(POOLING_KEY)
        if stored == "mean" and self.options.pooling == "first":
            raise UserError(
                f"model.pooling: first, and the head of {self.directory} was trained on the mean ({POOLING_KEY} in its "
                "config.json); remove it"
            )
        return "mean" if stored == "mean" else self.options.pooling or "first"

    # --- values, in and out ----------------------------------------------------------------------------------------

    def _rows(self, key: str, part: slice) -> Tensor:
        """Of a tensor with a row for each piece of the vocabulary, the rows that the head scores."""
        if isinstance(self._vocabulary, range):
            return self.weights.tensor(key, part).float()
        return self.weights.rows(key, self._vocabulary[part]).float()

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        if self._is_new(name):
            return self._new_head[name][part]
        if name in PARTIAL:
            return self._rows(self._key(name), part)
        return self.weights.tensor(self._key(name), part).float()

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        key = self._exported_key(name)
        if name not in PARTIAL:
            return {key: value}
        whole = self.weights.tensor(key).float().clone()
        whole[list(self._vocabulary)] = value
        # In an untied checkpoint transformers reads the bias of the rows, and has another one that it does not read.
        return {key: whole} | ({BIAS: whole.clone()} if key == ROWS_BIAS else {})

    def _exported_key(self, name: str) -> str:
        return BODY + name.removeprefix("body.") if name.startswith("body.") else self._key(name)

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``: parameters that were frozen.

        Of the checkpoint's pooler and other heads nothing remains: they belong to the encoder before it was trained.
        """
        for name in self._shapes:
            if self._exported_key(name) not in written:
                yield from self.exported(name, self.initial_value(name)).items()

    def _config_changes(self) -> dict[str, Any]:
        kind = "XLMRobertaXL" if self.config.model_type == XL else "XLMRoberta"
        if self.mode == "cloze":
            return {"architectures": [f"{kind}ForMaskedLM"]}
        return config_of_head(self.head_kind, kind, self.answers.labels, self.pooling)

    # --- sizes -----------------------------------------------------------------------------------------------------

    @staticmethod
    def describe(config: Any) -> str:
        name = "XLM-R XL" if config.model_type == XL else "XLM-R"
        layers = f"{config.num_hidden_layers} layers, {config.max_position_embeddings} positions"
        return f"{name}, width {config.hidden_size}, {layers}, vocabulary {config.vocab_size:,}"

    @staticmethod
    def count_parameters(config: Any, num_head_rows: int | None, mode: Mode = "auto") -> Parameters:
        size = config.vocab_size
        with torch.device("meta"):
            body = make_body(config, 0.0, gradient_checkpointing=False)
            if mode == "head":
                whole = kept = _num_parameters(ClassificationHead(config, num_head_rows or 0, 0.0))
            else:
                whole = _num_parameters(ClozeHead(config, size))
                kept = _num_parameters(ClozeHead(config, size if num_head_rows is None else num_head_rows))
        embedding = size * config.hidden_size
        has_rows = mode != "head" and not config.tie_word_embeddings
        return Parameters(
            _num_parameters(body),
            embedding,
            whole,
            kept,
            vocabulary=embedding * (2 if has_rows else 1),
            linear=linear_widths(body),
            new_head=kept if mode == "head" else 0,
        )

    activations = staticmethod(encoder)

    @staticmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_answer_tokens: int) -> float:
        width, num_layers = config.hidden_size, config.num_hidden_layers
        per_token = num_layers * (4 * width**2 + 2 * width * config.intermediate_size)
        sizes = np.asarray(lengths, dtype=np.float64)
        return float(2 * (per_token * sizes.sum() + 2 * width * num_layers * (sizes**2).sum()))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
