"""Which family a directory is of, and candidates that cannot be told apart, or that the model does not know."""

import json
from pathlib import Path
from typing import Any

import pytest

from alsace_dist.config import TaskConfig
from alsace_dist.data.rows import Part, Row, answers_of, rows_of
from alsace_dist.errors import UserError
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.models.family import Options, family_of, open_model
from alsace_dist.models.mt5 import MT5


def test_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        family_of(tmp_path)
    for value in ({"model_type": "llama"}, {"model_type": "bert"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(
            UserError, match=r"config\.json: model_type is .*; what is supported is 'mt5', 'xlm-roberta'"
        ):
            family_of(tmp_path)
    for kind, why in (("umt5", "position bias in every layer"), ("t5", "shares its head with its embedding")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=rf"model_type is '{kind}': .*{why}.*; use mT5"):
            family_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mt5", "d_model": 24, "num_layers": 3}')
    assert family_of(tmp_path) is MT5
    config = family_of(tmp_path).load_config(tmp_path)
    assert (config.d_model, config.num_layers, config.num_decoder_layers) == (24, 3, 3)


@pytest.mark.parametrize("text", ["[]", '{"model_type": "mt5", "d_model": "x"}'])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        family_of(tmp_path).load_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options("cloze"), r"^model\.mode: cloze is nothing that mT5 has; remove it"),
        (Options("head"), r"^model\.mode: head is nothing that mT5 has; remove it"),
        (Options(pooling="mean"), r"^model\.pooling: mT5 has no classification head; remove it"),
    ],
)
def test_options_that_a_family_does_not_have(directory: Path, options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_model(directory, answers_of(task(["yes", "no"]), ["en"]), options)


# --- rows ----------------------------------------------------------------------------------------------------------


def task(verbalizers: Any, **more: Any) -> TaskConfig:
    return TaskConfig(fields=["text"], template="{text}", labels=["a", "b"], verbalizers=verbalizers, **more)


def test_rows_are_cut_at_the_longest_prompt_and_their_unknown_tokens_counted(directory: Path) -> None:
    model = open_model(directory, answers_of(task(["yes", "no"], max_tokens=4), ["en"]))
    texts = {"whole": "ja nein at", "long": "ja nein at all", "unknown": "oui non"}
    rows = model.encode([Row(key, "en", 1, (Part(text, True),), ("yes", "no")) for key, text in texts.items()])
    assert [row.key for row in rows] == ["whole", "long", "unknown"]
    assert [row.input_ids for row in rows] == [[8, 9, 6, 1], [8, 9, 6, 1], [2, 2, 1]]
    assert [(row.num_unknown, row.is_cut) for row in rows] == [(0, False), (0, True), (2, False)]
    assert {(row.language, row.label) for row in rows} == {("en", 1)}
    assert model.encode([]) == []


TEMPLATES = {"blank": "{text} {answer} at", "none": "{text}{answer} at", "first": "{answer} at {text}"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_each_family_writes_the_place_of_the_answer_in_its_own_way(world: Path, tmp_path: Path, template: str) -> None:
    """mT5's sentinel is a piece with a blank in front, and begins the answer, too; XLM-R has a mask, or in
    head mode nothing."""
    own = TaskConfig(fields=["text"], template=template, labels=["a", "b"], max_tokens=48)
    (group,) = [ParallelGroup("g", None, {"en": {"text": "red {answer} <mask> <extra_id_0>"}})]
    (row,) = rows_of(own, [group], ["en"])
    gaps = {"model": "<extra_id_0>", "xlmr": "<mask>"}
    for name, gap in gaps.items():
        model = open_model(world / name, answers_of(own, ["en"]))
        (encoded,) = model.encode([row])
        (known,) = {model.tokenizer.convert_tokens_to_ids(one) for one in (gap, f"\u2581{gap}")} - {
            model.tokenizer.unk_token_id
        }
        assert encoded.input_ids.count(known) == 1  # what a text says is text
        assert model.answers.decoder_prefix == ("<extra_id_0>" if name == "model" else "")
    head = open_model(world / "xlmr", answers_of(own, ["en"]), Options("head"))
    assert head.tokenizer.mask_token_id not in head.encode([row])[0].input_ids
    with pytest.raises(ValueError, match=r"template for default holds \{answer\} twice"):
        TaskConfig(fields=["text"], template="{text} {answer} {answer}", labels=["a", "b"])


def test_words_are_checked_as_templates_are(world: Path) -> None:
    more = {"fields": ["text", "kind"], "template": "{text} {kind} {answer}", "labels": ["a", "b"], "max_tokens": 48}
    for words, said in (({"x": "red <mask>"}, "holds <mask> 2 times"), ({"x": "red </s>"}, "a token of control")):
        own = TaskConfig.model_validate(more | {"words": {"kind": {"y": "new"} | words}})
        with pytest.raises(UserError, match=said):
            open_model(world / "xlmr", answers_of(own, ["en"]))


def test_rows_with_the_same_candidates_share_them(directory: Path) -> None:
    model = open_model(directory, answers_of(task(["yes", "no"]), ["en"]))
    first, second = model.encode([Row(key, "en", None, (Part("ja", True),), ("yes", "no")) for key in "ab"])
    assert first.candidates.tokens == ((3,), (4,))
    assert first.candidates is second.candidates


@pytest.mark.parametrize(
    ("verbalizers", "message"),
    [
        (["yes", "\u200b"], r"the answer '.u200b' for 'en' has no tokens; give it text"),
        (["yes", "oui"], r"the answer 'oui' for 'en' holds tokens that the model does not know; choose words"),
        (["yes", "not oui"], r"the answer 'not oui' for 'en' holds tokens that the model does not know"),
        (["yes", "</s>"], r"the answer '</s>' for 'en' holds </s>, which is no text but a token of control"),
        (["yes", "no<pad>"], r"the answer 'no<pad>' for 'en' holds <pad>, which is no text"),
        (["yes", "<extra_id_7>"], r"the answer '<extra_id_7>' for 'en' holds <extra_id_7>, which is no text"),
        (["yes", "yes "], r"two answers for 'en' have the same tokens: \['yes', 'yes '\]; change one"),
        ({"de": ["ja", "nein"]}, r"has nothing for language 'en' and no default; add one"),
    ],
)
def test_answers_that_cannot_be_told_apart(directory: Path, verbalizers: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.verbalizers: {message}"):
        open_model(directory, answers_of(task(verbalizers), ["en"]))
