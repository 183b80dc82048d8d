"""Which family a directory is of, and candidates that cannot be told apart, or that the model does not know."""

import json
from pathlib import Path
from typing import Any

import pytest

from alsace_dist.config import TaskConfig
from alsace_dist.data.rows import Part, Row, answers_of
from alsace_dist.errors import UserError
from alsace_dist.models.family import family_of, open_model
from alsace_dist.models.mt5 import MT5


def test_anything_but_mt5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        family_of(tmp_path)
    for value in ({"model_type": "t5"}, {"model_type": "xlm-roberta"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"config\.json: model_type is .*; only 'mt5' is supported"):
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
        (["yes", "yes "], r"two answers for 'en' have the same tokens: \['yes', 'yes '\]; change one"),
        ({"de": ["ja", "nein"]}, r"has nothing for language 'en' and no default; add one"),
    ],
)
def test_answers_that_cannot_be_told_apart(directory: Path, verbalizers: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.verbalizers: {message}"):
        open_model(directory, answers_of(task(verbalizers), ["en"]))
