"""The command line from parallel text to the report, as a user runs it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny

from alsace_dist import commands
from alsace_dist.errors import EXIT_STOPPED, STOPPED


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, and two variants: the paper's rule, and calibration without distillation."""
    directory = tmp_path_factory.mktemp("pipeline")
    config = tiny.make_config(
        world,
        run_dir=str(directory / "run"),
        engine={"num_processes": 1},
        rounds=2,
        variants={
            "paper": {"method": "paper", "rounds": 1},
            "calibration": {"rounds": 0, "evaluate": {"calibrate": True}},
        },
    )
    path = tiny.write_config(directory / "c.yaml", config)
    tiny.run_all(path)
    done = tiny.alsace("run", str(path), timeout=300)  # everything is complete: it is skipped, and reported
    (directory / "printed").write_text(done.stdout)
    return directory


def test_the_report_has_every_variant(finished: Path) -> None:
    report = json.loads((finished / "run/report.json").read_text())
    assert set(report["languages"]) == set(tiny.LANGUAGES)
    assert set(report["variants"]) == {"paper", "calibration"}
    assert report["languages"]["en"]["num_examples"] == 30
    before = {name: row["before"] for name, row in report["languages"].items()}
    for variant in report["variants"].values():  # all start from the same finetuned model and its scores
        assert {name: row["before"] for name, row in variant["languages"].items()} == before
    assert report["variants"]["calibration"]["teachers"] == []
    printed = (finished / "printed").read_text()
    assert "Average" in printed
    assert "report.html" in printed


def test_a_second_run_skips_everything(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("manifest.json")}
    done = tiny.alsace("run", str(finished / "c.yaml"))
    stages = [line for line in done.stderr.splitlines() if line]
    assert len(stages) == 16
    assert all(line.endswith("complete, skipped") for line in stages), done.stderr
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("manifest.json")} == before


def test_the_resolved_config_is_kept_and_says_everything(finished: Path) -> None:
    value = tiny.yaml.safe_load((finished / "run/config.yaml").read_text())
    assert value["select"]["calibration"] == "marginal"
    assert value["distill"]["targets"] is not None


def test_dry_run_says_what_is_done_and_what_is_to_do(finished: Path) -> None:
    plain = tiny.alsace("run", str(finished / "c.yaml"), "--dry-run").stdout
    assert "complete  finetune" in plain
    assert "to do" not in plain
    changed = tiny.alsace("run", str(finished / "c.yaml"), "--dry-run", "--distill.learning_rate=0.5").stdout
    assert "refused" in changed
    assert "learning_rate: 0.001 -> 0.5" in changed


def test_dry_run_asks_no_hub_for_a_model(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), model={"path": "nobody/has-such-a-model"})
    printed = tiny.alsace("run", str(tiny.write_config(tmp_path / "c.yaml", value)), "--dry-run").stdout
    assert [line.split(maxsplit=2)[:2] for line in printed.splitlines()] == [["to", "do"]] * len(printed.splitlines())
    assert "finetune" in printed


def test_a_deleted_stage_is_made_again_the_same(finished: Path) -> None:
    metrics = finished / "run/evaluation/metrics.json"
    content = metrics.read_bytes()
    (finished / "run/evaluation/manifest.json").unlink()
    metrics.unlink()
    tiny.alsace("evaluate", str(finished / "c.yaml"))
    assert metrics.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "{dir}/absent.yaml"], "absent.yaml: no such file"),
        (
            ["run", "{dir}/c.yaml", "--distil.rate=1"],
            "--distil.rate is no flag of run and no setting; did you mean --distill?",
        ),
        (["distill", "{dir}/c.yaml", "--round=7"], "has no stage 'distill' with round 7"),
        (["score", "{dir}/c.yaml", "--variant=other"], "--variant=other"),
        (["report", "{dir}"], "give the directory of a run"),
        (["plan", "{dir}/c.yaml", "--num-processes=all"], "--num-processes=all: give a whole number"),
        (["score", "{dir}/c.yaml", "--round=one"], "--round=one: give a whole number"),
        (["doctor", "--foo=3"], "doctor: --foo is no flag of doctor"),
        (["rnu", "{dir}/c.yaml"], "'rnu' is no command; did you mean run?"),
        (["run"], "run: needs CONFIG; for example: alsace run"),
        (["run", "{dir}/c.yaml", "--debgu"], "did you mean --debug?"),
        (["run", "{dir}/c.yaml", "--dry-run", "--dry-run"], "--dry-run is given twice"),
        (["run", "{dir}/c.yaml", "--seed"], "--seed needs a value"),
        (["run", "{dir}/c.yaml", "--", "--interactive"], "'--' is no flag"),
        (["__class__"], "'__class__' is no command"),
        (["cancel", "/nowhere"], "/nowhere: is not the directory of a run"),
        (["init", "xnil"], "init: 'xnil' is not there"),
        (["submit", "{dir}/c.yaml"], "submit: needs --cluster=..."),
        (["run", "{dir}/c.yaml", "--distill.learning-rate=1"], "distill.learning-rate: unknown key"),
        (["run", "{dir}/c.yaml", "--dry-run=maybe"], "--dry-run=maybe: give true or false"),
    ],
)
def test_a_mistake_is_one_line(finished: Path, arguments: list[str], words: str) -> None:
    failed = tiny.alsace(*[argument.format(dir=finished) for argument in arguments], check=False)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert failed.stderr.startswith("error: ")
    assert words in failed.stderr


def test_words_that_no_command_knows_start_nothing(world: Path, tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, run_dir=str(tmp_path / "run")))
    failed = tiny.alsace("run", str(path), "dry-run", check=False)
    assert failed.returncode == 2
    assert "run: 'dry-run' is one word too many" in failed.stderr
    assert not (tmp_path / "run").exists()


def test_values_are_taken_as_they_are_typed(world: Path, tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c#1.yaml", tiny.make_config(world))
    for name in ("exp#1", "1e3", "{x}", "a b"):
        tiny.alsace("prepare", str(path), f"--run_dir={tmp_path / name}", "--task.template={text}")
        assert (tmp_path / name / "data/manifest.json").exists()
    value = tiny.yaml.safe_load(path.read_text()) | {
        "run_dir": str(tmp_path / "run"),
        "variants": {"1e-3": {"rounds": 2}},
    }
    tiny.write_config(path, value)
    failed = tiny.alsace("evaluate", str(path), "--variant=1e-3", check=False)
    assert "not complete" in failed.stderr  # so the variant was found


def test_keys_are_taken_as_they_are_typed(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), variants={"my-v": {"rounds": 1}})
    path = tiny.write_config(tmp_path / "c.yaml", value)
    tiny.alsace("prepare", str(path), "--variants.my-v.rounds=2", "--variants.new-v.rounds=3")
    resolved = tiny.yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["variants"] == {"my-v": {"rounds": 2}, "new-v": {"rounds": 3}}


def test_falsy_mappings_on_the_command_line_are_mappings(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"))
    path = tiny.write_config(tmp_path / "c.yaml", value)
    tiny.alsace("prepare", str(path), "--evaluate={calibrate: false}", "--variants={}")
    resolved = tiny.yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["evaluate"]["calibrate"] is False and resolved["variants"] == {}


def test_version_and_init(tmp_path: Path) -> None:
    assert tiny.alsace("--version").stdout.startswith("alsace_dist ")
    assert len(commands.PRESETS) == len(list((Path(commands.__file__).parent / "presets").glob("*.yaml")))
    for task in commands.PRESETS:
        (tmp_path / f"{task}.yaml").write_text(tiny.alsace("init", task).stdout)
        assert tiny.yaml.safe_load((tmp_path / f"{task}.yaml").read_text())["task"]["template"]
    written = tmp_path / "written.yaml"
    tiny.alsace("init", "xnli", str(written))
    assert written.read_text() == (tmp_path / "xnli.yaml").read_text()
    refused = tiny.alsace("init", "demo", str(written), check=False)
    assert refused.returncode == 2
    assert refused.stderr == f"error: init: {written}: is there already; give another name\n"
    assert written.read_text() == (tmp_path / "xnli.yaml").read_text()


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("data/test/000099.tar", "theirs"),
        ("finetune/model/model.safetensors", "theirs"),
        ("report.md", "theirs"),
        ("bad-records.txt", "theirs"),
        ("config.yaml", "run_dir: elsewhere\n"),
        ("scores/test/000000.parquet", "theirs"),
    ],
)
def test_what_a_person_has_put_into_the_run_directory_is_left_alone(
    world: Path, tmp_path: Path, place: str, content: str
) -> None:
    """Never remove or write over what this program has not marked as its own."""
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, run_dir=str(tmp_path / "run")))
    theirs = tmp_path / "run" / place
    theirs.parent.mkdir(parents=True)
    theirs.write_text(content)
    failed = tiny.alsace("run", str(path), check=False)
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(tmp_path / "run") in last and "Traceback" not in failed.stderr
    assert theirs.read_text() == content


@pytest.mark.parametrize("run_dir", [" ", "s3://bucket/run"])
def test_a_run_is_written_to_a_directory(world: Path, tmp_path: Path, run_dir: str) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, run_dir=run_dir))
    failed = tiny.alsace("prepare", str(path), check=False)
    assert failed.returncode == 2 and "run_dir: " in failed.stderr


@pytest.mark.parametrize("command", ["doctor", "demo", "run", "submit"])
def test_help_is_all_that_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = tiny.alsace(command, "--help")
    assert f"alsace {command}" in done.stdout and "example: " in done.stdout
    assert "--debug" in done.stdout and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_calibration_can_be_done_stage_by_stage(finished: Path) -> None:
    printed = tiny.alsace("calibrate", str(finished / "c.yaml"), "--variant=calibration").stderr
    assert printed.strip() == "calibrate (calibration): complete, skipped"


def test_a_refused_command_leaves_the_config_as_it_was(finished: Path) -> None:
    before = (finished / "run/config.yaml").read_bytes()
    for command in ("prepare", "evaluate", "run"):
        failed = tiny.alsace(command, str(finished / "c.yaml"), "--seed=5", check=False)
        assert failed.returncode == 2
        assert "seed: 0 -> 5" in failed.stderr
        assert (finished / "run/config.yaml").read_bytes() == before


def test_a_persons_yaml_is_not_written_over(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(world, run_dir=str(tmp_path / "own"))
    path = tiny.write_config(tmp_path / "own/config.yaml", value)
    before = path.read_bytes()
    failed = tiny.alsace("prepare", str(path), check=False)
    assert failed.returncode == 2
    assert "lies where the run's resolved config goes; move it out of run_dir" in failed.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_outside_a_group_is_like_one_inside(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    """``prepare`` has no ranks that agree: it ends at once, and is begun anew."""
    tiny.write_data(tmp_path / "many.jsonl", 100_000)  # seconds of work
    data = {"inputs": [{"path": str(tmp_path / "many.jsonl")}]}
    config = tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data)
    path = tiny.write_config(tmp_path / "config.yaml", config)
    with tiny.started("prepare", str(path)) as process:
        tiny.wait_for((tmp_path / "run/config.yaml").exists)
        process.send_signal(number)
        assert process.wait(timeout=60) == EXIT_STOPPED
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == STOPPED
    assert not list((tmp_path / "run").glob("data/*/manifest.json"))


def test_mended_data_is_prepared_by_the_same_command(world: Path, tmp_path: Path) -> None:
    lines = (world / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    data = {"inputs": [{"path": str(tmp_path / "data.jsonl")}]}
    path = tiny.write_config(tmp_path / "c.yaml", tiny.make_config(world, run_dir=str(tmp_path / "run"), data=data))
    failed = tiny.alsace("prepare", str(path), check=False)
    assert failed.returncode == 2
    assert "1 broken JSON" in failed.stderr
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    tiny.alsace("prepare", str(path))
    assert (tmp_path / "run/data/manifest.json").exists()


def test_nothing_of_the_environment_is_printed(finished: Path) -> None:
    import subprocess
    import sys

    secret = "hunter2-not-to-be-seen"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "alsace_dist",
            "finetune",
            str(finished / "c.yaml"),
            "--finetune.num_steps=1",
            "--debug",
        ],
        env=tiny.environment() | {"HF_TOKEN": secret, "ALSACE_PASSWORD": secret},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2  # refused, as the run holds another finetuning
    assert "Traceback" in done.stderr
    assert secret not in done.stdout + done.stderr
    for path in (finished / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def flip_a_bit(path: Path) -> None:
    """In the middle of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damaged", "command"),
    [
        ("scores/unlabeled/000000.parquet", ["select", "--round=1"]),
        ("scores/unlabeled/000000.parquet", ["distill", "--round=1"]),
        ("round1/selection/teachers.json", ["distill", "--round=1"]),
        ("finetune/model/model.safetensors", ["score", "--round=0"]),
        ("evaluation/metrics.json", ["report"]),
    ],
)
def test_no_stage_goes_on_from_a_damaged_file(finished: Path, tmp_path: Path, damaged: str, command: list[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    for output in {"select": ["round1"], "distill": ["round1/distill"], "score": ["scores"], "report": []}[command[0]]:
        shutil.rmtree(run / output)
    flip_a_bit(run / damaged)
    arguments = (
        [command[0], str(run)] if command == ["report"] else [command[0], str(run / "config.yaml"), *command[1:]]
    )
    failed = tiny.alsace(*arguments, *([f"--run_dir={run}"] if command != ["report"] else []), check=False)
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {run / damaged}: content differs from the sha256 in manifest.json; restore it"), (
        last
    )
    assert "Traceback" not in failed.stderr


def test_a_second_run_in_the_same_directory_is_refused_and_harms_nothing(world: Path, tmp_path: Path) -> None:
    steps = {"num_steps": 300, "checkpoint_every_steps": 2, "log_every_steps": 1}
    data = {"directory": str(world / "run/data")}
    value = tiny.make_config(world, run_dir=str(tmp_path / "run"), finetune=steps, data=data)
    path = tiny.write_config(tmp_path / "c.yaml", value)
    with tiny.started("finetune", str(path)) as first:
        tiny.wait_for(lambda: any(tmp_path.glob("run/finetune/checkpoints/*/manifest.json")))
        os.kill(first.pid, signal.SIGSTOP)  # the launcher alone: its ranks work on
        for rank in tiny.ranks_of(first):
            os.kill(rank, signal.SIGSTOP)
        try:
            second = tiny.alsace("finetune", str(path), check=False)
        finally:
            for process in [*tiny.ranks_of(first), first.pid]:
                os.kill(process, signal.SIGCONT)
        assert second.returncode == 2
        last = second.stderr.strip().splitlines()[-1]
        assert last.startswith("error: finetune: process ") and last.endswith(
            "works on it; wait for that one, or stop it"
        )
        assert first.wait(timeout=120) == 0
    rows = (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 301))


def test_without_any_training_the_report_names_the_given_model(world: Path, tmp_path: Path) -> None:
    value = tiny.make_config(
        world,
        run_dir=str(tmp_path / "run"),
        finetune=None,
        rounds=0,
        evaluate={"calibrate": True},
        engine={"num_processes": 1},
    )
    done = tiny.alsace("run", str(tiny.write_config(tmp_path / "c.yaml", value)))
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("model "))
    assert line.split() == ["model", str(world / "model")]
