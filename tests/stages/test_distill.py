"""What distillation holds a shard's scores against, before anything is learnt from them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from alsace_dist.errors import UserError
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.stages.distill import check_scores

THREE = np.log(np.array([0.2, 0.3, 0.5]))
TWO = np.log(np.array([0.4, 0.6]))
PLACES = [("a", "de", 3), ("a", "en", 3)]
BIASES = {"de": np.zeros(3)}


def test_sound_scores_pass() -> None:
    check_scores(PLACES, {"a": {"de": THREE, "en": THREE}, "b": {"fr": TWO}}, BIASES, Path("scores/0.parquet"))


@pytest.mark.parametrize(
    ("groups", "biases", "words"),
    [
        ({}, BIASES, "language 'de': has no scores"),
        ({"a": {"de": THREE}}, BIASES, "language 'en': has no scores"),  # not passed over as a row without a teacher
        ({"a": {"de": TWO, "en": TWO}}, {}, "language 'de': 2 scores and 3 candidates"),
        ({"a": {"de": THREE, "en": THREE}}, {"en": np.zeros(2)}, "language 'en': 3 scores and 2 biases"),
        ({"a": {"de": THREE, "en": THREE, "fr": TWO}}, {}, "languages have different numbers of candidates"),
        ({"a": {"de": THREE, "en": THREE, "fr": THREE * np.nan}}, {}, "scores that are no numbers"),
        ({"a": {"de": THREE, "en": THREE + np.inf}}, {}, "scores that are no numbers"),
    ],
)
def test_scores_that_do_not_fit_their_shard_are_refused(
    groups: dict[str, dict[str, np.ndarray]], biases: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(UserError, match=rf"^scores/0\.parquet: group 'a'.*{words}"):
        check_scores(PLACES, groups, biases, Path("scores/0.parquet"))


def run_votes(world: Path, directory: Path, languages: Any) -> Path:
    """Self-training on votes of the world's model, which nothing has trained; two epochs of 10 examples a step."""
    distill = {"targets": "votes", "languages": languages, "num_epochs": 2.0, "num_steps": None, "log_every_steps": 1}
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    sections = {"method": "paper", "finetune": None, "data": data, "distill": distill}
    config = tiny.make_config(world, run_dir=str(directory / "run"), **sections)
    path = tiny.write_config(directory / "c.yaml", config)
    tiny.do("score", path)
    tiny.alsace("select", str(path))
    return path


def test_self_training_in_the_source_language_alone(world: Path, tmp_path: Path) -> None:
    """45 groups have a text in English, twice 4.5 steps of 10: each counts in full, and learns one answer."""
    config = run_votes(world, tmp_path, "source")
    unknown = tiny.alsace("distill", str(config), '--distill.languages=["en","xx"]', check=False)
    assert unknown.returncode == 2
    assert "distill.languages: xx not among" in unknown.stderr.strip().splitlines()[-1]
    tiny.do("distill", config, round=1)
    rows = read_scalars(tmp_path / "run/round1/distill/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert 0.5 < rows[0]["loss"] < math.log(len(tiny.LABELS))  # a quarter of it, if rows had the weight of one in four


def test_by_presence_groups_that_lack_teachers_count_less(world: Path, tmp_path: Path) -> None:
    """Every third group lacks a language, so the loss of a step is less, of the same model on the same examples."""
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    sections = {"finetune": None, "data": data, "variants": {"presence": {"distill": {"group_weight": "presence"}}}}
    config = tiny.make_config(world, run_dir=str(tmp_path / "run"), **sections)
    config["distill"] |= {"num_steps": 1, "global_batch_size": 160}
    path = tiny.write_config(tmp_path / "c.yaml", config)
    tiny.do("score", path)
    for arguments in ([], ["--variant=presence"]):
        tiny.alsace("select", str(path), *arguments)
    tiny.do("distill", path, round=1)
    tiny.do("distill", path, round=1, variant="presence")
    equal, presence = (
        read_scalars(run / "round1/distill/metrics.jsonl")[0]["loss"]
        for run in (tmp_path / "run", tmp_path / "run/variants/presence")
    )
    assert 0.5 * equal < presence < 0.99 * equal
