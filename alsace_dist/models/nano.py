"""A nano mT5 made from nothing: its own Unigram tokenizer, its initial weights, and span corruption as its loss."""

import io
import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alsace_dist.config import NanoConfig
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import write_text
from alsace_dist.models.batches import IGNORED, Inputs, attention_over, pad, pad_prompts
from alsace_dist.models.family import WHOLE, TrainableModel
from alsace_dist.models.mt5 import HEAD, CandidateHead, load_config, make_body
from alsace_dist.models.weights import load_tokenizer
from alsace_dist.reading import shorten

NUM_SENTINELS = 100
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(NUM_SENTINELS))
MAX_TOKENIZER_TEXTS = 200_000
MAX_TEXT_BYTES = 1 << 24  # of one text that the tokenizer learns from; SentencePiece's own default is 4,192
MAX_WORD_LENGTH = 16  # in characters, as SentencePiece's own limit
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


class LanguageModel(nn.Module):
    """Body with a whole, untied head, for pretraining a nano model."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body: Any = body
        self.head = CandidateHead(body.config.vocab_size, body.config.d_model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, answer_ids: Tensor
    ) -> Tensor:
        """Mean cross-entropy of each row's target tokens (answer_ids [batch, target], -100 = not counted): [batch]."""
        hidden = self.body(
            input_ids=input_ids,
            attention_mask=attention_over(attention_mask),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).last_hidden_state
        # A float32 product over the whole vocabulary would take too long; the loss is computed in float32 all the same.
        logits = nn.functional.linear(hidden.flatten(0, 1), self.head.weight).float()
        losses = nn.functional.cross_entropy(logits, answer_ids.flatten(), ignore_index=-100, reduction="none").view(
            answer_ids.shape
        )
        return losses.sum(dim=1) / (answer_ids != -100).sum(dim=1).clamp(min=1)


def initialise(module: LanguageModel, seed: int) -> None:
    """Initial values of a new model, the same for every rank and world size.

    T5's scheme as in transformers, except for the head: its stock initialisation (standard deviation 1) makes the
    first loss near 150; d_model ** -0.5 makes it ln(vocabulary).
    """
    torch.manual_seed(seed)
    # init_weights() would not do: it skips what the constructor has initialised, from whatever state torch was in.
    module.body.apply(module.body._init_weights)
    nn.init.normal_(module.head.weight, std=module.body.config.d_model**-0.5)


def model_config(nano: NanoConfig, vocab_size: int | None = None) -> Any:
    """The ``MT5Config`` of a geometry; ``vocab_size``: None: as the geometry says."""
    from transformers import MT5Config

    geometry = nano.model_dump(exclude={"vocab_size"})
    size = nano.vocab_size if vocab_size is None else vocab_size
    return MT5Config(vocab_size=size, **geometry, architectures=["MT5ForConditionalGeneration"])


def write_start(directory: Path, nano: NanoConfig, texts: Iterable[str], answers: Iterable[list[str]]) -> None:
    """The nano model's tokenizer and config.json; the latter last, for it marks the directory as whole."""
    tokenizer = train_tokenizer(texts, nano.vocab_size, answers)
    tokenizer.save_pretrained(directory)
    write_text(directory / "config.json", model_config(nano, len(tokenizer)).to_json_string())


class NanoModel(TrainableModel):
    """What ``write_start`` has written, with new weights, as a ``TrainableModel``; its module is a language model."""

    config_changes: Mapping[str, Any] = {"tie_word_embeddings": False}
    vocabulary = frozenset({"body.shared.weight"})
    delicate: tuple[str, ...] = ()

    def __init__(self, directory: Path, dropout: float, seed: int) -> None:
        self.directory = directory
        self.tokenizer = load_tokenizer(directory)
        self.config = load_config(directory)
        self.sentinels: list[int] = [self.tokenizer.convert_tokens_to_ids(sentinel) for sentinel in SENTINELS]
        initial = self.build(dropout, False)
        initialise(initial, seed)
        self._values = {name: parameter.detach().clone() for name, parameter in initial.named_parameters()}

    def build(self, dropout: float, gradient_checkpointing: bool) -> LanguageModel:
        """As in ``TrainableModel``; a model this small never needs gradient checkpointing."""
        return LanguageModel(make_body(load_config(self.directory), dropout))

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """As in ``TrainableModel``: of new weights."""
        return self._values[name][part]

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """As in ``TrainableModel``."""
        return {HEAD if name == "head.weight" else name.removeprefix("body."): value}

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Nothing: all of it is trained."""
        return iter(())

    def collate(self, examples: "Sequence[SpanTokens]") -> Inputs:
        """Padded tensors for ``LanguageModel``."""
        return collate_spans(examples, self.tokenizer.pad_token_id, self.config.decoder_start_token_id)


class SpanTokens(Protocol):
    """A corrupted text: spans replaced by sentinels in the input, and spelled out after them in the target."""

    @property
    def input_ids(self) -> list[int]:
        """Of the encoder."""

    @property
    def target_ids(self) -> list[int]:
        """Of the decoder."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, answers: Iterable[list[str]]) -> Any:
    """A Unigram tokenizer as mT5's, with its sentinels; every answer of the task is one token.

    SentencePiece learns the pieces (with one thread: then the same texts give the same pieces). It never considers a
    word that is not also the beginning of another one, which in a small corpus are most words; the most frequent of
    these are added, with their own log-probability, until the vocabulary is full.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalised = [unicodedata.normalize("NFKC", text) for text in islice(texts, MAX_TOKENIZER_TEXTS)]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=_train_pieces(normalised, vocab_size))
    vocabulary = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())]
    vocabulary += _missing_words(normalised, {piece for piece, _ in vocabulary}, vocab_size - len(vocabulary))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, END, UNKNOWN, *SENTINELS)]
    tokenizer.add_special_tokens(special)
    words = sorted({answer for row in answers for answer in row})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def _train_pieces(texts: list[str], vocab_size: int) -> bytes:
    """SentencePiece's Unigram model of some texts. Raises ``UserError`` if they do not make one of this size."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus may hold fewer pieces
            max_sentence_length=MAX_TEXT_BYTES,  # SentencePiece passes over longer texts without a word
            character_coverage=0.9999,
            normalization_rule_name="identity",
            num_threads=1,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece=PAD,
            eos_piece=END,
            unk_piece=UNKNOWN,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"model.nano.vocab_size: SentencePiece makes no vocabulary of {vocab_size:,} pieces from the pretrain "
            f"split ({shorten(str(error).rpartition('] ')[2] or error)}); raise it, or add texts"
        ) from None
    return model.getvalue()


def _missing_words(texts: list[str], known: set[str], most: int) -> list[tuple[str, float]]:
    """The most frequent words (without punctuation at their ends) that are no pieces yet, with log-probabilities."""
    counts: Counter[str] = Counter()
    for text in texts:
        for word in text.split():
            first, last = 0, len(word)
            while first < last and unicodedata.category(word[first])[0] == "P":
                first += 1
            while last > first and unicodedata.category(word[last - 1])[0] == "P":
                last -= 1
            counts["▁" + word[first:last]] += 1
    total = sum(counts.values())
    ranked = sorted((-count, word) for word, count in counts.items() if count > 1 and 1 < len(word) <= MAX_WORD_LENGTH)
    missing = [(word, math.log(-count / total)) for count, word in ranked if word not in known]
    return missing[: max(0, most)]


def collate_spans(examples: Sequence[SpanTokens], pad_id: int, decoder_start: int) -> Inputs:
    """Padded tensors for ``LanguageModel``; the decoder's input is the target shifted by one."""
    ids, mask = pad_prompts([example.input_ids for example in examples], pad_id)
    decoder = pad([[decoder_start, *example.target_ids[:-1]] for example in examples], pad_id)
    return Inputs(ids, mask, (decoder, pad([example.target_ids for example in examples], IGNORED)))
