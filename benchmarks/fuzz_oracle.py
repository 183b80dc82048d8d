"""What must hold after a command, whatever it was given: success or one line, nothing lost, nothing nonsensical."""

import hashlib
import json
import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from forked import Done
from fuzz_trials import Trial
from fuzz_world import NANO_RUN, RUN, Step
from safetensors.torch import load_file

# What the program itself says on stderr: stages, their progress, the audit of prepared data, warnings, and records that
# are bad. Anything else comes from a library, and would confuse.
OWN_LINES = re.compile(
    r"(error|warning): |(prepare|pretrain-nano|finetune|score|select|distill|calibrate|evaluate)\b"
    r"|(pretrain|labeled|unlabeled|test): |stopp(ed|ing at) |Slurm is not asked: |all problems|  |.*(bad|left out)"
    r"|\S+:\d+: |\S+: only in split |\.\.\. and \d+ more "
)
STOPPED = 75
MAX_LINE = 1_000


def faults(trial: Trial, step: Step, done: Done) -> Iterator[str]:
    """What is wrong with how a command has ended."""
    if done.is_late:
        yield "hang: it was killed" + (", deaf to SIGTERM" if done.was_asked else "")
        return
    if done.was_asked and not trial.is_free:
        yield "hang: it ended only when it was asked to"
    is_asked_for = "--debug" in step.words  # which is there to show them
    for text in (done.stdout, done.stderr):
        if "Traceback" in text and not is_asked_for:
            yield "traceback"
    if "report this as a bug" in done.stderr:
        yield "a defect for which it blames itself"
    if done.code == 0 and done.errors:
        yield "an error with exit code 0"
    if done.code not in (0, 1, 2, STOPPED):
        yield f"exit code {done.code}"
    if done.code == STOPPED and not done.was_asked:
        yield "stopped, and nobody asked"
    if done.code in (1, 2):
        if len(done.errors) != 1:
            yield f"{len(done.errors)} error lines"
        elif len(done.errors[0]) > MAX_LINE:
            yield f"an error of {len(done.errors[0]):,} characters"
        if any(not line.isprintable() for line in done.errors):
            yield "an error with characters of control"
        if done.code == 1 and "out of memory" in done.stderr:
            yield "it took all memory that it was given"
    foreign = [line for line in done.stderr.splitlines() if line.strip() and not OWN_LINES.match(line)]
    if foreign and not is_asked_for and (trial.in_new_process or not trial.environment):
        yield f"foreign words: {foreign[0][:150]}"
    if done.code == 0 and trial.must_fail and (step.output or len(trial.steps) == 1):
        yield "nonsense was taken as it is"


# --- files ---------------------------------------------------------------------------------------------------------


def snapshot(world: Path) -> dict[str, str]:
    """Everything that is a person's: what lies outside the run, and in it whatever says so. Path -> identity."""
    found = {}
    for folder, names, files in os.walk(world):
        for name in [*names, *files]:
            path = Path(folder, name)
            relative = path.relative_to(world).as_posix()
            if not relative.startswith((f"{RUN}/", f"{NANO_RUN}/")) or _is_own(path):
                found[relative] = _identity(path)
    return found


def _is_own(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) and path.stat().st_size == 15 and path.read_bytes() == b"a person's own\n"


def _identity(path: Path) -> str:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(found.st_mode):
        return f"of kind {stat.S_IFMT(found.st_mode):o}"
    with path.open("rb") as file:
        return f"{found.st_size} bytes {hashlib.sha256(file.read(1 << 22)).hexdigest()}"


def lost(before: dict[str, str], after: dict[str, str], trial: Trial) -> Iterator[str]:
    """What has become of a person's files, and of places where nothing should be written."""
    for path, identity in before.items():
        if path not in after:
            yield f"lost: {path}"
        elif after[path] != identity and path != RUN:
            yield f"changed: {path}"
    new = [path for path in after.keys() - before.keys() if not path.startswith((RUN, NANO_RUN))]
    if new and not trial.is_free:
        yield f"written outside the run: {min(new)}"


def complete(run: Path) -> dict[str, str]:
    """Directories that are complete and whose files are what their manifest lists -> identity of the manifest."""
    found = {}
    for folder, _, files in os.walk(run):
        path = Path(folder, "manifest.json")
        if "manifest.json" in files and (digest := _verified(path)):
            found[str(path.parent.relative_to(run))] = digest
    return found


def _verified(manifest: Path) -> str:
    """sha256 of a manifest all of whose files verify; empty if one does not."""
    try:
        if not stat.S_ISREG(manifest.stat().st_mode) or manifest.stat().st_size > 1 << 22:
            return ""
        data = manifest.read_bytes()
        for name, entry in json.loads(data)["files"].items():
            file = manifest.parent / name
            if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size != entry["bytes"]:
                return ""
            if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                return ""
        return hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def differs(step: Step, world: Path, undisturbed: Path) -> Iterator[str]:
    """Which of the directories that a step completes are not, byte for byte, those of an undisturbed run."""
    for part in step.parts:
        name = Path(step.run, step.output, part, "manifest.json")
        files = [json.loads((one / name).read_text(encoding="utf-8"))["files"] for one in (world, undisturbed)]
        if files[0] != files[1]:
            yield f"{name.parent}: differs from that of an undisturbed run"


def too_few(run: Path, num_rows: int) -> Iterator[str]:
    """Whether prepared data has fewer texts than there were: rows that were swallowed in silence."""
    details = json.loads((run / "data/manifest.json").read_text(encoding="utf-8"))["details"]
    found = sum(sum(split["num_examples"].values()) for split in details["splits"].values())
    if found < num_rows:
        yield f"{found} texts of at least {num_rows}: the others were swallowed in silence"


# --- sense ---------------------------------------------------------------------------------------------------------


def nonsense(run: Path, before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What makes no sense in the directories that were completed since ``before``."""
    for name, digest in sorted(after.items()):
        if before.get(name) != digest and name.rpartition("/")[2].startswith("step-") is False:
            value = json.loads((run / name / "manifest.json").read_text(encoding="utf-8"))
            check = _SENSE.get(value["kind"])
            for problem in check(run / name, value) if check else ():
                yield f"{name}: {problem}"


def _scores(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    tables = [pq.read_table(directory / name) for name in manifest["files"]]
    rows = [row for table in tables for row in table.to_pylist()]
    if len(rows) != manifest["details"]["num_examples"]:
        yield f"{len(rows)} rows where the manifest says {manifest['details']['num_examples']}"
    if len({(row["key"], row["language"]) for row in rows}) != len(rows):
        yield "a row twice"
    values = np.array([row["log_probs"] for row in rows], dtype=np.float64)
    if not np.isfinite(values).all() or np.abs(np.exp(values).sum(axis=1) - 1).max() > 1e-3:
        yield "log-probabilities that are none"


def _dataset(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    names = []
    for shard in manifest["details"]["shards"]:
        with tarfile.open(directory / shard["name"]) as tar:
            members = tar.getmembers()
            records = [json.loads(tar.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
        names += [member.name for member in members]
        if len(members) != shard["num_groups"]:
            yield f"{shard['name']}: {len(members)} groups where the manifest says {shard['num_groups']}"
        texts = [text for one in records for fields in one["texts"].values() for text in fields.values()]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            yield f"{shard['name']}: a text that is none"
        if any(one["label"] not in (None, *range(len(manifest["details"]["labels"]))) for one in records):
            yield f"{shard['name']}: a label that is none"
    if len(set(names)) != len(names):
        yield "a key twice"


def _model(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for path in directory.glob("model/*.safetensors"):
        for name, tensor in load_file(path).items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                yield f"{path.name}: {name} holds what is no weight"
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        if not math.isfinite(json.loads(line).get("loss", 0)):
            yield f"metrics.jsonl: {line[:100]}"


def _selection(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    value = json.loads((directory / "teachers.json").read_text(encoding="utf-8"))
    weights = value["weights"].values()
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6 or set(value["weights"]) != set(value["teachers"]):
        yield f"weights {value['weights']}"


def _evaluation(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    value = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    for language, change in value["languages"].items():
        if not all(0 <= change[key] <= 1 for key in ("before", "after", "p_value")):
            yield f"{language}: {change}"


_SENSE = {"scores": _scores, "dataset": _dataset, "finetune": _model, "distill": _model}
_SENSE |= {"selection": _selection, "evaluation": _evaluation}
