"""Tokens of a training are made once, by all ranks together, and are not trusted blindly."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from alsace_dist.config import TaskConfig
from alsace_dist.data.rows import answers_of, rows_of
from alsace_dist.errors import Stopped, UserError
from alsace_dist.files.shards import open_dataset, read_shard
from alsace_dist.models.family import Options, open_model
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training.tokens import Tokens, drop

LANGUAGES = ("de", "en", "ru")


def tokens_of(world: str, scorer: str, data: str = "") -> Tokens:
    sections = tiny.of_scorer(Path(world), scorer)
    task = TaskConfig(**{"fields": ["text"], "template": "{text}", "labels": tiny.LABELS} | sections.get("task", {}))
    options = Options(pooling=sections["model"].get("pooling"))
    model = open_model(Path(sections["model"]["path"]), answers_of(task, LANGUAGES), options)
    return Tokens(open_dataset(data or f"{world}/run/data/unlabeled"), task, LANGUAGES, model)


def made(group: Ranks, world: str, scorer: str, out: str, fingerprint: Any = 1, stop: bool = False) -> Any:
    """What a rank sees after the files are made: whether all rows are as encoded; when each file was written."""
    tokens = tokens_of(world, scorer)
    group.stop.is_set = stop and group.rank == 1
    try:
        tokens.make(Path(out), {"of": fingerprint}, range(len(tokens.dataset.shards)), Watchdog(group, Path(out), None))
    except Stopped as stopped:
        return str(stopped)
    finally:
        group.stop.is_set = False
    for number, shard in enumerate(tokens.dataset.shards):
        rows = rows_of(tokens.task, read_shard(tokens.dataset, shard), LANGUAGES)
        try:
            assert list(tokens.open(number)) == tokens.model.encode(rows)
        except UserError as error:
            return str(error)
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(out).glob("*.arrow"))}


def num_rows(group: Ranks, world: str, data: str, out: str) -> list[int]:
    tokens = tokens_of(world, "mt5", data)
    tokens.make(Path(out), {}, [0, 2], Watchdog(group, Path(out), None))
    return [len(tokens.open(shard)) for shard in (0, 2)]


def test_a_start_that_goes_on_reads_no_shard(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run/data/unlabeled", tmp_path / "data")
    arguments = {"world": str(world), "data": str(tmp_path / "data"), "out": str(tmp_path / "tokens")}
    (tmp_path / "data/000001.tar").unlink()  # nobody asks for it
    first = tiny.run_ranks(num_rows, 2, **arguments)
    for path in (tmp_path / "data").glob("*.tar"):
        path.unlink()
    assert tiny.run_ranks(num_rows, 2, **arguments) == first and first[0][0] > 30


@pytest.mark.parametrize("scorer", ["mt5", "cloze", "new head", "t5gemma2"])
def test_every_rank_reads_the_rows_that_all_have_written(world: Path, tmp_path: Path, scorer: str) -> None:
    arguments = {"world": str(world), "scorer": scorer, "out": str(tmp_path / "tokens")}
    first, other = tiny.run_ranks(made, 2, **arguments)
    assert first == other and list(first) == ["000000.arrow", "000001.arrow", "000002.arrow"]
    if scorer != "mt5":
        return
    assert tiny.run_ranks(made, 2, **arguments) == tiny.run_ranks(made, 1, **arguments) * 2 == [first, first]
    assert all(tiny.run_ranks(made, 2, **arguments, fingerprint=2)[0][name] > first[name] for name in first)
    drop(tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_what_is_damaged_is_made_again_or_named(world: Path, tmp_path: Path) -> None:
    arguments = {"world": str(world), "scorer": "mt5", "out": str(tmp_path)}
    (first,) = tiny.run_ranks(made, 1, **arguments)
    (tmp_path / "000001.arrow").unlink()
    (again,) = tiny.run_ranks(made, 1, **arguments)
    assert [name for name in first if again[name] != first[name]] == ["000001.arrow"]
    os.truncate(tmp_path / "000002.arrow", 100)
    (again,) = tiny.run_ranks(made, 1, **arguments)
    assert isinstance(again, dict) and again["000002.arrow"] != first["000002.arrow"]
    whole = (tmp_path / "000000.arrow").read_bytes()
    for remains in ("manifest.json", "started.json"):  # what else is damaged then is not taken for whole
        flip(tmp_path / "000000.arrow")
        if remains == "manifest.json":
            (tmp_path / "000001.arrow").unlink()
        else:
            tiny.unfinish(tmp_path, "tokens")
        assert isinstance(tiny.run_ranks(made, 1, **arguments)[0], dict)
        assert (tmp_path / "000000.arrow").read_bytes() == whole and not list(tmp_path.glob("written-*"))
    flip(tmp_path / "000000.arrow")
    (said,) = tiny.run_ranks(made, 1, **arguments)
    assert "000000.arrow: content differs from the sha256" in said and f"delete {tmp_path}" in said


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_a_person_keeps_there_is_not_touched(world: Path, tmp_path: Path) -> None:
    """Beside our files it stays; where no file of ours has been, nothing is written."""
    arguments = {"world": str(world), "scorer": "mt5", "out": str(tmp_path / "ours")}
    tiny.run_ranks(made, 1, **arguments)
    (tmp_path / "ours/mine.arrow").write_text("mine")
    drop(tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.arrow"]
    for name in ("manifest.json", "000000.arrow"):
        theirs = tmp_path / name / "x"
        theirs.mkdir(parents=True)
        (theirs / name).write_text('{"mine": 1}')
        with pytest.raises(AssertionError, match="lies where a stage writes"):
            tiny.run_ranks(made, 1, **arguments | {"out": str(theirs)})
        assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [(name, '{"mine": 1}')]


def test_a_stop_while_tokenising_keeps_what_is_done(world: Path, tmp_path: Path) -> None:
    """Rank 0 has shards 0 and 2; rank 1, which is asked to stop, writes nothing."""
    arguments = {"world": str(world), "scorer": "mt5", "out": str(tmp_path)}
    said = tiny.run_ranks(made, 2, **arguments, stop=True)
    assert said == [f"stopped while tokenising; {tmp_path} keeps what is done"] * 2
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.arrow")}
    assert sorted(kept) == ["000000.arrow", "000002.arrow"]
    found, _ = tiny.run_ranks(made, 2, **arguments)
    assert len(found) == 3 and found.items() >= kept.items()
