"""Section 4: nothing waits for ever or takes all memory, and whatever becomes of a stream, the work goes on.

Elsewhere: the bounds of every read file, in tests/test_reading.py; pipes and files of a terabyte in the directory of a
model, in tests/models/test_weights.py; what the environment says of a group, and ranks that do not meet, in
tests/ranks/test_group.py; ranks that hang, in tests/ranks/test_watchdog.py; streams of a new process (``>&-``, ``|
head``), in tests/test_streams.py.
"""

import io
import os
import shutil
import signal
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cases.case import Case, sign, tree

from alsace_dist.errors import EXIT_STOPPED

FINETUNE = ("finetune", "fresh.yaml")
MEMORY = 1 << 30  # bytes that a command may take beyond what the loaded program has


def make_special(path: Path, kind: str) -> None:
    """Put something there that is read for ever, or that is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            where = os.open(path.parent, os.O_RDONLY)
            one.bind(f"/proc/self/fd/{where}/{path.name}")  # the whole path may be longer than a socket's name can be
            os.close(where)
    else:
        path.mkdir()


# --- pipes, devices, claims ----------------------------------------------------------------------------------------

# What is read -> the command that reads it, and what of a finished run is taken away so that it does.
READ: dict[str, tuple[tuple[str, ...], str]] = {
    "run.yaml": (("run", "run.yaml"), ""),
    "data.jsonl": (("prepare", "run.yaml"), "run"),
    "run/config.yaml": (("report", "run"), ""),
    "run/data/manifest.json": (("prepare", "run.yaml"), ""),
    "run/data/labeled/manifest.json": (FINETUNE, ""),
    "run/data/labeled/000000.tar": (FINETUNE, ""),
    "run/finetune/manifest.json": (("score", "run.yaml"), "run/scores"),
    "run/finetune/model/model-00001-of-00001.safetensors": (("score", "run.yaml"), "run/scores"),
    "run/scores/unlabeled/000000.parquet": (("select", "run.yaml"), "run/round1/selection"),
    "run/round1/selection/teachers.json": (("distill", "run.yaml"), "run/round1/distill"),
    "run/evaluation/metrics.json": (("report", "run"), ""),
    "model/config.json": (FINETUNE, ""),
    "model/tokenizer.json": (FINETUNE, ""),
    "model/model.safetensors": (FINETUNE, ""),
    "site.yaml": (("submit", "run.yaml", "--cluster=site.yaml", "--dry-run"), ""),
}


@pytest.mark.parametrize("kind", ["pipe", "zeros", "directory"])
@pytest.mark.parametrize("place", READ)
def test_what_is_no_regular_file_is_not_read(case: Case, place: str, kind: str) -> None:
    words, made = READ[place]
    case.finish()
    if made:
        shutil.rmtree(case / made)
    make_special(case / place, kind)
    case.refused(*words, says=place, seconds=10, most_bytes=MEMORY)


@pytest.mark.parametrize("place", ["run.yaml", "data.jsonl", "run/data/labeled/000000.tar"])
def test_a_socket_is_not_read(case: Case, place: str) -> None:
    words, made = READ[place]
    case.finish()
    if made:
        shutil.rmtree(case / made)
    make_special(case / place, "socket")
    case.refused(*words, says=place)


@pytest.mark.parametrize(
    "place", ["run.yaml", "run/data/labeled/manifest.json", "run/data/labeled/000000.tar", "model/config.json"]
)
def test_a_file_of_a_terabyte_is_not_read(case: Case, place: str) -> None:
    """It is a hole, and takes no room on the disk."""
    words, _ = READ[place]
    case.finish()
    with (case / place).open("r+b") as file:
        file.truncate(1 << 40)
    case.refused(*words, says=place, seconds=10, most_bytes=MEMORY)


def test_a_member_of_a_tar_that_claims_ten_gigabytes(case: Case) -> None:
    case.finish("data")
    path = case / "run/data/labeled/000000.tar"
    info = tarfile.TarInfo("g1.json")
    info.size = 10 << 30
    path.write_bytes(info.tobuf() + b"{" * 1024)
    sign(path.parent)
    case.refused(*FINETUNE, says="run/data/labeled/000000.tar", most_bytes=MEMORY)


def test_a_tar_of_empty_directories_and_links(case: Case) -> None:
    case.finish("data")
    path = case / "run/data/labeled/000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("g1.json", tarfile.SYMTYPE), ("g2.json", tarfile.CHRTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
    sign(path.parent)
    case.refused(*FINETUNE, says="run/data/labeled/000000.tar")


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
def test_an_input_that_never_ends(case: Case, name: str) -> None:
    make_special(case / name, "zeros")
    kind = "jsonl" if name.endswith("jsonl") else "table"
    case.change(data={"inputs": [{"path": name, "kind": kind}]})
    case.refused("prepare", "run.yaml", says=(f"data.inputs.path: {name}: ", "pipe or a device"), most_bytes=MEMORY)


# --- settings that would take for ever -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"finetune": {"global_batch_size": 10**9}}, "global_batch_size: 1,000,000,000 for 40 examples"),
        ({"finetune": {"num_steps": None, "num_epochs": 1e300}}, "num_epochs: 1e+300 are"),
        ({"finetune": {"num_steps": 10**9}}, "finetune.num_steps: "),
        ({"finetune": {"shots": 10**9}}, "finetune.shots: 3000000000 labeled groups asked for"),
        ({"engine": {"num_threads": 4096}}, "engine.num_threads: 4096"),
        ({"engine": {"num_threads": 10**9}}, "engine.num_threads: "),
        ({"engine": {"zero_stage": 3, "deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}}},
         "offload_param.device: "),
        ({"engine": {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}},
         "use engine.offload_optimizer"),
        ({"engine": {"deepspeed": {"zero_optimization": {"offload_optimizer": {"nvme_path": "/nowhere"}}}}},
         "use engine.offload_optimizer"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_training_that_nobody_waits_for(case: Case, sections: dict[str, Any], words: str) -> None:
    case.finish("data")
    case.change("fresh.yaml", **sections)
    case.refused(*FINETUNE, says=words, most_bytes=MEMORY)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("--engine.num_processes=4000", "engine.num_processes: 4000 ranks on a machine of "),
        ("--engine.num_processes=1000000000", "engine.num_processes: 1000000000 ranks"),
        ("--engine.num_threads=4000", "engine.num_threads: 4000 for a rank"),
    ],
)
def test_more_than_the_machine_holds_starts_nothing(case: Case, setting: str, words: str) -> None:
    case.finish("data")
    case.refused(*FINETUNE, setting, says=words, as_rank=False)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.inputs", [{"kind": "demo", "num_groups": 10**9}], "num_groups"),
        ("data.groups_per_shard", 10**30, "data.groups_per_shard: "),
        ("rounds", 10**9, "rounds: "),
        ("evaluate.num_resamples", 10**12, "evaluate.num_resamples: "),
        ("task.max_tokens", 10**12, "task.max_tokens: "),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, str) else None,
)
def test_a_number_that_would_take_for_ever(case: Case, key: str, value: Any, words: str) -> None:
    section, _, name = key.partition(".")
    case.change(**{section: {name: value} if name else value})
    case.refused("run", "run.yaml", says=words, as_rank=False, most_bytes=MEMORY)


# --- what an earlier job has left in the environment ---------------------------------------------------------------


GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SOON = ("--engine.timeout_seconds=1", "--engine.hang_seconds=null")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({}, ("have not met at 127.0.0.1:29511", "unset RANK")),
        ({"RANK": "1"}, ("have not met at", "Connection refused")),
        ({"MASTER_ADDR": "nowhere.invalid"}, ("have not met at nowhere.invalid", "unset")),
        ({"RANK": "1", "MASTER_ADDR": ""}, ("MASTER_ADDR",)),
        ({"MASTER_PORT": "abc"}, ("MASTER_PORT='abc' in the environment is no number",)),
        ({"MASTER_PORT": ""}, ("MASTER_PORT='' in the environment is no number",)),
        ({"MASTER_PORT": "99999"}, ("MASTER_PORT=99999", "ports end at 65,535")),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE='two'",)),
        ({"WORLD_SIZE": "0"}, ("RANK=0 and WORLD_SIZE=0",)),
        ({"RANK": "-1"}, ("RANK='-1'",)),
        ({"RANK": "5"}, ("RANK=5 and WORLD_SIZE=2",)),
        ({"LOCAL_RANK": "x"}, ("LOCAL_RANK='x'",)),
        ({"WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "nonsense0"}, ("GLOO_SOCKET_IFNAME",)),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_a_group_that_is_none(case: Case, place: dict[str, str], words: tuple[str, ...]) -> None:
    case.finish("data")
    case.refused(*FINETUNE, *SOON, says=words, as_rank=False, environment=GROUP | {"LOCAL_RANK": "0"} | place)


def test_a_port_that_is_taken(case: Case) -> None:
    case.finish("data")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = GROUP | {"WORLD_SIZE": "1", "MASTER_PORT": port}
        case.refused(*FINETUNE, *SOON, says=f"127.0.0.1:{port}", as_rank=False, environment=place)


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"},
        {"RANK": "x", "WORLD_SIZE": "", "LOCAL_RANK": "y"},
        {"ALSACE_NUM_NODES": "2", "ALSACE_NODE_RANK": "1"},
        {"ALSACE_ERROR_DIR": "/nowhere", "GLOO_SOCKET_IFNAME": "nonsense0"},
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_left_in_the_environment_does_not_matter(case: Case, left: dict[str, str]) -> None:
    """To a stage of one process, and to the launcher, which has not come to start anything here."""
    case.done("prepare", "run.yaml", environment=left)
    case.refused(*FINETUNE, "--engine.num_processes=4000", says="4000", as_rank=False, environment=left)


def test_the_directory_of_a_job_that_is_gone(case: Case) -> None:
    """On several nodes each would take itself for the only one."""
    case.finish("data")
    left = {"ALSACE_ATTEMPT_DIR": "/nowhere", "ALSACE_NUM_NODES": "2"}
    case.refused(*FINETUNE, says="ALSACE_ATTEMPT_DIR=/nowhere in the environment", as_rank=False, environment=left)


def test_a_group_that_does_not_meet_hears_a_signal(case: Case) -> None:
    case.finish("data")
    done = case.alsace(*FINETUNE, as_rank=False, environment=GROUP, stop_after=1)
    assert done.code == EXIT_STOPPED, done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped on request"), done.stderr
    assert not done.errors


# --- streams -------------------------------------------------------------------------------------------------------

FULL = "/dev/full"


@pytest.mark.parametrize(
    "streams",
    [{1: "closed"}, {2: "closed"}, {1: "closed", 2: "closed"}, {0: "closed"}, {1: "broken"}, {1: "broken", 2: "broken"},
     {1: FULL}, {2: FULL}, {1: FULL, 2: FULL}, {0: "closed", 1: "closed", 2: "closed"}],
    ids=str,
)  # fmt: skip
def test_work_that_nobody_hears_of_is_done(case: Case, streams: dict[int, str]) -> None:
    """The words of a closed stream end up in no file either."""
    case.done("prepare", "run.yaml")
    expected = {name: one for name, one in tree(case / "run/data").items() if name.endswith(".tar")}
    shutil.rmtree(case / "run")
    done = case.alsace("prepare", "run.yaml", streams=streams)
    assert done.code == 0, done.stderr
    assert {name: one for name, one in tree(case / "run/data").items() if name.endswith(".tar")} == expected
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "streams", [{1: "closed"}, {2: "closed"}, {1: "broken", 2: "broken"}, {1: FULL, 2: FULL}], ids=str
)
def test_a_mistake_that_nobody_hears_of_keeps_its_exit_code(case: Case, streams: dict[int, str]) -> None:
    done = case.alsace("rnu", streams=streams)
    assert done.code == 2
    assert done.stderr in ("", "error: 'rnu' is no command; did you mean run? `alsace --help` lists them\n")


@pytest.mark.parametrize("streams", [{1: "closed"}, {1: "broken"}, {1: FULL}], ids=str)
def test_training_and_reports_do_not_need_a_reader(case: Case, streams: dict[int, str]) -> None:
    case.finish()
    assert case.alsace("report", "run", streams=streams).code == 0
    assert case.alsace(*FINETUNE, streams=streams | {2: streams[1]}).code == 0
    assert (case / "fresh/finetune/manifest.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_an_encoding_that_lacks_letters_is_no_reason_to_end(case: Case, encoding: str) -> None:
    case.finish()
    done = case.alsace("report", "run", environment={"PYTHONIOENCODING": encoding})
    assert (done.code, done.stderr.strip("\ufffd\0")) == (0, "")
    assert case.alsace("größe", environment={"PYTHONIOENCODING": encoding}).code == 2


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGHUP], [signal.SIGINT] * 5, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], [signal.SIGUSR2] * 3],
    ids=lambda value: " ".join(one.name for one in value),
)
def test_a_training_that_is_asked_to_stop_says_so_and_goes_on_later(case: Case, signals: list[signal.Signals]) -> None:
    case.stop_finetuning()
    for stop_after in (1.5, 3, 6):  # the first one may come before it trains, on a machine that is busy
        done = case.alsace("finetune", "stopped.yaml", stop_after=stop_after, signals=signals, seconds=40)
        if done.is_late:  # once in hundreds of starts; one that hangs does so at every time of the signal
            continue
        assert done.code == EXIT_STOPPED, (done.code, done.stderr)
        assert "Traceback" not in done.stderr and not done.errors, done.stderr
        if "finetune: stopped after step" in done.stderr.splitlines()[-1]:
            return
    pytest.fail(done.stderr)
