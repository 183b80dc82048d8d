"""What the environment says of a group is believed only as far as it holds, and nothing of it hangs or is executed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from alsace_dist.config import EngineConfig
from alsace_dist.errors import UserError
from alsace_dist.ranks import failures, group, job, launcher


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    """A run that scores the world's model on its prepared data."""
    value = tiny.make_config(
        world, run_dir=str(tmp_path / "run"), data={"directory": str(world / "run/data")}, finetune=None
    )
    return tiny.write_config(tmp_path / "c.yaml", value)


def run(directory: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "alsace_dist", *arguments]
    return subprocess.run(
        command,
        cwd=directory,
        env=tiny.environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_nothing_of_the_working_directory_is_imported(config: Path, tmp_path: Path) -> None:
    """Neither by the launcher nor by the ranks, which a person starts from a directory full of scripts."""
    here = tmp_path / "scripts"
    (here / "alsace_dist").mkdir(parents=True)
    names = ["random.py", "yaml.py", "tokenizers.py", "torch.py", "alsace_dist/__init__.py", "alsace_dist/cli.py"]
    for name in names:
        (here / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    command = "import sys; sys.path.remove(''); from alsace_dist.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "score", str(config)],
        cwd=here,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "executed").exists()
    assert (tmp_path / "run/scores/test/manifest.json").exists()


def test_python_m_imports_nothing_of_it_either(tmp_path: Path) -> None:
    for name in ("random.py", "yaml.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(7)\n")
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout[:12]) == (0, "alsace_dist "), done.stderr


def test_what_an_earlier_job_has_left_does_not_matter(config: Path, tmp_path: Path) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "2", "ALSACE_NUM_NODES": "2", "GLOO_SOCKET_IFNAME": "nonsense0"}
    done = run(tmp_path, "score", str(config), **left)
    assert done.returncode == 0, done.stderr[-2000:]


GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


def test_a_group_that_does_not_meet_ends_with_the_remedy(config: Path, tmp_path: Path) -> None:
    flags = ("--engine.timeout_seconds=3", "--engine.hang_seconds=null")
    done = run(tmp_path, "score", str(config), *flags, **GROUP)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "error: the 2 ranks that RANK and WORLD_SIZE speak of have not met at 127.0.0.1:29517 within 3 s"
    )
    assert "unset RANK" in line


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"RANK": "1"}, "Connection refused"),
        ({"RANK": "0", "MASTER_ADDR": "nowhere.invalid"}, "Name or service not known"),
        ({"RANK": "1", "MASTER_ADDR": "nowhere.invalid"}, "Name or service not known"),
    ],
)
def test_a_place_that_is_not_there_is_one_line_without_stacks(
    config: Path, tmp_path: Path, place: dict[str, str], reason: str
) -> None:
    flags = ("--engine.timeout_seconds=2", "--engine.hang_seconds=null")
    done = run(tmp_path, "score", str(config), *flags, **GROUP | place)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the 2 ranks that RANK and WORLD_SIZE speak of have not met at ")
    assert reason in line


def test_a_group_that_does_not_meet_hears_a_signal(config: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "alsace_dist", "score", str(config)],
        env=tiny.environment() | GROUP | {"MASTER_PORT": "29518"},
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(8)  # until it waits for the other rank; before that it stops at once, too
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


@pytest.mark.parametrize("port", ["abc", "-1", ""])
def test_a_port_that_is_no_number_is_named(config: Path, tmp_path: Path, port: str) -> None:
    done = run(tmp_path, "score", str(config), **GROUP | {"MASTER_PORT": port})
    assert done.returncode == 2
    assert f"error: MASTER_PORT={port!r} in the environment is no number" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "one"),
        ("LOCAL_RANK", "-1"),
        (job.NUM_NODES, "abc"),
        (job.RANKS_PER_NODE, ""),
        (job.LEAD_SECONDS, "soon"),
        (job.NODE_RANK, "9" * 30),
    ],
)
def test_a_variable_that_is_no_number_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}='{value}' in the environment is no number; .* unset it") as caught:
        job.number(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("GLOO_SOCKET_IFNAME", "nonsense0"), ("RANK", "1"), ("MASTER_PORT", "99999")]
)
def test_a_group_that_cannot_be_made_is_one_line(config: Path, tmp_path: Path, name: str, value: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = ("--engine.timeout_seconds=3", "--engine.hang_seconds=null")
    done = run(tmp_path, "score", str(config), *flags, **place | {name: value})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert name in line


def test_errors_are_left_for_a_launcher_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for place, found in ((tmp_path, tmp_path), (tmp_path / "gone", None), ("", None)):
        monkeypatch.setenv(failures.ERROR_DIR, str(place))
        assert failures.error_directory() == found
        failures.record_failure(UserError("a mistake"))
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.json"]


def test_the_directory_of_a_job_that_is_gone_is_said_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several nodes each would take itself for the only one."""
    monkeypatch.setenv(job.NUM_NODES, "2")
    for place, num_nodes in ((tmp_path, 2), ("", 1)):
        monkeypatch.setenv(job.ATTEMPT_DIR, str(place))
        assert job.num_nodes() == num_nodes
    monkeypatch.setenv(job.ATTEMPT_DIR, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=f"{job.ATTEMPT_DIR}=.*gone in the environment is no directory"):
        job.num_nodes()
    job.note_position("here")
    assert not (tmp_path / "gone").exists()


def test_run_under_torchrun_is_refused(config: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "run", str(config), **GROUP)
    assert done.returncode == 2
    assert "run starts its ranks itself" in done.stderr


def test_rank_and_world_size_alone_make_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not failures.in_group()
    monkeypatch.setenv("ALSACE_NUM_NODES", "4")
    assert job.num_nodes() == 1  # outside a job


@pytest.mark.parametrize("settings", [{"num_processes": 4000}, {"num_threads": 4000}])
def test_more_than_the_machine_has_is_refused(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(job.ATTEMPT_DIR, raising=False)
    with pytest.raises(UserError, match=rf"engine\.{next(iter(settings))}: 4000 .* cores"):
        launcher.check_room(EngineConfig.model_validate(settings))


def test_threads_follow_the_cores_beside_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = EngineConfig()
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    for cores, local, expected in ((96, "8", 12), (96, "", 12), (12, "", 12), (4, "8", 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv("LOCAL_WORLD_SIZE", False)
        assert group.threads_of(auto, 8) == expected
        assert group.threads_of(auto, 0) == 1
        assert group.threads_of(EngineConfig(num_threads=3), 8) == 3


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    others = {number: signal.getsignal(number) for number in group.STOP_SIGNALS}
    try:
        flag = group.StopFlag()
        flag.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not flag.is_set
    finally:
        for number, handler in others.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGHUP, before)
