"""The geometries that are built in, against the published sizes of the models, and a plan that needs no network."""

from pathlib import Path
from typing import Any

import pytest

from alsace_dist.config_file import load_config
from alsace_dist.errors import UserError
from alsace_dist.plan.model import known_config, known_names, load_known, planned_model

ROOT = Path(__file__).parents[2]
# Parameters as the models' cards and papers give them: mT5 (Xue et al. 2021; counted exactly, with the output head),
# XLM-R (Conneau et al. 2020; Goyal et al. 2021: 3.5 and 10.7 billion), in millions.
PUBLISHED = {
    "google/mt5-small": 300.176768,
    "google/mt5-base": 582.401280,
    "google/mt5-large": 1229.581312,
    "google/mt5-xl": 3742.619648,
    "google/mt5-xxl": 12921.057280,
    "FacebookAI/xlm-roberta-base": 278,
    "FacebookAI/xlm-roberta-large": 560,
    "facebook/xlm-roberta-xl": 3500,
    "facebook/xlm-roberta-xxl": 10700,
    "bigscience/mt0-xxl": 12921.057280,
    "xlm-roberta-base": 278,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_geometry_has_the_published_number_of_parameters(name: str) -> None:
    value = known_config(name)
    assert value is not None
    family, config = load_known(value)
    total = family.count_parameters(config, 3).total / 1e6
    assert total == pytest.approx(PUBLISHED[name], rel=0.007 if "roberta" in name else 1e-9)


def test_every_name_leads_to_a_geometry_and_others_to_none() -> None:
    names = known_names()
    assert {"google/mt5-large", "bigscience/mt0-xl", "xlm-roberta-large"} <= set(names)
    assert len(names) == len(set(names)) and all(known_config(name) for name in names)
    assert known_config("google/mt5-huge") is None and known_config("mt5-large") is None


def test_a_known_model_is_planned_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    config = load_config(ROOT / "configs/xnli-mt5-large.yaml", {"run_dir": str(tmp_path)})
    model = planned_model(config)
    assert model.config.d_model == 1024 and model.num_head_rows == 3
    assert "google/mt5-large: its geometry is built in" in model.notes[0]
    other = config.model.model_copy(update={"path": "google/mt5-huge"})
    with pytest.raises(UserError, match="the hub was asked"):  # which the first plan did not do
        planned_model(config.model_copy(update={"model": other}))
