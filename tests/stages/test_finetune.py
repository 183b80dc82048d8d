"""Which labels finetuning learns from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny

from alsace_dist.config import Config
from alsace_dist.config_file import load_config
from alsace_dist.data.rows import Candidates, EncodedRow
from alsace_dist.errors import UserError
from alsace_dist.files.shards import Dataset, ParallelGroup, read_shards, write_dataset
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.stages.finetune import example_counts, learnt, shots_of


def labels(directory: Path) -> Dataset:
    """60 groups, of label a half, of b a third; five of them lack English."""
    groups = [
        ParallelGroup(f"g{number}", [0, 0, 0, 1, 1, 2][number % 6], {"de" if number % 12 == 5 else "en": {"text": "x"}})
        for number in range(60)
    ]
    return write_dataset(directory / "labeled", groups, tuple(tiny.LABELS), 16, {})


def config_of(directory: Path, **finetune: Any) -> Config:
    path = tiny.write_config(directory / "c.yaml", tiny.make_config(directory))
    return load_config(path, {f"finetune.{name}": value for name, value in finetune.items()})


def test_shots_are_balanced_seeded_and_of_the_source_language(tmp_path: Path) -> None:
    dataset = labels(tmp_path)
    chosen = shots_of(dataset, config_of(tmp_path), 4)
    keys = [key for part in chosen for key in part]
    assert len(set(keys)) == 12
    assert Counter([0, 0, 0, 1, 1, 2][int(key[1:]) % 6] for key in keys) == {0: 4, 1: 4, 2: 4}
    assert not [key for key in keys if int(key[1:]) % 12 == 5]
    assert chosen == shots_of(dataset, config_of(tmp_path), 4)
    assert chosen != shots_of(dataset, load_config(tmp_path / "c.yaml", {"seed": 1}), 4)
    more = {key for part in shots_of(dataset, config_of(tmp_path), 5) for key in part}
    assert set(keys) < more  # so that runs with more labels keep those of runs with fewer
    assert sum(example_counts(dataset, config_of(tmp_path, shots=4))) == 12  # what the plan counts on


def test_a_number_of_examples_takes_the_first(tmp_path: Path) -> None:
    dataset, config = labels(tmp_path), config_of(tmp_path, num_examples=20)
    counts = example_counts(dataset, config)
    assert sum(counts) == 20 and counts[-1] == 0
    groups = [group for part in read_shards(dataset) for group in part if "en" in group.texts]
    rows = [EncodedRow(group.key, "en", group.label, [1], Candidates(()), 0, False) for group in groups]
    assert [row.key for row in learnt(rows, 5, None)] == ["g0", "g1", "g2", "g3", "g4"]
    assert [row.key for row in learnt(rows, 5, {"g8", "g1"})] == ["g1", "g8"]


@pytest.mark.parametrize(
    ("finetune", "said"),
    [
        ({"shots": 6}, r"finetune\.shots: 6 of label 'c' asked for, .* has 5 in 'en'"),
        ({"shots": 30}, r"finetune\.shots: 90 labeled groups asked for, .* has 55"),
        ({"num_examples": 56}, r"finetune\.num_examples: 56 labeled groups asked for, .* has 55"),
        ({"shots": 2, "num_examples": 2}, "two ways to say how many"),
    ],
)
def test_more_labels_than_there_are_is_an_error(tmp_path: Path, finetune: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config = config_of(tmp_path, **finetune)
        example_counts(labels(tmp_path), config)
        shots_of(labels(tmp_path), config, finetune["shots"])


def test_shots_train_on_two_ranks(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), finetune={"shots": 3, "num_steps": 3})
    value["data"] = {"directory": str(world / "run/data")}
    tiny.do("finetune", tiny.write_config(tmp_path / "c.yaml", value))
    assert len(read_scalars(tmp_path / "run/finetune/metrics.jsonl")) >= 3
