"""Several runs in one table, and what a run says of itself later: warnings, costs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from reporting.test_report import make_evaluation

from alsace_dist import exporting, runner, sweep
from alsace_dist.comparison import compare
from alsace_dist.config import Config
from alsace_dist.config_file import config_text, load_config
from alsace_dist.errors import NotReady, UserError
from alsace_dist.files.costs import COSTS, Cost, Start, read_costs
from alsace_dist.files.evaluation import read_evaluation, write_evaluation
from alsace_dist.files.layout import DISTILL, Layout
from alsace_dist.files.lines import append_line
from alsace_dist.files.manifest import load_manifest, write_manifest
from alsace_dist.files.scores import KIND as SCORES
from alsace_dist.files.warnings import WARNINGS, add_warning, read_warnings
from alsace_dist.outcome import evaluations_of
from alsace_dist.reporting.facts import cost_table, duration, warning_lines

BEFORE = {"en": 0.7, "de": 0.4}


def run_of(directory: Path, seed: int, after: float, rate: float = 1e-3) -> Config:
    """A run of which only the evaluation is there."""
    run = directory / f"seed-{seed}-{rate}"
    value = tiny.make_config(directory, run_dir=str(run), distill={"learning_rate": rate}, seed=seed)
    config = load_config(tiny.write_config(directory / f"{run.name}.yaml", value))
    evaluation = make_evaluation(BEFORE, {"en": 0.7, "de": after}, p_values={"de": 0.04})
    Layout(run).evaluation.mkdir(parents=True)
    write_evaluation(Layout(run).evaluation, evaluation, {}, 1000)
    return config


def test_seeds_of_a_config_are_a_row_and_other_configs_another(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, 1, 0.5), run_of(tmp_path, 2, 0.6), run_of(tmp_path, 1, 0.41, rate=1e-4)]
    text = compare(runs)
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[2:]] == [
        ["seed-1-0.001, seed-2-0.001: before", "2", "55.0 ± 0.0"],
        ["seed-1-0.001, seed-2-0.001: main", "2", "62.5 ± 3.5"],
        ["seed-1-0.0001: before", "1", "55.0"],
        ["seed-1-0.0001: main", "1", "55.5"],
    ]
    assert rows[3][-2:] == ["1", "0"]  # 100 and 200 of 1,000 gained, none lost: significant together
    assert "seed-1" not in compare(runs[:2])


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = run_of(tmp_path, 1, 0.5)
    with pytest.raises(UserError, match="has the config and the seed of another of these runs"):
        compare([one, one])
    with pytest.raises(NotReady, match="holds no evaluation yet"):
        compare([one, one.model_copy(update={"seed": 3, "run_dir": str(tmp_path / "none")})])


def test_a_variants_name_means_one_thing_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = run_of(tmp_path, 1, 0.5), run_of(tmp_path, 2, 0.6)
    with pytest.raises(UserError, match=r"its variant v has other settings than that of .*seed-1-0.001; leave one out"):
        compare(
            [
                config.model_copy(update={"variants": {"v": {"select": {"rule": rule}}}})
                for config, rule in ((one, "all"), (other, "source"))
            ]
        )
    away = run_of(tmp_path / "away", 1, 0.41, rate=1e-4)
    (tmp_path / "away/seed-1-0.0001").rename(tmp_path / "away/seed-1-0.001")
    away = away.model_copy(update={"run_dir": str(tmp_path / "away/seed-1-0.001")})
    text = compare([one, away])
    assert f"{one.run_dir}: before" in text and f"{away.run_dir}: before" in text
    starts = [line for line in text.splitlines() if ": before" in line]
    assert all(line.rstrip("| ").endswith("– | –") for line in starts)  # nothing to compare them with


def test_runs_of_a_sweep_have_one_config(tmp_path: Path) -> None:
    one, other = run_of(tmp_path, 1, 0.5), run_of(tmp_path, 2, 0.6, rate=1e-4)
    with pytest.raises(UserError, match=r"is no seed of the same config as .*distill.learning_rate: 0.001 -> 0.0001"):
        sweep.check_same([one, other])
    faster = one.engine.model_copy(update={"zero_stage": 2})
    distill = one.distill.model_copy(update={"checkpoint_every_steps": 7})
    sweep.check_same([one, one.model_copy(update={"seed": 2, "engine": faster, "distill": distill})])


def test_an_evaluation_of_another_model_is_no_result_of_this_one(tmp_path: Path) -> None:
    """Made anew: first the scores, then the model as well."""
    config = run_of(tmp_path, 1, 0.5)
    layout = Layout(Path(config.run_dir))
    assert set(evaluations_of(config)) == {"main"}  # scores and model were deleted, to save room

    def make(directory: Path, kind: str, number: int = 0, **fingerprint: Any) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        write_manifest(directory, kind, fingerprint, [], {"number": number})
        return load_manifest(directory, kind).digest

    model = make(layout.distill(1), DISTILL)
    after = make(layout.scores(1, "test"), SCORES, model={DISTILL: model})
    write_evaluation(layout.evaluation, read_evaluation(layout.evaluation), {"after": after}, 1000)
    assert set(evaluations_of(config)) == {"main"}
    make(layout.distill(1), DISTILL, 7)
    with pytest.raises(UserError, match=r"round1/scores/test: is of another model than that in .*distill; delete it"):
        evaluations_of(config)
    make(layout.scores(1, "test"), SCORES, 7)
    with pytest.raises(UserError, match=r"evaluation: is of other scores than those in .*round1/scores/test; delete"):
        exporting.export(config, tmp_path / "out")


def test_a_report_is_of_the_run_and_never_of_a_variant_alone(tmp_path: Path) -> None:
    config = run_of(tmp_path, 1, 0.5)
    variant = config.model_copy(update={"variants": {"v": {"select": {"rule": "source"}}}})
    of_run, of_variant = (Layout(Path(config.run_dir), name).evaluation for name in ("", "v"))
    of_variant.parent.mkdir(parents=True)
    of_run.rename(of_variant)
    assert set(evaluations_of(variant)) == {"v"}
    with pytest.raises(NotReady, match="holds no evaluation of its own yet"):
        runner.report(variant)
    assert not (Path(config.run_dir) / "report.json").exists()


def test_warnings_are_kept_once_each_with_how_often_they_were_said(tmp_path: Path) -> None:
    for stage, text in (("score", "a"), ("distill", "slow\x1b[31m"), ("score", "a"), ("finetune", "b\u2028\x85")):
        add_warning(tmp_path, stage, text)
    add_warning(tmp_path, "distill round 1 (v)", "distill: step 9: it is slow")
    with (tmp_path / WARNINGS).open("ab") as file:
        file.write(b'{"time": "now", "stage": "caf\xc3')  # a disk was full
    add_warning(tmp_path, "score", "a")
    found = read_warnings(tmp_path)
    assert [(one.stage, one.text, count) for one, count in found] == [
        ("distill", "slow\x1b[31m", 1),
        ("finetune", "b\u2028\x85", 1),
        ("distill round 1 (v)", "step 9: it is slow", 1),
        ("score", "a", 3),
    ]
    assert warning_lines(found) == [
        "score: a (said 3 times)",
        "distill round 1 (v): step 9: it is slow",
        "finetune: b\ufffd\ufffd",
        "distill: slow\ufffd[31m",
    ]
    add_warning(tmp_path / "gone", "score", "not lost: it was printed")
    assert read_warnings(tmp_path / "gone") == []


def test_costs_add_up_over_the_starts_of_a_stage(tmp_path: Path) -> None:
    costs = [("distill round 1", 1800.0, 16, 2), ("distill round 1", 5400.0, 8, 1), ("evaluate", 2.0, 1, 1)]
    for stage, seconds, num_ranks, num_nodes in costs:
        cost = Cost(
            time="now", stage=stage, seconds=seconds, num_ranks=num_ranks, num_nodes=num_nodes, is_done=seconds > 5000
        )
        append_line(tmp_path / COSTS, cost.model_dump())
    with (tmp_path / COSTS).open("ab") as file:
        file.write(b'{"time": "now", "stage": "caf\xc3')  # a disk was full
    table = cost_table(read_costs(tmp_path))
    assert [row.cells for row in table.rows] == [
        ["distill round 1", "2 h 00 min", "2", "8 to 16", "2.50"],
        ["evaluate", "2 s", "1", "1", "0.0006"],
        ["in all", "2 h 00 min", "–", "–", "2.50"],
    ]
    assert (duration(59), duration(61), duration(3599)) == ("59 s", "1 min", "1 h 00 min")


def test_status_sees_who_works_here_and_what_has_stopped(world: Path, tmp_path: Path) -> None:
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data, finetune={"num_steps": 100_000})
    config = tiny.write_config(tmp_path / "c.yaml", value)

    def line() -> str:
        rows = tiny.alsace("status", str(tmp_path / "run")).stdout.splitlines()
        return next(row for row in rows if row.startswith("finetune"))

    with tiny.started("finetune", str(config)) as process:
        tiny.wait_for(lambda: (tmp_path / "run/finetune/progress.json").exists())
        assert re.search(r"running: process \d+ on \S+ +\d+/100000", line())
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert re.search(r"stopped; `alsace run` goes on with it +\d+/100000 *$", line())


def test_a_start_that_is_killed_is_among_the_costs(world: Path, tmp_path: Path) -> None:
    data = {"inputs": [], "splits": {}, "directory": str(world / "run/data")}
    section = {"num_steps": 100_000, "checkpoint_every_steps": 20}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data, finetune=section)
    config = tiny.write_config(tmp_path / "c.yaml", value)
    progress = tmp_path / "run/finetune/progress.json"
    for number in (signal.SIGKILL, signal.SIGTERM):
        done = json.loads(progress.read_text())["done"] if progress.exists() else 0
        with tiny.started("finetune", str(config)) as process:
            tiny.wait_for(lambda least=done: progress.exists() and json.loads(progress.read_text())["done"] > least)
            for rank in tiny.ranks_of(process) if number == signal.SIGKILL else ():
                os.kill(rank, number)
            process.send_signal(number)
            process.wait(timeout=60)
    killed, stopped = read_costs(tmp_path / "run")
    assert 1 < killed.seconds < 60 and killed.num_ranks == 2 and not killed.is_done
    assert stopped.seconds > 1 and not stopped.is_done
    assert not list((tmp_path / "run/.locks").glob("*.begun"))


def test_a_file_in_the_place_of_the_mark_of_a_start_stays(tmp_path: Path) -> None:
    mark, target = tmp_path / "finetune.begun", tmp_path / "target"
    for make in (lambda: mark.write_text("mine"), lambda: mark.symlink_to(target), mark.mkdir):
        make()
        Start(tmp_path, "finetune", mark, [], 2, 1).end(True)
        assert mark.is_symlink() or mark.is_dir() or mark.read_text() == "mine"
        assert not target.exists() and len(read_costs(tmp_path)) == 1
        (tmp_path / COSTS).unlink()
        mark.rmdir() if mark.is_dir() else mark.unlink()
    Start(tmp_path, "finetune", mark, [], 2, 1)  # killed at once
    Start(tmp_path, "finetune", mark, [], 4, 1).end(True)
    assert [(one.num_ranks, one.is_done) for one in read_costs(tmp_path)] == [(2, False), (4, True)]


def test_status_shows_warnings_and_goes_on_showing_them(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    value = tiny.make_config(world, run_dir=str(run))
    (run / "config.yaml").write_text(config_text(load_config(tiny.write_config(tmp_path / "c.yaml", value))))
    add_warning(run, "distill round 1", "step 7: rank 3 on node12 is slow")
    done = tiny.alsace("status", str(run))
    assert "distill round 1" in done.stdout and "Last warnings of " in done.stdout
    assert "distill round 1: step 7: rank 3 on node12 is slow" in done.stdout
    assert "Last warnings" not in tiny.alsace("status", str(run), "--lines=0").stdout
    command = [sys.executable, "-m", "alsace_dist", "status", str(run), "--watch", "--every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            seen = [process.stdout.readline() for _ in range(40)]  # more than it shows once
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0  # Ctrl-C is how a watch ends
        finally:
            process.kill()
    times = [line for line in seen if re.fullmatch(r"\d\d:\d\d:\d\d\n", line)]
    assert len(times) >= 2 and len(set(times)) == len(times)
    refused = tiny.alsace("status", str(run), "--watch", "--every=0", check=False)
    assert refused.returncode == 2 and "--every=0: give a second or more" in refused.stderr
