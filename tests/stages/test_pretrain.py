"""Span corruption loses nothing and masks what it should; the nano tokenizer is reproducible and knows the answers."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from alsace_dist.config import PretrainConfig
from alsace_dist.errors import UserError
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.models.nano import NUM_SENTINELS, SENTINELS, collate_spans, train_tokenizer
from alsace_dist.stages.pretrain import SpanExample, _choose_text, corrupt, make_rows

END = 1
SENTINEL_IDS = list(range(10_000, 10_000 + NUM_SENTINELS))
SECTION = PretrainConfig(mask_ratio=0.25, mean_span_length=2.0, max_tokens=128)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def restore(example: SpanExample) -> tuple[list[int], list[list[int]]]:
    """The text, with each sentinel of the input replaced by its span of the target, and the spans."""
    assert example.input_ids[-1] == END and example.target_ids[-1] == END
    spans: dict[int, list[int]] = {}
    for token in example.target_ids[:-1]:
        if token >= SENTINEL_IDS[0]:
            assert token not in spans
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    text: list[int] = []
    used = []
    for token in example.input_ids[:-1]:
        if token >= SENTINEL_IDS[0]:
            used.append(token)
            text += spans[token]
        else:
            text.append(token)
    assert used == list(spans) == SENTINEL_IDS[: len(used)]  # the first sentinels, in order, each once
    return text, list(spans.values())


# --- corruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 20, 127])
@pytest.mark.parametrize(("ratio", "mean"), [(0.25, 2.0), (0.15, 3.0), (0.5, 1.0), (0.9, 2.0), (1.0, 1.0), (0.0, 5.0)])
def test_the_text_comes_back_and_the_share_and_number_of_spans_are_as_asked(
    length: int, ratio: float, mean: float
) -> None:
    section = PretrainConfig(mask_ratio=ratio, mean_span_length=mean, max_tokens=128)
    tokens = list(range(100, 100 + length))
    for seed in range(20):
        example = corrupt(tokens, section, SENTINEL_IDS, END, rng(seed))
        text, spans = restore(example)
        assert text == tokens
        assert min(map(len, spans)) >= 1
        # At least one token is masked and, in a text of two or more, one is not; spans never touch.
        num_masked = min(max(1, round(ratio * length)), max(1, length - 1))
        assert sum(map(len, spans)) == num_masked
        assert len(spans) == min(max(1, round(num_masked / mean)), num_masked, length - num_masked + 1)
        ids = example.input_ids
        assert not any(a >= SENTINEL_IDS[0] and b >= SENTINEL_IDS[0] for a, b in pairwise(ids))
        assert len(ids) <= section.max_tokens


def test_every_place_can_be_masked_and_spans_vary() -> None:
    masked = np.zeros(20)
    lengths = set()
    for seed in range(400):
        _, spans = restore(corrupt(list(range(20)), SECTION, SENTINEL_IDS, END, rng(seed)))
        for span in spans:
            masked[span] += 1
            lengths.add(len(span))
    assert masked.sum() == 400 * 5
    assert masked.min() > 40  # expected 100 each
    assert lengths == {1, 2, 3, 4}


def test_long_texts_are_cut_so_that_they_fit_with_the_end_token() -> None:
    section = PretrainConfig(mask_ratio=0.5, mean_span_length=1.0, max_tokens=16)
    example = corrupt(list(range(100)), section, SENTINEL_IDS, END, rng())
    assert restore(example)[0] == list(range(15))
    assert len(example.input_ids) <= 16


def test_no_more_spans_than_sentinels() -> None:
    section = PretrainConfig(mask_ratio=0.5, mean_span_length=1.0, max_tokens=1000)
    text, spans = restore(corrupt(list(range(900)), section, SENTINEL_IDS, END, rng()))
    assert text == list(range(900))
    assert len(spans) == NUM_SENTINELS and sum(map(len, spans)) == 450


def test_the_generator_alone_decides() -> None:
    tokens = list(range(50))
    examples = [corrupt(tokens, SECTION, SENTINEL_IDS, END, rng(seed)) for seed in (1, 1, 2)]
    assert examples[0] == examples[1] != examples[2]
    assert tokens == list(range(50))


def test_a_text_without_tokens_is_no_error() -> None:
    example = corrupt([], SECTION, SENTINEL_IDS, END, rng())
    assert len(example.input_ids) <= 2 and len(example.target_ids) <= 2


def test_the_decoder_sees_the_target_shifted_by_one() -> None:
    examples = [SpanExample([5, 6, END], [9, 7, 8, END]), SpanExample([5, END], [9, END])]
    inputs = collate_spans(examples, 0, 3)
    assert inputs.input_ids.tolist() == [[5, 6, END], [5, END, 0]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    decoder_input_ids, answer_ids = inputs.further
    assert decoder_input_ids.tolist() == [[3, 9, 7, 8], [3, 9, 0, 0]]
    assert answer_ids.tolist() == [[9, 7, 8, END], [9, END, -100, -100]]
    assert inputs.num_tokens == (5, 6)


# --- tokenizer -----------------------------------------------------------------------------------------------------

TEXTS = [
    f"{who} {what} {where}."
    for who in ("The dog", "A cat", "Der Hund", "Eine Katze", "Собака", "एक कुत्ता", "一只狗")
    for what in ("sleeps", "is running", "schläft", "спит", "सो रहा है", "在睡觉")
    for where in ("at home", "in the garden", "zu Hause", "дома", "घर पर", "在家")
]
ANSWERS = [["yes", "maybe", "no"], ["ja", "vielleicht", "ganz und gar nicht"], ["да", "может быть", "нет"]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300, ANSWERS)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_the_same_texts_give_the_same_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 300, iter([list(row) for row in ANSWERS]))
    for name, one in (("a", tokenizer), ("b", again)):
        one.save_pretrained(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = train_tokenizer(TEXTS[:60], 300, ANSWERS)
    assert other.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


def test_every_answer_is_one_token_of_its_own(tokenizer: Any) -> None:
    found = [ids(tokenizer, answer) for row in ANSWERS for answer in row]
    assert {len(row) for row in found} == {1}
    assert len({tuple(row) for row in found}) == 9
    assert all(row[0] < len(tokenizer) for row in found)


def test_special_tokens_are_where_mt5_has_them(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    sentinels = [tokenizer.convert_tokens_to_ids(sentinel) for sentinel in SENTINELS]
    assert len(set(sentinels)) == NUM_SENTINELS and 2 not in sentinels
    assert tokenizer("The dog")["input_ids"][-1] == 1
    middle = ids(tokenizer, f"The dog {SENTINELS[0]} at home")
    assert middle.count(sentinels[0]) == 1


def test_texts_are_covered_and_come_back(tokenizer: Any) -> None:
    for text in TEXTS:
        row = ids(tokenizer, text)
        assert 2 not in row
        assert tokenizer.decode(row) == text
    assert 2 in ids(tokenizer, "ξένος")


def test_an_answer_within_a_word_does_not_break_it(tokenizer: Any) -> None:
    """Answers are whole words: 'no' in 'notes' is no answer."""
    (no,) = ids(tokenizer, "no")
    assert no not in ids(tokenizer, "notes") and no not in ids(tokenizer, "piano")
    assert no in ids(tokenizer, "oh no at home")


def test_it_loads_with_auto_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    for text in [*TEXTS, *(answer for row in ANSWERS for answer in row), f"The {SENTINELS[3]} home"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


def test_few_texts_make_a_smaller_vocabulary() -> None:
    small = train_tokenizer(["a b c", "d e f"], 4000, [["x", "y"]])
    assert len(small) < 200
    assert [len(ids(small, answer)) for answer in ("x", "y")] == [1, 1]


# --- rows ----------------------------------------------------------------------------------------------------------

GROUPS = [
    ParallelGroup(
        "g0", None, {"en": {"premise": "The dog", "hypothesis": "A cat"}, "de": {"premise": "a", "hypothesis": "b"}}
    ),
    ParallelGroup("g1", 1, {"de": {"hypothesis": "Der Hund", "premise": "Eine Katze"}}),
    ParallelGroup(
        "g2", None, {name: {"premise": f"{name} p", "hypothesis": f"{name} h"} for name in ("ru", "en", "de")}
    ),
]


def test_languages_with_different_fields_cannot_be_paired(tokenizer: Any) -> None:
    group = ParallelGroup("g7", None, {"en": {"a": "one", "b": "two"}, "de": {"a": "eins"}})
    with pytest.raises(UserError, match="group 'g7' has other fields in other languages; prepare the data with one"):
        make_rows([group], tokenizer)


def test_one_row_per_group_and_language_with_its_translations(tokenizer: Any) -> None:
    rows = make_rows(GROUPS, tokenizer)
    assert [(row.key, row.language) for row in rows] == [
        ("g0", "de"),
        ("g0", "en"),
        ("g1", "de"),
        ("g2", "de"),
        ("g2", "en"),
        ("g2", "ru"),
    ]
    assert rows[1].fields == [ids(tokenizer, "A cat"), ids(tokenizer, "The dog")]  # fields by name
    assert rows[1].translations == [[ids(tokenizer, "b"), ids(tokenizer, "a")]]
    assert rows[2].fields == [ids(tokenizer, "Der Hund"), ids(tokenizer, "Eine Katze")]
    assert rows[2].translations == []
    assert rows[4].translations == [rows[3].fields, rows[5].fields]
    assert make_rows([], tokenizer) == []
    assert len(rows) == sum(len(group.texts) for group in GROUPS)  # as many as the manifest counts


def test_a_pair_is_a_field_and_the_same_field_of_a_translation(tokenizer: Any) -> None:
    row = make_rows(GROUPS, tokenizer)[4]
    always, never = PretrainConfig(concatenate=1.0), PretrainConfig(concatenate=0.0)
    pairs = {tuple(_choose_text(row, always, rng(seed))) for seed in range(100)}
    expected = set()
    for other in row.translations:
        for field in (0, 1):
            expected |= {(*row.fields[field], *other[field]), (*other[field], *row.fields[field])}
    assert pairs == expected and len(expected) == 8
    own = {token for field in row.fields for token in field}
    assert all(set(_choose_text(row, never, rng(seed))) <= own for seed in range(20))
    lone = make_rows(GROUPS, tokenizer)[2]
    assert all(_choose_text(lone, always, rng(seed)) == _choose_text(lone, never, rng(seed)) for seed in range(5))


def test_both_halves_of_a_long_pair_fit_in(tokenizer: Any) -> None:
    group = ParallelGroup("g", None, {"de": {"text": "Der Hund " * 50}, "en": {"text": "The cat " * 50}})
    row = make_rows([group], tokenizer)[0]
    section = PretrainConfig(concatenate=1.0, max_tokens=20)
    for seed in range(4):
        text = _choose_text(row, section, rng(seed))
        halves = {tuple(text[:10]), tuple(text[10:])}
        assert halves == {tuple(row.fields[0][:10]), tuple(row.translations[0][0][:10])}


def test_concatenation_happens_as_often_as_asked(tokenizer: Any) -> None:
    row = make_rows(GROUPS, tokenizer)[0]
    section = PretrainConfig(concatenate=0.25)
    foreign = {token for other in row.translations for field in other for token in field}
    own = {token for field in row.fields for token in field}
    assert foreign - own
    pairs = sum(bool(set(_choose_text(row, section, rng(seed))) & (foreign - own)) for seed in range(1000))
    assert 200 < pairs < 300
