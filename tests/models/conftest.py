"""Fixtures of the small mT5."""

from pathlib import Path

import pytest
import torch
from models.small_mt5 import write_model
from safetensors.torch import load_file
from transformers import MT5ForConditionalGeneration

from alsace_dist.models.mt5 import HEAD


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as files, which no test changes."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(directory: Path) -> MT5ForConditionalGeneration:
    """Plain transformers, with the head that the file holds."""
    model = MT5ForConditionalGeneration.from_pretrained(directory).eval()
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored[HEAD])
    assert not torch.equal(stored[HEAD], stored["shared.weight"])
    return model
