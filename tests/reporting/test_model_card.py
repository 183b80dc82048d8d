"""The model card says how the model is asked, so that somebody else can ask it."""

import pytest
import yaml
from reporting.test_report import make_evaluation

from alsace_dist.config import Config
from alsace_dist.reporting.model_card import model_card

TASK = {"fields": ["text"], "template": "{text}", "labels": ["x", "y"]}


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
