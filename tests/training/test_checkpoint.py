"""What a checkpoint must be before anything of it is loaded, however sound its manifest is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alsace_dist.errors import UserError
from alsace_dist.files.manifest import Manifest
from alsace_dist.training import checkpoint
from alsace_dist.training.engine import MOMENTS

SOUND = {name: torch.full((2, 3), 0.5) for name in ("weight", *MOMENTS)}


def test_sound_states_pass() -> None:
    assert checkpoint.problem_of(SOUND, (2, 3), MOMENTS) == ""
    assert checkpoint.problem_of({"weight": SOUND["weight"], "row_var": torch.ones(2, 1)}, (2, 3), None) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp_avg": None}, "has exp_avg_sq, weight, not weight, exp_avg, exp_avg_sq"),
        ({"weight": None}, "has exp_avg, exp_avg_sq, not"),
        ({"other": torch.ones(2, 3)}, "has exp_avg, exp_avg_sq, other, weight, not"),
        ({"weight": torch.ones(3, 2)}, r"has another shape than the model's \(weight: \(3, 2\), not \(2, 3\)\)"),
        ({"exp_avg": torch.ones(0)}, r"has another shape than the model's \(exp_avg: \(0,\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, r"no finite number \(weight, int64\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.complex64)}, r"no finite number \(weight, complex64\)"),
        ({"exp_avg": torch.ones(2, 3, dtype=torch.bool)}, r"no finite number \(exp_avg, bool\)"),
        ({"exp_avg_sq": torch.full((2, 3), float("inf"))}, r"no finite number \(exp_avg_sq"),
        ({"exp_avg_sq": torch.full((2, 3), -1.0)}, "has squares below 0"),
    ],
)
def test_states_that_no_training_has_left(changes: dict[str, Any], words: str) -> None:
    state = {name: value for name, value in (SOUND | changes).items() if value is not None}
    assert re.search(words, checkpoint.problem_of(state, (2, 3), MOMENTS))


def manifest_of(step: Any) -> Manifest:
    return Manifest(
        kind="checkpoint", fingerprint={}, files={}, details={"step": step}, code_version="", format_version=1
    )


@pytest.mark.parametrize("step", [True, 2.0, "2", None, [2], -1, 3, 10**9, float("nan")])
def test_a_step_that_is_not_that_of_the_directory(step: Any) -> None:
    with pytest.raises(UserError, match=r"step-00000002: manifest\.json says step .*, which is not that of its name"):
        checkpoint.step_of(Path("step-00000002"), manifest_of(step))
    assert checkpoint.step_of(Path("step-00000002"), manifest_of(2)) == 2


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    save_file(SOUND, tmp_path / "part.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "part.safetensors").read_bytes()[:50])
    with pytest.raises(UserError, match=r"cut\.safetensors: cannot be read as safetensors"):
        checkpoint._open(path)
