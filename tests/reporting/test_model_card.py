"""The model card says how the model is asked, so that somebody else can ask it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from reporting.test_report import make_evaluation

from alsace_dist.config import Config
from alsace_dist.reporting.model_card import model_card

TASK = {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]}


def card_of(sections: dict[str, Any], pooling: str | None = None, **about: Any) -> str:
    value = {"run_dir": "run", "task": TASK, "data": {"directory": "data"}, "model": {"path": "x"}} | sections
    evaluation = make_evaluation({"en": 0.7, "de": 0.4}, {"en": 0.7, "de": 0.5}).model_copy(update=about)
    return model_card(Config.model_validate(value), "", evaluation, {"data": "0" * 64}, pooling)


@pytest.mark.parametrize(
    ("sections", "made", "is_taught"),
    [
        ({}, "Finetuned on the labels of en, then distilled on unlabeled parallel groups: the languages that", True),
        ({"finetune": None}, "Taken as it was, without finetuning, then distilled", True),
        ({"rounds": 0, "evaluate": {"calibrate": True}}, "Finetuned on the labels of en; not distilled.", False),
        ({"distill": {"targets": "votes"}}, "on parallel groups in every language on the answer that most", False),
        ({"distill": {"targets": "labels"}}, "on parallel groups in every language on their true labels", False),
    ],
)
def test_a_card_says_how_the_model_was_made(sections: dict[str, Any], made: str, is_taught: bool) -> None:
    card = card_of(sections)
    assert made in card and ("Nobody taught." not in card) == is_taught
    assert "it is an analysis" not in card and "it is an analysis" in card_of(sections, uses_labels=True)


def test_only_a_name_on_the_hub_is_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/model").mkdir(parents=True)
    for path, is_there in (("google/mt5-large", True), ("own/model", False), ("run/round1/distill/model", False)):
        assert ("base_model: " in card_of({"model": {"path": path}})) == is_there


def test_a_pooling_that_the_checkpoint_brought_is_said() -> None:
    assert "answers differ there" in card_of({}, pooling="mean")


@pytest.mark.parametrize(
    ("model", "asked", "is_mean"),
    [
        ({"path": "models/own"}, {}, False),
        (
            {"path": "xlm-r", "mode": "cloze", "masks": "left_to_right"},
            {"mode": "cloze", "masks": "left_to_right"},
            False,
        ),
        ({"path": "xlm-r", "mode": "head", "pooling": "mean"}, {"mode": "head", "pooling": "mean"}, True),
    ],
)
def test_a_card_says_how_the_model_scores(model: dict[str, str], asked: dict[str, str], is_mean: bool) -> None:
    value = {"run_dir": "run", "task": TASK, "data": {"directory": "data"}, "model": model}
    evaluation = make_evaluation({"en": 0.7, "de": 0.4}, {"en": 0.7, "de": 0.5})
    card = model_card(Config.model_validate(value), "", evaluation, {"data": "0" * 64})
    section = card.split("## How it is asked")[1].split("## ")[0]
    found = yaml.safe_load(section.split("```yaml")[1].split("```")[0])
    assert found.pop("model", {}) == asked and found == TASK
    assert ("answers differ there" in section) == is_mean
