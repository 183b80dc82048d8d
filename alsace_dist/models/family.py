"""What the rest of the program asks of a model, and the table of families that can be asked.

A family is one module here: a subclass of ``Family``, named in ``FAMILIES`` by the ``model_type`` of config.json.
Training, scoring, the plan and the export know models through this page alone.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from alsace_dist.data.rows import Answers, Candidates, EncodedRow, Part, Row
from alsace_dist.errors import UserError
from alsace_dist.models import prompts
from alsace_dist.models.batches import Inputs
from alsace_dist.models.weights import load_tokenizer, read_config

# ``model_type`` of config.json -> module and class.
FAMILIES = {"mt5": "mt5:MT5"}

WHOLE = slice(None)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. ``body`` includes ``embedding``; ``kept_head``: the head's rows that are held in memory."""

    body: int
    embedding: int
    whole_head: int
    kept_head: int

    @property
    def total(self) -> int:
        """Number of parameters of the exported model, its whole output head included."""
        return self.body + self.whole_head

    @property
    def kept(self) -> int:
        """What a rank (or, under ZeRO-3, all of them together) holds for scoring and training."""
        return self.body + self.kept_head

    def trained(self, freeze_vocabulary: bool) -> int:
        """Parameters that a training changes."""
        return self.kept - (self.embedding if freeze_vocabulary else 0)


class TrainableModel(Protocol):
    """What training and export need of a model. Names of parameters are those of the module that ``build`` makes.

    ``directory``: a ``transformers`` directory whose config and tokenizer the exported model takes over.
    ``vocabulary``: the parameters that ``freeze_vocabulary`` keeps fixed. ``delicate``: the parameters that are
    compared with the file once the module is loaded.
    """

    directory: Path
    vocabulary: frozenset[str]
    delicate: tuple[str, ...]

    def build(self, dropout: float, gradient_checkpointing: bool) -> nn.Module:
        """The module, with weights of any value; called under ``torch.device("meta")`` and ``zero.Init``, too."""

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """The float32 value that a parameter starts with, or part of its first dimension, on the CPU."""

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A trained parameter as tensors of the exported model, by their names there."""

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the exported model that were not trained, all but those that are ``written`` already."""


class Family(ABC):
    """A model directory as a scorer of a task's candidates: a ``TrainableModel`` that encodes rows, too."""

    vocabulary: frozenset[str]
    delicate: tuple[str, ...]

    def __init__(self, directory: Path, answers: Answers) -> None:
        """Raises ``UserError`` if config, tokenizer and the fixed candidates of ``answers`` do not fit together."""
        self.directory = directory
        self.answers = answers
        self.config = self.load_config(directory)
        self.tokenizer = load_tokenizer(directory)
        self._encoded: dict[tuple[str, ...], Candidates] = {}
        self._control = prompts.control_tokens(self.tokenizer)
        self.check_tokenizer()
        prompts.check_sentinels(self.tokenizer, answers.templates, answers.decoder_prefix, answers.max_tokens)

    @staticmethod
    @abstractmethod
    def load_config(directory: Path) -> Any:
        """The ``transformers`` config of the directory. Raises ``UserError`` if config.json is broken."""

    @staticmethod
    @abstractmethod
    def describe(config: Any) -> str:
        """Name of the family and geometry of the model, for people."""

    @staticmethod
    @abstractmethod
    def count_parameters(config: Any, num_head_rows: int | None) -> Parameters:
        """Counts, without weights. ``num_head_rows``: rows of the output head that are kept; None: all."""

    @staticmethod
    @abstractmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_decoder_tokens: int) -> float:
        """FLOPs of one forward pass over prompts of these lengths, a multiplication and an addition counting two."""

    @property
    @abstractmethod
    def head_rows(self) -> list[int] | None:
        """The rows of the output head that are kept, as vocabulary ids; None: all."""

    @abstractmethod
    def check_weights(self) -> None:
        """Compare names and shapes of the checkpoint with the model. Raises ``UserError`` with what does not fit."""

    @abstractmethod
    def build(self, dropout: float, gradient_checkpointing: bool) -> nn.Module:
        """The module, whose forward takes what ``collate`` makes and returns float32 log-probabilities [rows, K].

        Where rows have fewer than K candidates, -inf stands for those that they lack.
        """

    @abstractmethod
    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """As in ``TrainableModel``, from the checkpoint."""

    @abstractmethod
    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """As in ``TrainableModel``."""

    @abstractmethod
    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``."""

    @abstractmethod
    def encode_candidates(self, texts: tuple[str, ...]) -> Candidates:
        """Candidates as the tokens that are scored. ``check_candidates`` has seen them."""

    @abstractmethod
    def collate(self, rows: Sequence[EncodedRow]) -> Inputs:
        """A padded batch, on the CPU."""

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Tokenise prompts, whose texts are cut where one has more than ``max_tokens``, and candidates."""
        if not rows:
            return []
        plain = [
            [part._replace(content=prompts.as_plain_text(part.content, self._control)) if part.is_text else part
             for part in row.prompt]
            for row in rows
        ]  # fmt: skip
        texts = ["".join(part.content for part in parts) for parts in plain]
        encodings = self.tokenizer(texts, return_attention_mask=False, verbose=False).encodings
        return [self._encoded_row(*one) for one in zip(rows, plain, encodings, strict=True)]

    def _encoded_row(self, row: Row, parts: Sequence[Part], encoding: Any) -> EncodedRow:
        most = self.answers.max_tokens
        is_cut = len(encoding.ids) > most
        ids = (prompts.cut(self.tokenizer, parts, encoding, most) if is_cut else encoding).ids
        candidates = self.candidates(row.candidates, row.language)
        num_unknown = ids.count(self.tokenizer.unk_token_id)
        return EncodedRow(row.key, row.language, row.label, ids, candidates, num_unknown, is_cut)

    def check_tokenizer(self) -> None:
        """Raises ``UserError`` if the tokenizer's ids go beyond the embedding, or it lacks a token that is needed."""
        size, most = len(self.tokenizer), int(self.config.vocab_size)
        remedy = "they are of different models; get a sound checkpoint"
        if size > most:
            raise UserError(
                f"{self.directory}: the tokenizer has {size:,} tokens, the model's embedding {most:,}: {remedy}"
            )
        for name in ("eos_token_id", "pad_token_id", "unk_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise UserError(f"{self.directory}: the tokenizer has no {name.removesuffix('_id')}; {remedy}")

    def candidates(self, texts: tuple[str, ...], language: str) -> Candidates:
        """Encoded candidates, the same object for the same texts.

        Raises ``UserError`` if a candidate is empty or holds unknown tokens, or two of them are the same tokens.
        """
        if texts not in self._encoded:
            self.check_candidates(texts, language)
            self._encoded[texts] = self.encode_candidates(texts)
        return self._encoded[texts]

    def check_candidates(self, texts: tuple[str, ...], language: str) -> None:
        """Raises ``UserError`` as ``candidates`` does."""
        rows = [self.token_ids(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise UserError(f"task.verbalizers: the answer {text!r} for {language!r} has no tokens; give it text")
            if self.tokenizer.unk_token_id in row:
                raise UserError(
                    f"task.verbalizers: the answer {text!r} for {language!r} holds tokens that the model does "
                    "not know; choose words of its vocabulary"
                )
        if len(set(rows)) != len(rows):
            raise UserError(
                f"task.verbalizers: two answers for {language!r} have the same tokens: {list(texts)}; change one"
            )

    def token_ids(self, text: str) -> tuple[int, ...]:
        """A text as token ids, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def family_of(directory: Path) -> type[Family]:
    """The family of a model directory. Raises ``UserError`` if config.json is missing or of a family unknown here."""
    kind = read_config(directory).get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise UserError(f"{directory / 'config.json'}: model_type is {kind!r}; only {known} is supported")
    module, name = FAMILIES[kind].split(":")
    found: type[Family] = getattr(importlib.import_module(f"alsace_dist.models.{module}"), name)
    return found


def open_model(directory: Path, answers: Answers) -> Family:
    """A model directory as a scorer of these answers. Raises ``UserError`` if they do not fit together."""
    return family_of(directory)(directory, answers)
