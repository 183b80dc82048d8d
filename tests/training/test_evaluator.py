"""What is measured on held-out groups while a model is trained, and the weights that were best on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from alsace_dist.config_file import load_config
from alsace_dist.data.rows import Candidates, EncodedRow, answers_of, rows_of
from alsace_dist.errors import EXIT_USER_ERROR
from alsace_dist.files.shards import golds, open_dataset, read_shards
from alsace_dist.models.family import open_model
from alsace_dist.monitor.sinks import read_scalars
from alsace_dist.training.evaluator import Best, Evaluator

SPLITS = {"labeled": 40, "unlabeled": 30, "test": 20, "dev": 25}


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world with a split dev."""
    directory = tmp_path_factory.mktemp("dev")
    value = tiny.make_config(world, run_dir=str(directory / "run"))
    value["data"]["splits"] = SPLITS
    tiny.alsace("prepare", str(tiny.write_config(directory / "c.yaml", value)))
    return directory / "run/data"


def make_run(world: Path, data: Path, directory: Path, stage: int = 2, **finetune: Any) -> Path:
    directory.mkdir(exist_ok=True)
    sections = {"data": {"inputs": [], "splits": {}, "directory": str(data)}, "engine": {"zero_stage": stage}}
    value = tiny.make_config(world, run_dir=str(directory / "run"), finetune=finetune, **sections)
    return tiny.write_config(directory / "c.yaml", value)


def scored(config_path: Path, model_path: Path, num_groups: int) -> list[tuple[EncodedRow, np.ndarray]]:
    """Rows of dev with their scores by a model on its own."""
    config = load_config(config_path)
    dataset = open_dataset(f"{config.data.directory}/dev")
    groups = [group for shard in read_shards(dataset) for group in shard][:num_groups]
    model = open_model(model_path, answers_of(config.task, dataset.languages))
    rows = model.encode(rows_of(config.task, groups, dataset.languages))
    module = model.build(0.0, False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(model.initial_value(name))
        scores = module.eval()(*model.collate(rows).to(torch.device("cpu"))).numpy()
    return list(zip(rows, scores, strict=True))


def accuracies(config_path: Path, model_path: Path, num_groups: int) -> dict[str, float]:
    """By language, of a model on its own."""
    found: dict[str, list[bool]] = {}
    for row, scores in scored(config_path, model_path, num_groups):
        found.setdefault(row.language, []).append(int(scores.argmax()) in golds(row.label))
    return {language: float(np.mean(values)) for language, values in found.items()}


@pytest.mark.parametrize("stage", [0, 3])
def test_accuracy_is_measured_at_intervals_and_at_the_end(world: Path, data: Path, tmp_path: Path, stage: int) -> None:
    config = make_run(world, data, tmp_path, stage, evaluate_every_steps=5, evaluate_groups=18, log_every_steps=4)
    tiny.do("finetune", config)
    rows = read_scalars(tmp_path / "run/finetune/metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12]
    assert [row["step"] for row in rows if "accuracy" in row] == [5, 10, 12]
    expected = accuracies(config, tmp_path / "run/finetune/model", 18)
    last = rows[-1]
    assert {name.partition("/")[2]: last[name] for name in last if name.startswith("accuracy_of/")} == expected
    assert last["accuracy"] == pytest.approx(np.mean(list(expected.values())))
    assert last["accuracy_worst"] == min(expected.values())
    assert last["accuracy_sd"] == pytest.approx(np.std(list(expected.values())))
    others = [rate for language, rate in expected.items() if language != "en"]
    assert last["accuracy_gap"] == pytest.approx(expected["en"] - np.mean(others))


def test_watching_changes_no_weight(world: Path, data: Path, tmp_path: Path) -> None:
    traces = []
    for every in (1, 1000):  # the second looks at dev once, at the end
        tiny.do("finetune", make_run(world, data, tmp_path / str(every), evaluate_every_steps=every))
        traces.append(read_scalars(tmp_path / f"{every}/run/finetune/metrics.jsonl"))
    assert [row["loss"] for row in traces[0]] == [row["loss"] for row in traces[1]]


def test_training_stops_when_nothing_rises_and_the_best_weights_are_exported(
    world: Path, data: Path, tmp_path: Path
) -> None:
    """With a rate at which the model gets worse; and the same after a kill, from whatever checkpoint there is."""
    settings = {"num_steps": 40, "learning_rate": 3e-2, "evaluate_every_steps": 2, "patience": 3, "evaluate_groups": 25}
    config = make_run(world, data, tmp_path / "whole", **settings)
    found = tiny.alsace("finetune", str(config))
    rows = [row for row in read_scalars(tmp_path / "whole/run/finetune/metrics.jsonl") if "accuracy" in row]
    values = [row["accuracy"] for row in rows]
    best = rows[int(np.argmax(values))]
    assert len(values) - 1 - int(np.argmax(values)) == 3 and rows[-1]["step"] < 40
    assert f"of {rows[-1]['step']} steps, the weights after step {best['step']} are exported" in found.stderr
    exported = accuracies(config, tmp_path / "whole/run/finetune/model", 25)
    assert {f"accuracy_of/{language}": rate for language, rate in exported.items()} == {
        name: value for name, value in best.items() if name.startswith("accuracy_of/")
    }
    assert not (tmp_path / "whole/run/finetune/checkpoints").exists()
    assert not (tmp_path / "whole/run/finetune/progress.json").exists()
    config = make_run(
        world, data, tmp_path / "killed", **settings | {"checkpoint_every_steps": 1, "keep_checkpoints": 50}
    )
    with tiny.started("finetune", str(config)) as process:
        checkpoints = tmp_path / "killed/run/finetune/checkpoints"
        tiny.wait_for(lambda: any(checkpoints.glob(f"step-{best['step'] + 1:08d}/manifest.json")), every_seconds=0.001)
        tiny.kill_one(tiny.ranks_of(process))
        process.wait(timeout=60)
    tiny.alsace("finetune", str(config))
    expected = tiny.state_of(tmp_path / "whole/run/finetune/model")
    assert all(
        torch.equal(value, expected[key])
        for key, value in tiny.state_of(tmp_path / "killed/run/finetune/model").items()
    )


def test_patience_without_a_split_dev_is_refused(world: Path, tmp_path: Path) -> None:
    config = make_run(world, world / "run/data", tmp_path, patience=2)
    found = tiny.alsace("finetune", str(config), check=False)
    assert found.returncode == EXIT_USER_ERROR
    assert "patience: needs a split dev" in found.stderr.splitlines()[-1]


def test_patience_is_part_of_what_a_model_depends_on(world: Path, data: Path, tmp_path: Path) -> None:
    tiny.do("finetune", make_run(world, data, tmp_path, evaluate_every_steps=4))
    plain = json.loads((tmp_path / "run/finetune/manifest.json").read_text())["fingerprint"]
    assert "stopping" not in plain and not {"patience", "evaluate_every_steps"} & set(plain["section"])
    config = make_run(world, data, tmp_path, evaluate_every_steps=4, patience=2)
    found = tiny.alsace("finetune", str(config), check=False)
    assert found.returncode == EXIT_USER_ERROR and "stopping" in found.stderr.splitlines()[-1], found.stderr


def agreement(config_path: Path, model_path: Path) -> float:
    """The share of a model's answers that are their group's vote, on the whole split dev."""
    by_group: dict[str, list[Any]] = {}
    rows = scored(config_path, model_path, 1000)
    for row, scores in rows:
        by_group.setdefault(row.key, []).append(scores)
    agreeing = 0
    for group in by_group.values():
        answers = [int(scores.argmax()) for scores in group]
        summed = np.exp(group).sum(axis=0)
        vote = max(range(len(summed)), key=lambda answer: (answers.count(answer), summed[answer]))
        agreeing += answers.count(vote)
    return agreeing / len(rows)


def test_training_stops_by_votes_without_any_label(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"))
    value["data"] |= {"splits": SPLITS, "withhold_labels": ["pretrain", "unlabeled", "dev"]}
    tiny.alsace("prepare", str(tiny.write_config(tmp_path / "c.yaml", value)))
    unlabeled = tmp_path / "run/data"
    settings: dict[str, Any] = {"num_steps": 40, "learning_rate": 3e-2, "evaluate_every_steps": 2, "patience": 2}
    config = make_run(world, unlabeled, tmp_path / "x", 3, best_by="vote_agreement", **settings)
    tiny.alsace("finetune", str(config))
    rows = [row for row in read_scalars(tmp_path / "x/run/finetune/metrics.jsonl") if "dev_vote_agreement" in row]
    values = [row["dev_vote_agreement"] for row in rows]
    assert len(values) - 1 - int(np.argmax(values)) == 2 and rows[-1]["step"] < 40
    assert not any(name.startswith("accuracy") for row in rows for name in row)
    assert max(values) == pytest.approx(agreement(config, tmp_path / "x/run/finetune/model"))
    found = tiny.alsace("finetune", str(make_run(world, unlabeled, tmp_path / "y", **settings)), check=False)
    assert found.returncode == EXIT_USER_ERROR
    assert "has no labels, which patience looks at" in found.stderr.splitlines()[-1]


def found_alone(*answers: list[float]) -> dict[str, float]:
    """What an evaluator makes of two languages' scores of a group whose first candidate is right."""
    rows = [
        EncodedRow(f"g{number // 2}", ("de", "en")[number % 2], 0, [1], Candidates(((1,), (2,))), 0, False)
        for number in range(len(answers))
    ]
    evaluator = Evaluator(rows, None, "en", 10, 1, None, "accuracy", None)  # type: ignore[arg-type]
    scores = [np.array(one) for one in answers]
    return evaluator._accuracies(scores) | evaluator._agreement(scores)


def test_one_answer_to_everything_is_no_vote_and_all_rates_are_floats() -> None:
    first, second = [-0.1, -2.0], [-2.0, -0.1]
    found = found_alone(first, first, first, first)
    assert "dev_vote_agreement" not in found
    # As a whole number it would come back from a checkpoint as one, which is refused there.
    assert found["accuracy"] == 1 and {type(value) for value in found.values()} == {float}
    assert found_alone(first, first, second, second)["dev_vote_agreement"] == 1
    assert found_alone(first, [-2.1, -0.1], second, second)["dev_vote_agreement"] == 0.75


def test_the_best_is_the_first_of_equals() -> None:
    best = Best()
    assert [best.see(step, value) for step, value in ((2, 0.5), (4, 0.6), (6, 0.6), (8, 0.4))] == [
        True,
        True,
        False,
        False,
    ]
    assert best == Best(4, 0.6, 2)
