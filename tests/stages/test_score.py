"""Scoring on real ranks: exactly once, the same bytes for any number of ranks, after kills too; errors that stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import objects
import pyarrow.parquet as pq
import pytest
import tiny

from alsace_dist.data.dealing import deal
from alsace_dist.errors import EXIT_STOPPED
from alsace_dist.files import store
from alsace_dist.files.scores import read_metadata, read_score_file, read_scores, write_scores
from alsace_dist.files.shards import open_dataset, read_shard, write_dataset
from alsace_dist.files.store import Patience
from alsace_dist.files.written import Written
from alsace_dist.ranks.group import Ranks

REPOSITORY = Path(__file__).parents[2]
# By default ZeRO-3 divides no tensor as small as those of the small models.
SHARD_ALL: dict[str, Any] = {
    "replicated": {},
    "zero3": {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
}


def make_run(world: Path, directory: Path, **sections: Any) -> Path:
    """A run that scores the world's model as it is, on a copy of the prepared data."""
    directory.mkdir(parents=True)
    shutil.copytree(world / "run" / "data", directory / "data")
    sections = {"data": {"inputs": [], "splits": {}, "directory": str(directory / "data")}, "finetune": None} | sections
    return tiny.write_config(directory / "c.yaml", tiny.make_config(world, run_dir=str(directory / "run"), **sections))


def score_bytes(directory: Path) -> dict[str, bytes]:
    scores = directory / "run/scores"
    return {str(path.relative_to(scores)): path.read_bytes() for path in sorted(scores.glob("*/*.parquet"))}


@pytest.fixture(scope="module")
def one_rank(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scoring") / "one"
    tiny.do("score", make_run(world, directory, engine={"num_processes": 1}))
    return directory


@pytest.mark.parametrize(("num_ranks", "scorer"), [(2, "mt5"), (3, "mt5"), (2, "cloze"), (3, "head"), (2, "t5gemma2")])
def test_any_number_of_ranks_gives_the_same_bytes(
    world: Path, tmp_path: Path, one_rank: Path, num_ranks: int, scorer: str
) -> None:
    """45 groups do not divide evenly into shards of 16; of 3 ranks one gets none of the test split's 2 shards."""
    sections = tiny.of_scorer(world, scorer)
    if scorer != "mt5":
        one_rank = tmp_path / "one"
        tiny.do("score", make_run(world, one_rank, engine={"num_processes": 1}, **sections))
    tiny.do("score", make_run(world, tmp_path / "x", engine={"num_processes": num_ranks}, **sections))
    assert score_bytes(tmp_path / "x") == score_bytes(one_rank)
    assert len(score_bytes(one_rank)) == 3 + 2
    assert not list((tmp_path / "x/run").rglob("progress.json"))  # whichever rank has drawn the last shard


def stage_from_store(group: Any, path: str, command: str, environment: dict[str, str]) -> None:
    """``tiny.stage_on_rank`` where S3 is what the environment says, and with little patience."""
    before, patience = dict(os.environ), store.PATIENCE
    os.environ.update(environment)
    store.PATIENCE = Patience(2.0, 1.0, 1e5, num_tries=12, first_wait_seconds=0.02, most_wait_seconds=0.1)
    try:
        tiny.stage_on_rank(group, path, command, 0, "")
    finally:
        os.environ.clear()
        os.environ.update(before)
        store.PATIENCE = patience


def test_two_ranks_make_of_a_store_that_fails_what_they_make_of_a_disk(
    world: Path, tmp_path: Path, one_rank: Path
) -> None:
    """Scores, also with a cache that the ranks share, and a finetuned model."""
    data = {"inputs": [], "splits": {}, "directory": f"s3://{objects.BUCKET}/data"}
    steps = {"finetune": {"num_steps": 6, "global_batch_size": 10}}
    with objects.s3_server(tmp_path / "server") as files:
        files.put(str(world / "run/data"), f"{objects.BUCKET}/data", recursive=True)
        proxy = objects.Proxy(files.port)

        def do(command: str, name: str, **sections: Any) -> None:
            proxy.faults = [] if name == "cache" else ["", "503", "", "cut", "", "stall", "503", "cut"]
            proxy.seen.clear()
            path = make_run(world, tmp_path / name, **sections)
            environment = objects.environment(proxy.port)
            tiny.run_ranks(stage_from_store, 2, path=str(path), command=command, environment=environment)

        for name, more in (("store", {}), ("cache", {"cache": str(tmp_path / "kept")})):
            do("score", name, data=data | more)
            assert proxy.faults == []
            assert score_bytes(tmp_path / name) == score_bytes(one_rank)
        shards = [path for method, path in proxy.seen if method == "GET" and ".tar" in path]
        kept = list((tmp_path / "kept/alsace-shards").glob("[0-9a-f]*"))
        assert len(shards) == len(kept) == 5  # each once, whoever reads it first
        do("finetune", "disk-model", **steps)
        assert not proxy.seen
        do("finetune", "store-model", data=data, **steps)
        assert proxy.faults == []
        models = [tmp_path / name / "run/finetune/model/model.safetensors" for name in ("disk-model", "store-model")]
        assert models[0].read_bytes() == models[1].read_bytes()
        proxy.close()


def test_what_a_killed_run_has_done_of_a_shard_is_kept(world: Path, tmp_path: Path, one_rank: Path) -> None:
    """Parts of a shard that several ranks were scoring; but not those of another model, nor of another division, nor
    one that is not as it was written."""
    path = make_run(world, tmp_path / "x")
    shutil.copytree(one_rank / "run/scores", tmp_path / "x/run/scores")
    directory = tmp_path / "x/run/scores/unlabeled"
    file = directory / "000001.parquet"
    scores, metadata = read_score_file(file), read_metadata(file) or {}
    file.unlink()
    tiny.unfinish(directory, "scores")
    (shard,) = [one for one in open_dataset(world / "run/data/unlabeled").shards if one.stem == "000001"]
    dealt = deal([shard], 2, lambda shard: 100)
    assert len(dealt) == 8
    every = list(range(len(scores.keys)))
    of_another = dealt[-1]._replace(num_parts=9), [0.5, 0.25, 0.25], metadata | {"fingerprint": "of another model"}
    done = [(part, [1 / 3] * 3, metadata) for part in dealt[:4]]  # of two batches or more some, and not the last
    for part, probabilities, wanted in (*done, of_another):
        rows = [np.log(probabilities).astype(np.float32)] * len(every)  # as no model says, and of all rows
        path_of_part = directory / f"{part.name}.parquet"
        write_scores(path_of_part, replace(scores, log_probs=rows), wanted, every)
        Written(directory, 7).add(path_of_part)
    broken = directory / f"{dealt[1].name}.parquet"
    rows = [np.log([0.5, 0.25, 0.25]).astype(np.float32)] * len(every)
    write_scores(broken, replace(scores, log_probs=rows), metadata, every)  # as if bits had flipped since
    persons = directory / "000001.part-of-mine.parquet"
    persons.write_text("a copy")
    tiny.do("score", path)
    found = read_score_file(file)
    assert (found.keys, found.languages, found.labels) == (scores.keys, scores.languages, scores.labels)
    kept = [np.allclose(row, np.log(1 / 3)) for row in found.log_probs]
    assert 0 < sum(kept) < len(kept)  # that part's rows; where it says more, those who have scored the others are right
    assert all(np.array_equal(found.log_probs[row], scores.log_probs[row]) for row in every if not kept[row])
    assert not list(directory.glob("written-*"))
    assert list(directory.glob("*.part-*")) == [persons] and persons.read_text() == "a copy"


LAUNCHERS = {
    "local.sh": {"NUM_PROCESSES": "2"},
    "deepspeed.sh": {"HOSTFILE": "hosts", "DEEPSPEED_OPTIONS": "--no_ssh_check --master_addr 127.0.0.1"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_bytes(world: Path, tmp_path: Path, one_rank: Path, launcher: str) -> None:
    config = make_run(world, tmp_path / "x", engine={"num_processes": 3})  # which a launcher's own number overrules
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [REPOSITORY / "launchers" / launcher, "score", str(config)],
        cwd=tmp_path,
        env=tiny.environment() | LAUNCHERS[launcher] | {"PATH": path},
        timeout=300,
        check=True,
    )
    assert score_bytes(tmp_path / "x") == score_bytes(one_rank)


def test_the_manifest_says_what_the_tokenizer_made_of_every_language(world: Path, one_rank: Path) -> None:
    found = json.loads((one_rank / "run/scores/unlabeled/manifest.json").read_text())["details"]["texts"]
    scores = read_scores(one_rank / "run/scores/unlabeled")
    assert {language: counts["num_rows"] for language, counts in found.items()} == dict(Counter(scores.languages))
    assert all(counts["num_tokens"] > counts["num_rows"] for counts in found.values())


def test_every_example_is_there_once_and_normalised(world: Path, one_rank: Path) -> None:
    scores = read_scores(one_rank / "run/scores/unlabeled")
    listed = open_dataset(world / "run/data/unlabeled").shards
    assert len(listed) == 3
    assert len(scores.keys) == sum(sum(shard.num_examples.values()) for shard in listed)
    assert 45 * 3 < len(scores.keys) < 45 * 4
    assert len(set(zip(scores.keys, scores.languages, strict=True))) == len(scores.keys)
    assert np.allclose(np.exp(np.stack(scores.log_probs)).sum(axis=1), 1, atol=1e-5)
    assert set(scores.labels) == {None}
    assert set(read_scores(one_rank / "run/scores/test").labels) == {0, 1, 2}


@pytest.mark.parametrize("scorer", ["mt5", "cloze", "head"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_do_not_depend_on_where_the_weights_are_nor_their_bytes_on_the_number_of_ranks(
    world: Path, tmp_path: Path, dtype: str, scorer: str
) -> None:
    """Three ranks under ZeRO-3: one of them has fewer forwards to run than the others."""
    for sharding, ranks in (("replicated", 2), ("zero3", 1), ("zero3", 3)):
        engine = {"num_processes": ranks, "zero_stage": 3, "dtype": dtype} | SHARD_ALL[sharding]
        sections = tiny.of_scorer(world, scorer) | {"score": {"sharding": sharding}}
        tiny.do("score", make_run(world, tmp_path / f"{sharding}-{ranks}", engine=engine, **sections))
    assert score_bytes(tmp_path / "zero3-1") == score_bytes(tmp_path / "zero3-3")
    whole, divided = (read_scores(tmp_path / name / "run/scores/unlabeled") for name in ("replicated-2", "zero3-3"))
    assert (whole.keys, whole.languages) == (divided.keys, divided.languages)
    # Biased products of bf16 on CPUs depend in their last bits on where in memory a weight begins.
    assert np.allclose(whole.log_probs, divided.log_probs, atol=1e-6 if dtype == "fp32" else 0.03)
    assert np.std(whole.log_probs) > 0.01  # not a comparison of constants


def score_on_machines(group: Ranks, path: str, hosts: str) -> None:
    """The stage, as if each rank were on the machine of this name."""
    uname = os.uname
    os.uname = lambda: SimpleNamespace(nodename=hosts[group.rank])  # type: ignore[assignment, return-value]
    try:
        tiny.stage_on_rank(group, path, "score", 0, "")
    finally:
        os.uname = uname


def test_machines_that_share_out_the_weights_each_for_itself_give_the_same_bytes(world: Path, tmp_path: Path) -> None:
    """Ranks 0 and 2 on one machine, rank 1 on another: of 2 shards of the test split the second may get none."""
    sections = {"score": {"sharding": "zero3"}}
    for number, hosts in ((1, "a"), (3, "aba")):
        engine = {"num_processes": number, "zero_stage": 3} | SHARD_ALL["zero3"]
        config = make_run(world, tmp_path / hosts, engine=engine, **sections)
        tiny.run_ranks(score_on_machines, number, path=str(config), hosts=hosts)
    assert score_bytes(tmp_path / "a") == score_bytes(tmp_path / "aba")


@pytest.mark.parametrize(("zero_stage", "scorer"), [(2, "mt5"), (3, "mt5"), (2, "head"), (3, "cloze")])
def test_a_rank_killed_while_scoring_costs_nothing_but_time(
    world: Path, tmp_path: Path, one_rank: Path, zero_stage: int, scorer: str
) -> None:
    sections = tiny.of_scorer(world, scorer)
    if (zero_stage, scorer) != (2, "mt5"):
        one_rank = tmp_path / "one"
        tiny.do("score", make_run(world, one_rank, engine={"num_processes": 1, "zero_stage": zero_stage}, **sections))
    config = make_run(world, tmp_path / "x", engine={"zero_stage": zero_stage}, **sections)
    output = tmp_path / "x/run/scores/unlabeled"
    with tiny.started("score", str(config)) as process:
        tiny.wait_for(lambda: any(output.glob("*.parquet")) or process.poll() is not None)
        start = time.monotonic()
        tiny.kill_one(tiny.ranks_of(process))
        process.wait(timeout=60)
        assert time.monotonic() - start < 60
    tiny.do("score", config)
    assert score_bytes(tmp_path / "x") == score_bytes(one_rank)


def test_one_rank_that_is_asked_to_stop_stops_all_and_nothing_is_lost(world: Path, tmp_path: Path) -> None:
    source = open_dataset(world / "run/data/unlabeled")
    groups = [group for shard in source.shards for group in read_shard(source, shard)]
    many = [replace(group, key=f"{group.key}-{copy}") for copy in range(10) for group in groups]

    def make(name: str) -> Path:
        config = make_run(world, tmp_path / name, score={"tokens_per_batch": 20})
        shutil.rmtree(tmp_path / name / "data/unlabeled")
        write_dataset(tmp_path / name / "data/unlabeled", many, source.labels, groups_per_shard=3, fingerprint={})
        return config

    config, scores = make("x"), tmp_path / "x/run/scores/unlabeled"
    with tiny.started("score", str(config)) as process:
        tiny.wait_for(lambda: any(scores.glob("*.parquet")), every_seconds=0.001)
        ranks = [pid for pid in tiny.ranks_of(process) if b"alsace_dist" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[-1], signal.SIGUSR2)
        assert process.wait(timeout=60) == EXIT_STOPPED
    assert 0 < len(list(scores.glob("*.parquet"))) < 150
    assert not (scores / "manifest.json").exists()
    tiny.do("score", config)
    tiny.do("score", make("y"))
    assert score_bytes(tmp_path / "x") == score_bytes(tmp_path / "y")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_finished_shards_are_scored_again_only_if_they_are_not_as_they_were_written(
    world: Path, tmp_path: Path, one_rank: Path, num_ranks: int
) -> None:
    config = make_run(world, tmp_path / "x", engine={"num_processes": num_ranks})
    shutil.copytree(one_rank / "run/scores", tmp_path / "x/run/scores")
    directory = tmp_path / "x/run/scores/unlabeled"
    tiny.unfinish(directory, "scores")
    (directory / "000001.parquet").unlink()
    file = directory / "000002.parquet"
    scores, metadata = read_score_file(file), read_metadata(file) or {}
    write_scores(file, replace(scores, log_probs=scores.log_probs[::-1]), metadata)
    changed = file.read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.parquet") if path != file}
    tiny.do("score", config)
    again = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.parquet")}
    assert times and times.items() <= again.items()
    assert file.read_bytes() != changed and score_bytes(tmp_path / "x") == score_bytes(one_rank)


def test_another_dataset_under_the_same_scores_is_refused(world: Path, tmp_path: Path) -> None:
    config = make_run(world, tmp_path / "x", engine={"num_processes": 1})
    tiny.do("score", config)
    before = score_bytes(tmp_path / "x")
    shutil.rmtree(tmp_path / "x/data/unlabeled")
    shutil.copytree(tmp_path / "x/data/test", tmp_path / "x/data/unlabeled")
    failed = tiny.alsace("score", str(config), check=False)
    assert failed.returncode == 2
    assert (
        failed.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}/x/run/scores/unlabeled: made with other")
    )
    assert score_bytes(tmp_path / "x") == before


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_broken_shard_stops_all_ranks_with_one_error(world: Path, tmp_path: Path, zero_stage: int) -> None:
    config = make_run(world, tmp_path / "x", engine={"zero_stage": zero_stage})
    shard = tmp_path / "x/data/unlabeled/000002.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    failed = tiny.alsace("score", str(config), check=False, timeout=60)
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {shard}: truncated or changed"), failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "x/run/scores/unlabeled/manifest.json").exists()


def test_rows_are_written_in_shard_order(one_rank: Path) -> None:
    table = pq.read_table(one_rank / "run/scores/unlabeled/000000.parquet")
    keys = table.column("key").to_pylist()
    assert [key for index, key in enumerate(keys) if index == 0 or keys[index - 1] != key] == list(dict.fromkeys(keys))
