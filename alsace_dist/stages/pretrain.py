"""Pretraining of a nano mT5: its own Unigram tokenizer, then span corruption with the one training loop.

Examples are single texts and pairs of translations one after the other (as in TLM and mT6), which is what makes a
small model carry what it learns in one language over to others.
"""

import io
import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from alsace_dist.config import NOT_IN_FINGERPRINT, Config, PretrainConfig
from alsace_dist.errors import UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.files.layout import Layout, data_url
from alsace_dist.files.shards import Group, open_dataset, read_shard
from alsace_dist.ranks.group import Runtime

NUM_SENTINELS = 100
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(NUM_SENTINELS))
MAX_TOKENIZER_TEXTS = 200_000
MAX_WORD_LENGTH = 16  # in characters, as SentencePiece's own limit
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Row:
    """One (group, language) to learn from: token ids per field, and those of its translations."""

    key: str
    language: str
    fields: list[list[int]]
    translations: list[list[list[int]]]


@dataclass(frozen=True)
class SpanExample:
    """A corrupted text: spans replaced by sentinels in the input, and spelled out after them in the target."""

    input_ids: list[int]
    target_ids: list[int]


def fingerprint(config: Config) -> dict[str, Any]:
    """Everything the pretrained model depends on."""
    assert config.model.nano is not None
    return {
        "section": config.pretrain.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT),
        "nano": config.model.nano.model_dump(mode="json"),
        "answers": config.task.answers(),
        "dtype": config.engine.dtype,
        "seed": config.seed,
        "data": open_dataset(data_url(config, "pretrain")).digest,
        "code": artifacts.__version__,
    }


def pretrain(config: Config, directory: Path, fingerprint: dict[str, Any], runtime: Runtime) -> None:
    """Train tokenizer and model from nothing. The result is an ordinary mT5 directory in ``directory/model``."""
    from alsace_dist.models import mt5 as modeling
    from alsace_dist.training import engine, loop

    dataset = open_dataset(data_url(config, "pretrain"))
    source = directory / "start"

    def prepare_source() -> None:
        artifacts.begin(directory, "pretrain", fingerprint)
        if not (source / "config.json").exists():
            texts = (text for shard in dataset.shards for text in _texts(read_shard(dataset, shard)))
            _write_source(source, config, texts)

    runtime.main_first(prepare_source)
    tokenizer = modeling.load_tokenizer(source)
    model_config = modeling.load_model_config(source)
    initial = modeling.LanguageModel(modeling.make_body(model_config, config.pretrain.dropout))
    modeling.initialise(initial, config.seed)
    values = {name: parameter.detach().clone() for name, parameter in initial.named_parameters()}
    # The nano model is small: sharding would only cost time, and Adafactor's factored state cannot be sharded.
    nano_engine = config.engine.model_copy(update={"zero_stage": 0, "offload_optimizer": False, "deepspeed": {}})
    module = engine.load_module(
        lambda: modeling.LanguageModel(modeling.make_body(model_config, config.pretrain.dropout)),
        values.__getitem__,
        nano_engine,
        runtime,
    )
    sentinels = [tokenizer.convert_tokens_to_ids(sentinel) for sentinel in SENTINELS]

    def load(shard: int) -> list[Row]:
        return make_rows(read_shard(dataset, dataset.shards[shard]), tokenizer)

    def build(row: Row, pass_index: int) -> SpanExample:
        rng = np.random.default_rng([config.seed, pass_index, zlib.crc32(f"{row.language}/{row.key}".encode())])
        return corrupt(_choose_text(row, config.pretrain, rng), config.pretrain, sentinels, tokenizer.eos_token_id, rng)

    def collate_examples(examples: list[SpanExample]) -> loop.MicroBatch:
        inputs = collate_spans(examples, tokenizer.pad_token_id, model_config.decoder_start_token_id)
        return loop.MicroBatch(lambda module: module(*inputs.to(runtime.device)).sum(), *inputs.num_tokens)

    loop.run(
        loop.Job(
            kind="pretrain",
            directory=directory,
            tensorboard=Layout(Path(config.run_dir)).tensorboard(directory),
            section=config.pretrain,
            engine=nano_engine,
            seed=config.seed,
            fingerprint=fingerprint,
            module=module,
            value=values.__getitem__,
            counts=[sum(shard.num_examples.values()) for shard in dataset.shards],
            load=load,
            build=build,
            length=lambda example: len(example.input_ids),
            collate=collate_examples,
            source=source,
            head_rows=None,
        ),
        runtime,
    )


def _texts(groups: Iterable[Group]) -> Iterator[str]:
    for group in groups:
        for fields in group.texts.values():
            yield from fields.values()


def _write_source(directory: Path, config: Config, texts: Iterable[str]) -> None:
    """The nano model's tokenizer and config.json; the latter last, for it marks the directory as whole."""
    from transformers import MT5Config

    assert config.model.nano is not None
    tokenizer = train_tokenizer(texts, config.model.nano.vocab_size, config.task.answers().values())
    tokenizer.save_pretrained(directory)
    geometry = config.model.nano.model_dump(exclude={"vocab_size"})
    model_config = MT5Config(vocab_size=len(tokenizer), **geometry, architectures=["MT5ForConditionalGeneration"])
    artifacts.write_text(directory / "config.json", model_config.to_json_string())


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
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(normalised),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few texts may hold fewer pieces
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
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
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


def make_rows(groups: Iterable[Group], tokenizer: Any) -> list[Row]:
    """One row per (group, language), in the groups' order, languages sorted.

    Raises ``UserError`` if the languages of a group have different fields, which could not be paired.
    """
    groups = list(groups)
    for group in groups:
        if len({tuple(sorted(fields)) for fields in group.texts.values()}) > 1:
            raise UserError(f"group {group.key!r} has other fields in other languages; prepare the data with one task")
    members = [
        (group.key, language, group.texts[language][field])
        for group in groups
        for language in sorted(group.texts)
        for field in sorted(group.texts[language])
    ]
    if not members:
        return []
    encoded = tokenizer([text for _, _, text in members], add_special_tokens=False)["input_ids"]
    by_group: dict[str, dict[str, list[list[int]]]] = {}
    for (key, language, _), ids in zip(members, encoded, strict=True):
        by_group.setdefault(key, {}).setdefault(language, []).append(ids)
    return [
        Row(key, language, fields, [other for name, other in texts.items() if name != language])
        for key, texts in by_group.items()
        for language, fields in texts.items()
    ]


def _choose_text(row: Row, section: PretrainConfig, rng: np.random.Generator) -> list[int]:
    """The whole text, or one of its fields with a translation of it before or after."""
    if not row.translations or rng.random() >= section.concatenate:
        return [token for field in row.fields for token in field]
    field = int(rng.integers(len(row.fields)))
    other = row.translations[int(rng.integers(len(row.translations)))][field]
    # Both must fit in, or a long text would leave nothing of its translation.
    half = section.max_tokens // 2
    pair = [row.fields[field][:half], other[:half]]
    if rng.random() < 0.5:
        pair.reverse()
    return pair[0] + pair[1]


def corrupt(
    tokens: list[int], section: PretrainConfig, sentinels: list[int], end: int, rng: np.random.Generator
) -> SpanExample:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4): random spans become sentinels.

    ``mask_ratio`` of the tokens are masked, in spans whose mean length is ``mean_span_length``.
    """
    tokens = tokens[: section.max_tokens - 1]
    num_masked = min(max(1, round(len(tokens) * section.mask_ratio)), max(1, len(tokens) - 1))
    num_spans = min(max(1, round(num_masked / section.mean_span_length)), len(sentinels), num_masked)
    num_spans = min(num_spans, len(tokens) - num_masked + 1)
    lengths = _random_parts(num_masked, num_spans, 1, rng)
    # Spans do not touch: between two of them stands at least one token; before and after, any number.
    gaps = _random_parts(len(tokens) - num_masked - (num_spans - 1), num_spans + 1, 0, rng)
    gaps[1:-1] += 1
    inputs: list[int] = []
    target: list[int] = []
    position = 0
    for index, length in enumerate(lengths):
        inputs += [*tokens[position : position + gaps[index]], sentinels[index]]
        position += int(gaps[index])
        target += [sentinels[index], *tokens[position : position + length]]
        position += int(length)
    return SpanExample([*inputs, *tokens[position:], end], [*target, end])


def _random_parts(total: int, num_parts: int, least: int, rng: np.random.Generator) -> np.ndarray:
    """``num_parts`` random whole numbers of at least ``least`` that add up to ``total``, all splits equally likely."""
    free = total - least * num_parts
    cuts = np.sort(rng.choice(free + num_parts - 1, num_parts - 1, replace=False)) if num_parts > 1 else np.array([])
    edges = np.concatenate([[-1], cuts, [free + num_parts - 1]])
    return (np.diff(edges) - 1 + least).astype(int)


def collate_spans(examples: list[SpanExample], pad_id: int, decoder_start: int) -> Any:
    """Padded tensors for ``LanguageModel``; the decoder's input is the target shifted by one."""
    from alsace_dist.models.collate import IGNORED, Inputs, pad

    ids = pad([example.input_ids for example in examples], pad_id)
    mask = pad([[1] * len(example.input_ids) for example in examples], 0)
    decoder = pad([[decoder_start, *example.target_ids[:-1]] for example in examples], pad_id)
    return Inputs(ids, mask, decoder, pad([example.target_ids for example in examples], IGNORED))
