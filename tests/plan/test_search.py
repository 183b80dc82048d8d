"""The settings that a forecast finds, the config that it writes, what it prints and which flags it refuses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from alsace_dist.config import Config
from alsace_dist.config_file import load_config
from alsace_dist.errors import UserError
from alsace_dist.plan import search
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.estimate import Forecast, estimate, estimate_training, forecast
from alsace_dist.plan.forecast import cheapest, print_forecast, warnings
from alsace_dist.plan.model import planned_model
from alsace_dist.plan.wish import Wish, read_wish
from alsace_dist.plan.work import Counts, Work, work_of

CONFIGS = Path(__file__).parents[2] / "configs"
FOUR_NODES = Cluster(4, 8, 80e9)
COUNTS = Counts(10_000, 15)
FLAGS: dict[str, int | str] = {
    **dict.fromkeys(("gpus-per-node", "groups", "languages", "average-length", "choice"), 0),
    **dict.fromkeys(("gpu-memory", "bandwidth", "flops", "write"), ""),
}


@pytest.fixture(scope="module")
def xxl() -> Config:
    return load_config(CONFIGS / "xnli-mt5-xxl.yaml", {"engine.num_threads": 4})


def asked(config: Config, cluster: Cluster) -> tuple[Forecast, list[Work]]:
    model = planned_model(config)
    return forecast(config, model, cluster, None), work_of(config, model.mode, COUNTS)


def test_only_what_fits_is_found_and_the_cheapest_comes_first(xxl: Config) -> None:
    about, works = asked(xxl, FOUR_NODES)
    found = search.choices(about, works, xxl.engine)
    assert len(found) > 3
    assert [one.node_hours for one in found] == sorted(one.node_hours for one in found)
    for choice in found:
        assert all(one.device_bytes <= 80e9 * 0.9 - 2e9 for one in choice.estimates)
        assert {one.work.name for one in choice.estimates} == {one.name for one in works}
    # ZeRO-0 takes 16 bytes and more for each of 12 billion parameters, on every GPU.
    assert all(choice.engine.zero_stage > 0 for choice in found)
    assert search.choices(about._replace(cluster=replace(FOUR_NODES, gpu_memory=8e9)), works, xxl.engine) == []
    # Twice the memory allows no less, and is no dearer.
    richer = search.choices(about._replace(cluster=replace(FOUR_NODES, gpu_memory=160e9)), works, xxl.engine)
    assert len(richer) >= len(found) and richer[0].node_hours <= found[0].node_hours


def test_a_choice_has_the_best_micro_batch_that_fits(xxl: Config) -> None:
    about, works = asked(xxl, FOUR_NODES)
    best = search.choices(about, works, xxl.engine)[0]
    chosen = next(one for one in best.estimates if one.work.name == "distill")
    section = chosen.work.section
    assert section is not None
    others = []
    for tokens in range(256, 65_537, 256):
        changed = section.model_copy(update={"tokens_per_micro_batch": tokens})
        other = estimate_training(about, replace(chosen.work, section=changed), changed, best.engine)
        if other.fits:
            others.append(other.seconds)
    assert chosen.seconds <= 1.01 * min(others) and max(others) > 2 * min(others)


def test_cheaper_is_not_always_faster(xxl: Config) -> None:
    about, works = asked(xxl, replace(FOUR_NODES, num_nodes=16))
    few, many = (cheapest(about, works, xxl.engine, number) for number in (1, 16))
    assert few is not None and many is not None
    assert few.node_hours < many.node_hours and few.seconds > many.seconds


def test_what_is_written_runs(xxl: Config, tmp_path: Path) -> None:
    about, works = asked(xxl, FOUR_NODES)
    config = xxl.model_copy(update={"run_dir": str(tmp_path)})
    found = search.choices(about, works, xxl.engine)
    kinds = {(one.engine.zero_stage, one.engine.offload_optimizer): one for one in found}
    assert len(kinds) > 3
    for number, choice in enumerate(kinds.values()):
        file = tmp_path / f"{number}.yaml"
        search.write(config, choice, file)
        loaded = load_config(file)
        assert loaded.engine == choice.engine.model_copy(update={"num_processes": 8})
        assert loaded.engine.num_threads == 4 and loaded.engine.hang_seconds == 1800
        assert loaded.finetune is not None
        sections = {"finetune": loaded.finetune, "distill": loaded.distill}
        assert {name: one.tokens_per_micro_batch for name, one in sections.items()} == choice.budgets
        # What is written costs what was promised.
        again, stages = asked(loaded, FOUR_NODES)
        assert sum(estimate(again, one).node_hours for one in stages) == pytest.approx(choice.node_hours)
        assert loaded.model_copy(update={"engine": xxl.engine, "finetune": None, "distill": xxl.distill}) == (
            config.model_copy(update={"finetune": None})
        )
    with pytest.raises(UserError, match=r"0\.yaml: is there already"):
        search.write(config, choice, tmp_path / "0.yaml")
    with pytest.raises(UserError, match=r"full\.yaml: cannot be written \(File too large\)"), tiny.no_room(10):
        search.write(config, choice, tmp_path / "full.yaml")
    assert not (tmp_path / "full.yaml").exists()
    with pytest.raises(UserError, match=r"there is no directory .*; make it"):
        search.write(config, choice, tmp_path / "nowhere" / "a.yaml")


def test_what_the_config_says_of_splits_that_are_not_prepared_is_taken(xxl: Config) -> None:
    config = xxl.model_copy(
        update={"data": xxl.data.model_copy(update={"splits": {"labeled": 64.0, "unlabeled": 500.0, "test": 0.5}})}
    )
    found = read_wish(2, FLAGS | {"gpu-memory": "80GB", "languages": 15}, config)
    assert found.counts == Counts(1000, 15, {"labeled": 64, "unlabeled": 500})
    works = {one.name: one.num_examples for one in work_of(config, "auto", found.counts)}
    assert works == {"finetune": 64, "distill": 500 * 15, "score unlabeled": 500 * 15, "score test": 1000 * 15}
    assert read_wish(2, FLAGS | {"gpu-memory": "80GB", "groups": 70}, config).counts.of("unlabeled") == 70


def test_variants_and_raw_settings_survive(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage3_max_live_parameters": 10**8, "zero_hpz_partition_size": 4}, "dump_state": True}
    changes = {"run_dir": str(tmp_path), "engine.zero_stage": 3, "engine.deepspeed": raw}
    config = load_config(CONFIGS / "xnli-mt5-large.yaml", changes)
    about, works = asked(config, FOUR_NODES)
    for stage, hpz, expected in (
        (3, 1, {"stage3_max_live_parameters": 10**8}),
        (3, 8, {"stage3_max_live_parameters": 10**8, "zero_hpz_partition_size": 8}),
        (1, 1, {}),
    ):
        layout = search.layout_of(config.engine, stage, False, False, hpz)
        assert layout.deepspeed.get("zero_optimization", {}) == expected and layout.deepspeed["dump_state"]
    search.write(config, search.choices(about, works, config.engine)[0], tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml").variants == config.variants


# --- what is printed -----------------------------------------------------------------------------------------------


def test_where_gpus_wait_for_each_other_it_says_what_helps(xxl: Config) -> None:
    about, works = asked(xxl, replace(FOUR_NODES, num_nodes=64))
    estimates = [estimate(about, one) for one in works]
    lines = list(warnings(estimates, search.choices(about, works, xxl.engine)))
    line = next(one for one in lines if "distill" in one)
    # 1,024 prompts on 512 GPUs: two each.
    assert "communicate" in line and "a larger distill.global_batch_size, of which a GPU has 2 prompts" in line
    assert "fewer nodes" in line
    about, works = asked(xxl, FOUR_NODES)  # where a lower stage fits, too, but is slower
    slow = next(one for one in (estimate(about, work) for work in works) if one.work.name == "distill")
    found = search.choices(about, works, xxl.engine)
    assert any(choice.engine.zero_stage == 2 for choice in found)
    assert search.remedies(slow, found)[0] == "engine.deepspeed.zero_optimization.zero_hpz_partition_size: 8"
    assert search.remedies(slow, [one for one in found if one.engine.zero_stage < 3])[0] != "engine.zero_stage: 2"
    alone, works = asked(xxl, Cluster(1, 8, 141e9))  # room for passes that outlast their gathers
    best = search.choices(alone, works, xxl.engine)[0]
    assert not any("distill: GPUs communicate" in one for one in warnings(best.estimates, []))
    poor, works = asked(xxl, replace(FOUR_NODES, gpu_memory=10e9))
    tight = list(warnings([estimate(poor, one) for one in works], []))
    assert any("distill: 18.5 GB on a GPU, of which 7.00 GB are free" in one for one in tight)


def test_the_forecast_as_people_read_it(xxl: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chosen.yaml"
    wish = read_wish(4, FLAGS | {"gpu-memory": "80GB", "groups": 10_000, "write": str(file), "choice": 2}, xxl)
    assert wish == Wish(FOUR_NODES, COUNTS, None, file, 2)
    print_forecast(xxl, wish)
    text = capsys.readouterr().out
    assert "predicted, not measured" in text
    # ZeRO-3 on 32 GPUs: 11.9 billion parameters of 2, 8 and 12 bytes; a checkpoint has 12 bytes of each.
    memory = next(line.split() for line in text.splitlines() if line.startswith("distill"))
    assert memory[1:4] == ["0.744", "2.97", "4.46"] and memory[7] == "yes" and memory[9] == "143"
    assert "10,000 groups in 15 languages" in text and "64 tokens long" in text
    assert f"Choice 2 is written to {file}." in text
    second = next(line.split() for line in text.split("cheapest first")[1].splitlines() if line.startswith("2 "))
    assert load_config(file).engine.zero_stage == int(second[1])
    with pytest.raises(UserError, match="--choice=99: "):
        print_forecast(xxl, wish._replace(choice=99))
    assert yaml.safe_load(file.read_text())["model"] == {"path": "google/mt5-xxl"}


# --- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "memory"),
    [("80GB", 80e9), ("80", 80e9), ("80 GiB", 80 * 2**30), ("0.08 TB", 80e9), ("81920MiB", 80 * 2**30)],
)
def test_amounts_with_units(xxl: Config, text: str, memory: float) -> None:
    found = read_wish(2, FLAGS | {"gpu-memory": text, "bandwidth": "25", "flops": "312TFLOPS", "gpus-per-node": 4}, xxl)
    assert found is not None
    assert math.isclose(found.cluster.gpu_memory, memory)
    assert found.cluster == Cluster(2, 4, found.cluster.gpu_memory, 25e9, 312e12)


@pytest.mark.parametrize(
    ("nodes", "flags", "message"),
    [
        (4, {}, "--nodes=4: needs the memory of a GPU"),
        (-1, {"gpu-memory": "80GB"}, "--nodes=-1: must be 1 or more"),
        (4, {"gpu-memory": "80 apples"}, "--gpu-memory=80 apples: give an amount such as 80GB"),
        (4, {"gpu-memory": "0"}, "--gpu-memory=0: "),
        (4, {"gpu-memory": "-80GB"}, "--gpu-memory=-80GB: "),
        (4, {"gpu-memory": "1GB"}, "--gpu-memory=1GB: 2 GB are taken"),
        (4, {"gpu-memory": "9" * 400}, "...: give an amount such as 80GB"),
        (4, {"gpu-memory": "80GB", "bandwidth": "0.0000000001"}, "--bandwidth=0.0000000001: give an amount such as 50"),
        (4, {"gpu-memory": "80GB", "languages": 10**10}, "--languages=10000000000: must be from 1 to 10,000"),
        (4, {"gpu-memory": "80GB", "gpus-per-node": -8}, "--gpus-per-node=-8: must be"),
        (4, {"gpu-memory": "80GB", "bandwidth": "fast"}, "--bandwidth=fast: give an amount such as 50"),
        (4, {"gpu-memory": "80GB", "flops": "1e9x"}, "--flops=1e9x: "),
        (4, {"gpu-memory": "80GB", "groups": -5}, "--groups=-5: must be from 1"),
        (4, {"gpu-memory": "80GB", "choice": 2}, "--choice=2: says what to write"),
        (10**9, {"gpu-memory": "80GB"}, "lower one of them"),
        (0, {"gpu-memory": "80GB"}, "--gpu-memory=80GB: is for the nodes of --nodes"),
        (0, {"languages": 3}, "--languages=3: is for the nodes of --nodes"),
    ],
)
def test_flags_that_are_refused(xxl: Config, nodes: int, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_wish(nodes, FLAGS | flags, xxl)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_nodes_the_plan_is_for_this_machine(xxl: Config) -> None:
    assert read_wish(0, FLAGS, xxl) is None
