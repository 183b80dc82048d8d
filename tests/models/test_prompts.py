"""Prompts as token ids, with a tokenizer as mT5's real one: sentinels are pieces with a blank in front."""

import re
import unicodedata
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alsace_dist.data.rows import Part
from alsace_dist.errors import UserError
from alsace_dist.models import prompts

END = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Unigram; a piece per letter, words cost less, and ``▁<extra_id_0>`` is an ordinary piece, as in mT5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyzTW<>_/0123456789.:?字"]
    pieces += [("▁word", -4.0), ("▁Was", -4.0), ("▁<extra_id_0>", -1.0), ("▁<extra_id_1>", -1.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", ["{text} <extra_id_0>", "{text} <extra_id_0> {other} <extra_id_1>", "{text}"])
def test_a_sentinel_after_a_blank_is_one_token_and_accepted(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    prompts.check_gaps(tokenizer, [template], "<extra_id_0>", 64, "<extra_id_0>")


@pytest.mark.parametrize("template", ["{text}<extra_id_0>", "Topic:<extra_id_0> {text}", "{a}<extra_id_0>{b}"])
def test_a_sentinel_without_its_blank_is_refused(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    with pytest.raises(UserError, match=r"task\.template: <extra_id_0> .* needs a blank before it"):
        prompts.check_gaps(tokenizer, [template], "", 64, "<extra_id_0>")


def test_the_place_of_the_answer_is_written_once_and_only_where_the_braces_are_single() -> None:
    def gap_after(before: str) -> str:
        return "<mask>" if before.endswith(" ") else " <mask>"

    found = [prompts.with_gap(one, gap_after) for one in ("{text} {answer}.", "{answer}{text}", "{text} {{answer}}")]
    assert found == ["{text} <mask>.", " <mask>{text}", "{text} {{answer}}"]


def test_the_prefix_of_the_decoder_is_checked_as_well(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"task\.decoder_prefix: <extra_id_0>"):
        prompts.check_gaps(tokenizer, ["{text}"], "x<extra_id_0>", 64, "<extra_id_0>")


@pytest.mark.parametrize("gap", ["<extra_id_100>", "<mask>", "[MASK]"])
def test_a_gap_that_the_vocabulary_lacks_is_refused(tokenizer: PreTrainedTokenizerFast, gap: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(gap)} is no token of this model, in .*; write <extra_id_0>"):
        prompts.check_gaps(tokenizer, [f"{{text}} {gap}"], "", 64, "<extra_id_0>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{text} <EXTRA_ID_0>",
            "<EXTRA_ID_0> in '{text} <EXTRA_ID_0>' is plain text to this model; write <extra_id_0>",
        ),
        ("{text} <extra_id 0>", "<extra_id 0> in "),
        ("{text} <extra-id-0>", "<extra-id-0> in "),
        ("{text} ＜extra_id_0＞", "<extra_id_0> in "),
        ("{text} <MASK>", "<MASK> in "),
        ("{text} [ mask ]", "[ mask ] in "),
        ("{text} </s> <extra_id_0>", "holds </s>, a token of control; remove it"),
        ("{text} <extra_id_0> <pad>", "holds <pad>, a token of control; remove it"),
    ],
)
def test_what_looks_like_a_gap_or_is_another_token_of_control_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, words: str
) -> None:
    control = prompts.control_tokens(tokenizer)
    with pytest.raises(UserError, match=rf"task\.template: .*{re.escape(words)}"):
        prompts.check_controls(control, "<extra_id_0>", [template], "")
    with pytest.raises(UserError, match=rf"task\.decoder_prefix: .*{re.escape(words.split(' in ')[0])}"):
        prompts.check_controls(control, "<extra_id_0>", [], template)


def test_brackets_that_are_no_gap_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    templates = ["[CLS-1] {text} <b>bold</b> a < b > c [1] <extra_id_0>", "<masked> [masks] <extra_id_0>"]
    prompts.check_controls(prompts.control_tokens(tokenizer), "<extra_id_0>", templates, "<extra_id_0>")


def test_a_budget_without_room_for_texts_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"task\.max_tokens: 8 leaves no room"):
        prompts.check_gaps(tokenizer, ["{text} question <extra_id_0>"], "", 8, "<extra_id_0>")


@pytest.mark.parametrize("most", [4, 6, 9])
def test_texts_are_cut_and_the_template_behind_them_stays_whole(tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    parts = [Part("word " * 30, True), Part(" <extra_id_0>", False)]
    whole = tokenizer("".join(part.content for part in parts)).encodings[0]
    assert len(whole.ids) > 30
    ids = prompts.cut(tokenizer, parts, whole, most).ids
    assert len(ids) <= most
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids("▁<extra_id_0>"), END]
    assert tokenizer.convert_tokens_to_ids("▁word") in ids


class Counting:
    """A tokenizer that will not be asked for ever."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.num_left = tokenizer, 200

    def __call__(self, text: str) -> Any:
        self.num_left -= 1
        assert self.num_left > 0, "it does not end"
        return self.tokenizer(text)


@pytest.fixture(scope="module")
def splitting() -> PreTrainedTokenizerFast:
    """Characters of several tokens: some are normalised to more characters, others are spelt in bytes."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0), ("▁<extra_id_0>", -1.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz<>_0°Cm2/"]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", ["℃", " ℃", "a㎡ ", "🏳", "é字", "ﷺ", "½ ", "a🏳‍🌈 b"])
def test_characters_of_several_tokens_are_cut_whole(splitting: PreTrainedTokenizerFast, text: str) -> None:
    gap = splitting.convert_tokens_to_ids("▁<extra_id_0>")
    for times, other in ((1, 9), (30, 1), (30, 9)):
        parts = [Part(text * times, True), Part(" <extra_id_0> ", False), Part("b" * other, True)]
        whole = splitting("".join(part.content for part in parts)).encodings[0]
        for most in range(5, len(whole.ids)):
            found = prompts.cut(Counting(splitting), parts, whole, most)
            assert len(found.ids) <= most and gap in found.ids and found.ids[-1] == END


def test_the_longest_text_is_cut_first(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [Part("word word", True), Part(" <extra_id_0> ", False), Part("Was " * 20, True)]
    whole = tokenizer("".join(part.content for part in parts)).encodings[0]
    tokens = tokenizer.convert_ids_to_tokens(prompts.cut(tokenizer, parts, whole, 8).ids)
    assert tokens.count("▁word") == 2
    assert 1 <= tokens.count("▁Was") < 20


@pytest.mark.parametrize(
    "text", ["</s>", "a <pad> b", "x<extra_id_0>", "<extra_id_7> <extra_id_0></s>", "word ＜extra_id_0＞ 字"]
)
def test_control_tokens_in_texts_are_taken_apart(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    control = prompts.control_tokens(tokenizer)
    plain = prompts.as_plain_text(text, control)
    assert not control.search(plain)
    assert plain.replace(" ", "") == unicodedata.normalize("NFKC", text).replace(" ", "")
    ids = tokenizer(unicodedata.normalize("NFKC", plain), add_special_tokens=False)["input_ids"]
    forbidden = tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "▁<extra_id_0>"])
    assert not set(ids) & set(forbidden)


def test_a_text_without_control_tokens_stays_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("a < b", "[x] <b>bold</b>", "plain", "full ｗｉｄｔｈ ＜b＞"):
        assert prompts.as_plain_text(text, prompts.control_tokens(tokenizer)) == text
