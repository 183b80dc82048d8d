"""What the tests of cases share: a small world in a directory of its own, commands in it, and what is right.

Right is, for what cannot be done: exit code 2, one ``error:`` line, which comes last, no traceback,
an end within seconds, and everything that was there still there with the same bytes.

Each file of tests is a section of a list of cases: 1 people's files, 2 silently wrong results, 3 tracebacks and other
people's errors, 4 hangs, memory, signals and streams, 5 the command line, 6 files that people bring, 7 reports of what
other tools met. Section 8, a real Slurm, is in tests/cluster. What a case cannot show in one process, and what is held
elsewhere already, the docstring of each file names with its place.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import tiny
import torch
from safetensors.torch import load_file, save_file

from alsace_dist.errors import EXIT_STOPPED, EXIT_USER_ERROR

SECONDS = 20.0  # a command that is refused has to end within them, on a machine that is busy
LONGEST = 700  # characters of an error line: paths, two values and a remedy
ON_RANKS = ("pretrain-nano", "finetune", "score", "distill")
LONG = {"num_steps": 3000, "learning_rate": 1e-3, "checkpoint_every_steps": 1000}
MOST_HASHED = 1 << 26  # bytes
CHANGES = (".locks", "submit.lock")  # what commands write into by design, whatever comes of them


class Case:
    """A directory with ``run.yaml``, ``data.jsonl`` and ``model``, all named by relative paths, and commands in it.

    ``run.yaml`` writes to ``run``, which is empty until ``finish`` puts a finished run there; ``fresh.yaml`` writes to
    ``fresh`` and reads the prepared data of ``run``, and so does ``stopped.yaml``, whose finetuning is long.
    """

    def __init__(self, directory: Path, program: forked.Forked, finished: Path) -> None:
        self.directory = directory
        self._program = program
        self._finished = finished
        for name in ("run.yaml", "fresh.yaml", "stopped.yaml", "data.jsonl"):
            shutil.copy(finished / name, directory / name)
        shutil.copytree(finished / "model", directory / "model")

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def finish(self, *parts: str) -> None:
        """Put the finished run there, or parts of it such as ``data``."""
        for part in parts or (".",):
            shutil.copytree(self._finished / "run" / part, self / "run" / part, dirs_exist_ok=True)

    def put(self, place: str, content: str = "theirs") -> Path:
        """A file of a person's."""
        path = self / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    def resize(self, vocab_size: int) -> None:
        """Give the model a vocabulary of another size; what is new has the weights of what was there."""
        path, config = self / "model/model.safetensors", self / "model/config.json"
        tensors = load_file(path)
        for name in ("shared.weight", "lm_head.weight"):
            rows = torch.arange(vocab_size) % len(tensors[name])
            tensors[name] = tensors[name][rows].contiguous()
        save_file(tensors, path, {"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": vocab_size}))

    def stop_finetuning(self) -> Path:
        """The checkpoint of a finetuning that was stopped, which ``finetune stopped.yaml`` goes on from."""
        self.finish("data")
        shutil.copytree(self._finished / "stopped", self / "stopped")
        (checkpoint,) = (self / "stopped/finetune/checkpoints").iterdir()
        return checkpoint

    def change(self, file: str = "run.yaml", **sections: Any) -> None:
        """Lay sections over a config."""
        value = tiny.yaml.safe_load((self / file).read_text(encoding="utf-8"))
        for name, section in sections.items():
            is_laid_over = isinstance(section, dict) and isinstance(value.get(name), dict)
            value[name] = {**value[name], **section} if is_laid_over else section
        tiny.write_config(self / file, value)

    def alsace(self, *words: str, **how: Any) -> forked.Done:
        """A command in the directory, with the options of ``Forked.alsace``; stages on ranks run as a rank."""
        how = {"seconds": SECONDS, "as_rank": bool(words) and words[0] in ON_RANKS} | how
        return self._program.alsace(*words, directory=self.directory, **how)

    def done(self, *words: str, **how: Any) -> forked.Done:
        """A command that has to succeed."""
        done = self.alsace(*words, **how)
        assert (done.code, done.is_late) == (0, False), done.stderr[-3000:]
        return done

    def refused(self, *words: str, says: tuple[str, ...] | str = (), code: int = EXIT_USER_ERROR, **how: Any) -> str:
        """A command that has to be refused in the right way; its line, which holds the words ``says``."""
        before = tree(self.directory)
        done = self.alsace(*words, **how)
        assert not done.is_late, f"still running after {done.seconds:.0f} s: {done.stderr[-2000:]}"
        line = error_line(done, code)
        for word in (says,) if isinstance(says, str) else says:
            assert word in line, line
        check_untouched(before, tree(self.directory))
        return line


def error_line(done: forked.Done, code: int = EXIT_USER_ERROR) -> str:
    """The one line that says what is wrong, which is the last that is said."""
    assert done.code == code, (done.code, done.stdout[-500:], done.stderr[-3000:])
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    assert len(done.errors) == 1, done.stderr[-3000:]
    line = done.stderr.rstrip("\n").split("\n")[-1]
    assert line == done.errors[0], done.stderr[-3000:]
    assert len(line) <= LONGEST, line
    assert line.isprintable(), ascii(line)
    return line


def tree(directory: Path) -> dict[str, str]:
    """Everything below a directory: path -> what it is and holds, without what commands write into by design."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if not any(part in CHANGES for part in path.parts):
            found[str(path.relative_to(directory))] = _content(path)
    return found


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        if path.stat().st_size > MOST_HASHED:
            return f"{path.stat().st_size} bytes"  # a file with a hole, which claims to be large
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "directory" if path.is_dir() else "special"


# To which every start of a stage adds a line: tests/test_comparison.
GROWING = ("run/costs.jsonl", "run/warnings.jsonl")


def check_untouched(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Nothing that was there is lost or changed; what is new is not looked at."""
    lost = sorted(before.keys() - after.keys())
    both = before.keys() & after.keys() - set(GROWING)
    changed = sorted(name for name in both if before[name] != after[name])
    assert not lost and not changed, f"lost {lost}, changed {changed}"


def sign(directory: Path) -> None:
    """Make the manifest of a directory fit the files that are there, as somebody does who knows how."""
    path = directory / "manifest.json"
    value = json.loads(path.read_text())
    for name in value["files"]:
        file = directory / name
        value["files"][name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    path.write_text(json.dumps(value))


@contextmanager
def forged(path: Path) -> Iterator[Any]:
    """A JSON file of a stage, to be changed in place and signed again."""
    value = json.loads(path.read_text())
    yield value
    path.write_text(json.dumps(value))
    sign(path.parent)


def make_finished(directory: Path, program: forked.Forked) -> None:
    """The world that cases are copies of, with its configs and a finished run."""
    tiny.write_world(directory)
    value = tiny.make_config(
        directory,
        run_dir="run",
        data={"inputs": [{"path": "data.jsonl"}]},
        model={"path": "model"},
        engine={"num_processes": 1, "timeout_seconds": 60, "hang_seconds": None},
        finetune={"num_steps": 3, "checkpoint_every_steps": 2},
        distill={"num_steps": 3, "checkpoint_every_steps": 2},
    )
    tiny.write_config(directory / "run.yaml", value)
    fresh = value | {"run_dir": "fresh", "data": {"directory": "run/data"}}
    tiny.write_config(directory / "fresh.yaml", fresh)
    for words in (["finetune"], ["score", "--round=0"], ["select"], ["distill"], ["score", "--round=1"], ["evaluate"]):
        if words == ["finetune"]:
            done = program.alsace("prepare", "run.yaml", directory=directory)
            assert done.code == 0, done.stderr
        done = program.alsace(words[0], "run.yaml", *words[1:], directory=directory, as_rank=words[0] in ON_RANKS)
        assert done.code == 0, done.stderr
    done = program.alsace("run", "run.yaml", directory=directory)
    assert done.code == 0, done.stderr
    tiny.write_config(directory / "stopped.yaml", fresh | {"run_dir": "stopped", "finetune": LONG})
    for stop_after in (2, 4, 8, 16):  # the first one may come too early, on a machine that is busy
        words = ("finetune", "stopped.yaml")
        done = program.alsace(*words, directory=directory, as_rank=True, stop_after=stop_after, seconds=60)
        assert done.code == EXIT_STOPPED, done.stderr
        if any(directory.glob("stopped/finetune/checkpoints/*/manifest.json")):
            break
