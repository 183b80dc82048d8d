"""What the rest of the program asks of a model, and the table of families that can be asked.

A family is one module here: a subclass of ``Family``, named in ``FAMILIES`` by the ``model_type`` of config.json.
Training, scoring, the plan and the export know models through this page alone.
"""

import importlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from alsace_dist.config import Config, Masks, Mode, Pooling, TrainConfig
from alsace_dist.data.rows import GAP, Answers, Candidates, EncodedRow, Part, Row
from alsace_dist.errors import UserError
from alsace_dist.models import prompts
from alsace_dist.models.batches import CandidateScore, Inputs
from alsace_dist.models.footprint import Activations, Kernels, PassShape
from alsace_dist.models.weights import SOUND, load_tokenizer, read_config
from alsace_dist.reading import shorten

# ``model_type`` of config.json -> module and class.
FAMILIES = {
    "mt5": "mt5:MT5",
    "xlm-roberta": "xlmr:XLMR",
    "xlm-roberta-xl": "xlmr:XLMR",
    "t5gemma2": "t5gemma2:T5Gemma2",
}

# Relatives of these that would load and score wrongly -> why.
REFUSED = {
    "umt5": "umT5 has a position bias in every layer where mT5 has one in the first, and is not verified here; use mT5",
    "t5gemma": "the first T5Gemma has attention and names of its own; use T5Gemma 2",
    "t5": "T5 shares its head with its embedding and scales what it reads; use mT5",
}

WHOLE = slice(None)
HEAD_PART = "head."  # what the names of a head's parameters begin with, in all modules


@dataclass(frozen=True)
class Options:
    """What a config says of how a model is to score. ``seed``: of parts that the checkpoint lacks."""

    mode: Mode = "auto"
    pooling: Pooling | None = None
    seed: int = 0
    masks: Masks = "together"

    @classmethod
    def of(cls, config: Config) -> "Options":
        """The options of a run."""
        return cls(config.model.mode, config.model.pooling, config.seed, config.model.masks)


DEFAULTS = Options()


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. ``body`` includes ``embedding``; ``kept_head``: the part of the head that is held in memory;
    ``vocabulary``: in matrices with a row for each piece of the vocabulary. ``beside``: in parts of the exported model
    that are not held, for they neither score nor are trained. ``linear``: inputs and outputs of all linear layers that
    can be adapted, by the ends of their names. ``new_head``: of the kept head, what is trained beside adapters."""

    body: int
    embedding: int
    whole_head: int
    kept_head: int
    vocabulary: int = 0
    beside: int = 0
    linear: Mapping[str, int] = field(default_factory=dict)
    new_head: int = 0

    @property
    def total(self) -> int:
        """Number of parameters of the exported model, its whole output head included."""
        return self.body + self.whole_head + self.beside

    @property
    def kept(self) -> int:
        """What a rank (or, under ZeRO-3, all of them together) holds for scoring and training."""
        return self.body + self.kept_head

    def trained(self, section: TrainConfig) -> int:
        """Parameters that a training changes."""
        if section.lora:
            widths = (width for name, width in self.linear.items() if section.lora.adapts(name))
            return section.lora.rank * sum(widths) + self.new_head
        return self.kept - (self.embedding if section.freeze_vocabulary else 0)


class Unit(NamedTuple):
    """Trained parameters of which tensors of an exported model are made together: their names, and how many elements
    come out."""

    names: tuple[str, ...]
    numel: int


def linear_layers(module: nn.Module) -> dict[str, int]:
    """The linear layers of a model that can be adapted, all but those of its head: name -> inputs and outputs."""
    return {
        name: layer.in_features + layer.out_features
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not name.startswith(HEAD_PART)
    }


def linear_widths(module: nn.Module) -> dict[str, int]:
    """Of the same layers, inputs and outputs summed by the ends of their names."""
    found: dict[str, int] = {}
    for name, width in linear_layers(module).items():
        end = name.rpartition(".")[2]
        found[end] = found.get(end, 0) + width
    return found


class TrainableModel(Protocol):
    """What training and export need of a model. Names of parameters are those of the module that ``build`` makes.

    ``directory``: a ``transformers`` directory whose config and tokenizer the exported model takes over.
    ``config_changes``: keys of its config.json that have another value in the exported model's. ``vocabulary``: the
    parameters that ``freeze_vocabulary`` keeps fixed. ``delicate``: the parameters that are compared with the file once
    the module is loaded. ``trained_whole``: beside adapters; those of a head that may be new.
    """

    directory: Path
    config_changes: Mapping[str, Any]
    vocabulary: frozenset[str]
    delicate: tuple[str, ...]
    trained_whole: Collection[str] = ()

    @abstractmethod
    def build(self, dropout: float, gradient_checkpointing: bool) -> nn.Module:
        """The module, with weights of any value; called under ``torch.device("meta")`` and ``zero.Init``, too."""

    @abstractmethod
    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """The float32 value that a parameter starts with, or part of its first dimension, on the CPU."""

    def units(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Unit]:
        """The trained parameters, of which these are the shapes, by what is exported together."""
        return [Unit((name,), prod(shape)) for name, shape in shapes.items()]

    def merged(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The trained parameters of a unit as those that ``exported`` knows."""
        return values

    @abstractmethod
    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A parameter as tensors of the exported model, by their names there."""

    @abstractmethod
    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the exported model that were not trained, all but those that are ``written`` already."""


class Family(TrainableModel):
    """A model directory as a scorer of a task's candidates: a ``TrainableModel`` that encodes rows, too.

    ``name``: for people. ``modes``: values of ``model.mode`` that the family has beside auto. ``gap``: how its
    templates mark the place of the answer; empty if nothing does. ``mode``: the one that scores here.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]] = ()
    gap: ClassVar[str]

    mode: Mode
    config_changes: Mapping[str, Any]
    vocabulary: frozenset[str]
    delicate: tuple[str, ...]

    def __init__(self, directory: Path, answers: Answers, options: Options) -> None:
        """Raises ``UserError`` if config, tokenizer, options and the fixed candidates do not fit together."""
        self.directory = directory
        self.options = options
        self.mode = self.mode_of(answers, options)
        self.answers = answers = self.with_gaps(answers)
        self.config = self.load_config(directory)
        self.tokenizer = load_tokenizer(directory)
        self._encoded: dict[tuple[str, ...], Candidates] = {}
        self._control = prompts.control_tokens(self.tokenizer)
        self.check_tokenizer()
        prompts.check_gaps(self.tokenizer, answers.templates, answers.decoder_prefix, answers.max_tokens, self.gap)
        prompts.check_controls(self._control, self.gap, answers.templates, answers.decoder_prefix)

    @classmethod
    def mode_of(cls, answers: Answers, options: Options) -> Mode:
        """The mode in which the model scores. Raises ``UserError`` if the family, or the task, has no such options."""
        if options.mode not in ("auto", *cls.modes):
            raise UserError(f"model.mode: {options.mode} is nothing that {cls.name} has; remove it")
        if options.pooling and "head" not in cls.modes:
            raise UserError(f"model.pooling: {cls.name} has no classification head; remove it")
        if options.masks != "together" and "cloze" not in cls.modes:
            raise UserError(f"model.masks: {cls.name} fills no masks; remove it")
        return options.mode

    def with_gaps(self, answers: Answers) -> Answers:
        """The answers with templates in which {answer} is written as the family writes it."""
        return replace(answers, templates=tuple(prompts.with_gap(one, self.gap_after) for one in answers.templates))

    @staticmethod
    def templates_with(gap: str, answers: Answers) -> list[str]:
        """The templates with this in the place of {answer}."""
        return [prompts.with_gap(one, lambda before: gap) for one in answers.templates]

    def gap_after(self, text: str) -> str:
        """How the place of the answer is written behind this text."""
        return self.gap

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
    def count_parameters(config: Any, num_head_rows: int | None, mode: Mode = "auto") -> Parameters:
        """Counts, without weights. ``num_head_rows``: rows of the output head that are kept; None: all."""

    @staticmethod
    @abstractmethod
    def forward_flops(config: Any, lengths: Sequence[int], num_answer_tokens: int) -> float:
        """FLOPs of one forward pass over prompts of these lengths, a multiplication and an addition counting two.

        ``num_answer_tokens``: positions of each prompt at which answers are scored. The output head is left out.
        """

    @staticmethod
    def activations(config: Any, shape: PassShape, weight_bytes: int, kernels: Kernels) -> Activations | None:
        """Bytes that a forward pass keeps for its backward pass; None: nobody has derived it for this family."""
        return None

    @property
    @abstractmethod
    def num_head_rows(self) -> int | None:
        """How many rows of the output head are kept; None: all."""

    @property
    @abstractmethod
    def answers_in_words(self) -> str:
        """How the candidates are scored, for people."""

    @abstractmethod
    def check_weights(self, may_be_new: bool = False) -> list[str]:
        """Compare names and shapes of the checkpoint with the model. Raises ``UserError`` with what does not fit.

        ``may_be_new``: the model is going to be trained on labels, so parts that the family can make from nothing may
        be missing. Returns what people should be warned of.
        """

    @abstractmethod
    def build(self, dropout: float, gradient_checkpointing: bool) -> nn.Module:
        """The module, whose forward takes what ``collate`` makes and returns float32 log-probabilities [rows, K].

        Where rows have fewer than K candidates, -inf stands for those that they lack.
        """

    @abstractmethod
    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """As in ``TrainableModel``, from the checkpoint."""

    @abstractmethod
    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``."""

    @abstractmethod
    def encode_candidates(self, texts: tuple[str, ...]) -> Candidates:
        """Candidates as the tokens that are scored. ``check_candidates`` has seen them."""

    @abstractmethod
    def collate(self, rows: Sequence[EncodedRow]) -> Inputs:
        """A padded batch, on the CPU."""

    def num_tokens(self, row: EncodedRow) -> int:
        """Tokens that the encoder reads of a row, by which batches are cut."""
        return len(row.input_ids) + len(row.context_free_ids)

    def stretched(self, row: EncodedRow) -> EncodedRow:
        """The same row with a prompt as long as it may be: its first token again and again, so that a gap stays one."""
        ids = row.input_ids
        return replace(row, input_ids=ids[:1] * (self.answers.max_tokens - len(ids)) + ids)

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Tokenise prompts, whose texts are cut where one has more than ``max_tokens``, and candidates."""
        if not rows:
            return []
        plain = [self._written(row.prompt) for row in rows]
        texts = ["".join(part.content for part in parts) for parts in plain]
        encodings = self.tokenizer(texts, return_attention_mask=False, verbose=False).encodings
        return [self._encoded_row(*one) for one in zip(rows, plain, encodings, strict=True)]

    def _written(self, prompt: Sequence[Part]) -> list[Part]:
        """A prompt whose texts are nothing but text, and whose gap is written as the family writes it."""
        parts: list[Part] = []
        for part in prompt:
            content = part.content
            if part == GAP:
                content = self.gap_after("".join(one.content for one in parts))
            elif part.is_text:
                content = prompts.as_plain_text(content, self._control)
            parts.append(part._replace(content=content))
        return parts

    def _encoded_row(self, row: Row, parts: Sequence[Part], encoding: Any) -> EncodedRow:
        most = self.answers.max_tokens
        is_cut = len(encoding.ids) > most
        ids = (prompts.cut(self.tokenizer, parts, encoding, most) if is_cut else encoding).ids
        candidates = self.candidates(row.candidates, row.language)
        num_unknown = ids.count(self.tokenizer.unk_token_id)
        about = (row.key, row.language, row.label, ids, candidates, num_unknown, is_cut, row.is_apart, row.category)
        return EncodedRow(*about, self._context_free_ids(row))

    def _context_free_ids(self, row: Row) -> tuple[int, ...]:
        """The prompt without context as tokens; what is cut or unknown there is so in the prompt, too."""
        if not self.answers.less_context_free:
            return ()
        parts = self._written(row.context_free)
        encoding = self.tokenizer(["".join(part.content for part in parts)], verbose=False).encodings[0]
        most = self.answers.max_tokens
        return tuple((prompts.cut(self.tokenizer, parts, encoding, most) if len(encoding.ids) > most else encoding).ids)

    @property
    def candidate_score(self) -> CandidateScore:
        """How the module makes scores of candidates."""
        return CandidateScore(self.answers.by_token, self.answers.less_context_free)

    def with_context_free(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows of a batch, and behind them the same without context where scores are compared with these."""
        return [*rows, *(row.context_free for row in rows if self.answers.less_context_free)]

    def check_tokenizer(self) -> None:
        """Raises ``UserError`` if the tokenizer's ids go beyond the embedding, it lacks a token that is needed, or it
        does not put around a text what the model has learnt."""
        size, most = self.num_pieces(), int(self.config.vocab_size)
        remedy = "they are of different models; get a sound checkpoint"
        if size > most:
            raise UserError(
                f"{self.directory}: the tokenizer has {size:,} tokens, the model's embedding {most:,}: {remedy}"
            )
        for name in ("eos_token_id", "pad_token_id", "unk_token_id"):
            if getattr(self.tokenizer, name) is None:
                raise UserError(f"{self.directory}: the tokenizer has no {name.removesuffix('_id')}; {remedy}")
        try:
            ids = self.tokenizer("a text \u2603")["input_ids"]
        except Exception as error:  # tokenizers raises bare exceptions
            raise UserError(f"{self.directory}: the tokenizer fails on a text ({shorten(error)}); {remedy}") from None
        self.check_ends(ids)

    def num_pieces(self) -> int:
        """How many rows of an embedding the tokenizer needs."""
        return len(self.tokenizer)

    def check_ends(self, ids: Sequence[int]) -> None:
        """Raises ``UserError`` if the tokens of a text do not begin or end as the model has learnt."""
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            raise UserError(
                f"{self.directory}: the tokenizer does not end texts with its eos_token; they are of different models; "
                f"{SOUND}"
            )

    def candidates(self, texts: tuple[str, ...], language: str) -> Candidates:
        """Encoded candidates, of fixed answers the same object for the same texts.

        Raises ``UserError`` if a candidate is empty or holds unknown tokens, or two of them are the same tokens.
        """
        if not self.answers.fixed:  # a row's own, which no other row has
            return self._own_candidates(texts, language)
        if texts not in self._encoded:
            self.check_candidates(texts, language)
            self._encoded[texts] = self.encode_candidates(texts)
        return self._encoded[texts]

    def _own_candidates(self, texts: tuple[str, ...], language: str) -> Candidates:
        """Candidates that the data holds: plain text, as long as a prompt at most; unknown tokens are the data's."""
        found = self.encode_candidates(tuple(prompts.as_plain_text(text, self._control) for text in texts))
        for text, tokens in zip(texts, found.tokens, strict=True):
            if not tokens or len(tokens) > self.answers.max_tokens:
                raise UserError(
                    f"task.candidates: {shorten(text, 40)!r} in {language!r} has {len(tokens)} tokens, and 1 to "
                    f"task.max_tokens ({self.answers.max_tokens}) are possible; correct it, or raise the limit"
                )
        return found

    def check_candidates(self, texts: tuple[str, ...], language: str) -> None:
        """Raises ``UserError`` as ``candidates`` does."""
        rows = [self.token_ids(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if found := self._control.search(text):
                raise UserError(
                    f"task.verbalizers: the answer {text!r} for {language!r} holds {found[0]}, which is no text but a "
                    "token of control; write words"
                )
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
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{directory / 'config.json'}: model_type is {kind!r}: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known, shown = ", ".join(map(repr, FAMILIES)), shorten(repr(kind), 60)
        raise UserError(f"{directory / 'config.json'}: model_type is {shown}; what is supported is {known}")
    module, name = FAMILIES[kind].split(":")
    found: type[Family] = getattr(importlib.import_module(f"alsace_dist.models.{module}"), name)
    return found


def open_model(directory: Path, answers: Answers, options: Options = DEFAULTS) -> Family:
    """A model directory as a scorer of these answers. Raises ``UserError`` if they do not fit together."""
    return family_of(directory)(directory, answers, options)
