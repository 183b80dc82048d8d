"""Section 1: files of people in a run directory are never deleted, written over, or followed to another place.

``Case.refused`` looks at every file before and after. The claim on a directory is tested by itself in
tests/files/test_claim.py, the same cases behind the launcher in tests/test_pipeline.py.
"""

import os
import shutil

import pytest
from cases.case import Case, check_untouched, tree

REMEDY = "it is not alsace_dist's; move it away, or choose another run_dir"
RUN_FILES = (
    "config.yaml",
    "report.md",
    "report.html",
    "report.json",
    "report.svg",
    "bad-records.txt",
    "warnings.jsonl",
    "costs.jsonl",
)


@pytest.mark.parametrize(
    ("directory", "place", "command"),
    [
        ("data", "test/000099.tar", ["prepare"]),
        ("data", "test/notes.txt", ["prepare"]),
        ("data", "notes.txt", ["prepare"]),
        ("finetune", "model/model.safetensors", ["finetune"]),
        ("finetune", "checkpoints/step-00000001/notes.txt", ["finetune"]),
        ("scores", "unlabeled/000000.parquet", ["score", "--round=0"]),
        ("round1/selection", "teachers.json", ["select"]),
        ("round1/distill", "model/model.safetensors", ["distill"]),
        ("evaluation", "metrics.json", ["evaluate"]),
    ],
)
def test_where_a_stage_writes(case: Case, directory: str, place: str, command: list[str]) -> None:
    """Everything before the stage is done; where it would write lies what bears no mark of this program."""
    case.finish()
    shutil.rmtree(case / "run" / directory, ignore_errors=True)
    case.put(f"run/{directory}/{place}")
    case.refused(command[0], "run.yaml", *command[1:], says=(f"run/{directory}", REMEDY))


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("command", ["run", "prepare"])
def test_what_lies_in_the_run_directory_itself(case: Case, name: str, command: str) -> None:
    case.put(f"run/{name}")
    case.refused(command, "run.yaml", says=(f"run/{name}", "move it"))


def test_beside_our_files_that_have_lost_their_mark(case: Case) -> None:
    """Without its mark a directory is a person's, whatever it looks like."""
    case.finish("data", "finetune")
    (case / "run/finetune/manifest.json").unlink()
    case.put("run/finetune/model/notes.txt")
    case.refused("finetune", "run.yaml", says=("run/finetune/", REMEDY))


def test_a_model_put_by_hand_where_finetuning_writes(case: Case) -> None:
    case.finish("data")
    shutil.copytree(case / "model", case / "run/finetune/model")
    case.refused("finetune", "run.yaml", "--model.path=run/finetune/model", says=("run/finetune/model", REMEDY))


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_model_that_is_a_link(case: Case, is_begun: bool) -> None:
    """Where it leads to would be written over, also when a stop came between the mark and the model."""
    case.finish("data", "finetune")
    shutil.rmtree(case / "run/finetune/model")
    (case / "run/finetune/manifest.json").rename(case / "run/finetune/started.json")
    if not is_begun:
        shutil.rmtree(case / "run/finetune")
        (case / "run/finetune").mkdir()
    (case / "run/finetune/model").symlink_to(case / "model")
    case.refused("finetune", "run.yaml", says=("run/finetune/model: is a link to another place", REMEDY))


def test_a_checkpoint_that_is_a_link(case: Case) -> None:
    """Moved to another disk and linked back, or anybody's: old checkpoints are deleted when a training goes on."""
    case.finish("data", "finetune")
    (case / "run/finetune/manifest.json").rename(case / "run/finetune/started.json")
    case.put("mine/rank00000-00000.safetensors")
    (case / "run/finetune/checkpoints").mkdir()
    (case / "run/finetune/checkpoints/step-00000001").symlink_to(case / "mine")
    place = "run/finetune/checkpoints/step-00000001: is a link to another place"
    case.refused("finetune", "run.yaml", says=(place, REMEDY))


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_of_the_run_that_is_a_link(case: Case, name: str) -> None:
    """Also one that leads nowhere yet."""
    case.finish("data")
    (case / "run" / name).unlink(missing_ok=True)
    (case / "run" / name).symlink_to(case / "elsewhere.txt")
    case.refused("run", "run.yaml", says=(f"run/{name}: is a link, which would be written over", "remove it"))


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_lock_that_is_not_ours(case: Case, kind: str) -> None:
    """A lock is written into: through a link that would be somebody's file; a pipe would wait for ever."""
    theirs, lock = case.put("theirs.txt"), case / "run/.locks/prepare"
    lock.parent.mkdir(parents=True)
    if kind == "link":
        lock.symlink_to(theirs)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    case.refused("prepare", "run.yaml", says="run/.locks/prepare: is not the lock that alsace_dist writes; remove it")


def test_what_is_complete_stays_as_it_is(case: Case) -> None:
    """Files beside it, too."""
    case.finish()
    for place in ("notes.txt", "finetune/model/notes.txt", "data/test/000099.tar", "round1/notes.txt"):
        case.put(f"run/{place}")
    before = tree(case.directory)
    case.done("run", "run.yaml")
    reports = {f"run/{name}" for name in RUN_FILES}
    check_untouched({name: one for name, one in before.items() if name not in reports}, tree(case.directory))


@pytest.mark.parametrize(
    ("run_dir", "words"),
    [
        (" ", "is blank"),
        ("", "at least 1 character"),
        ("s3://bucket/run", "is a URL"),
        ("file:///tmp/run", "is a URL"),
        ("simplecache::run", "is a URL"),
        ("a\0b", "holds a character that no path should"),
        ("a\nb", "holds a character that no path should"),
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "longer than a path can be"),
        ("/dev/null/run", "Not a directory"),
    ],
    ids=["blank", "empty", "s3", "file", "chained", "zero", "line", "name", "path", "device"],
)
def test_run_directories_that_are_none(case: Case, run_dir: str, words: str) -> None:
    before = tree(case.directory)
    case.change(run_dir=run_dir)
    case.refused("prepare", "run.yaml", says=words)
    assert tree(case.directory).keys() == before.keys()  # nothing was made either


def test_a_run_directory_that_is_a_file(case: Case) -> None:
    case.put("run")
    case.refused("prepare", "run.yaml", says="run: File exists")


@pytest.mark.parametrize("key", ["flops_profiler", "comms_logger", "csv_monitor", "tensorboard"])
def test_deepspeed_writes_no_file_of_its_own(case: Case, key: str) -> None:
    """``flops_profiler.output_file`` is written over, wherever it is."""
    case.finish("data")
    case.put("theirs.txt")
    raw = {"enabled": True, "output_file": "theirs.txt", "output_path": "theirs.txt"}
    case.change("fresh.yaml", engine={"deepspeed": {key: raw}})
    case.refused("finetune", "fresh.yaml", says=("engine.deepspeed", "unknown key"))
