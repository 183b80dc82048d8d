"""Checkpoints: every layout loads what every other has saved; and nothing that no training has left is loaded."""

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alsace_dist.config import DistillConfig, EngineConfig, TaskConfig
from alsace_dist.data.rows import Example, Part, Row, answers_of
from alsace_dist.errors import PeerFailed, UserError
from alsace_dist.files.manifest import Manifest, load_manifest, verify_files
from alsace_dist.models.family import Family, open_model
from alsace_dist.ranks.group import Ranks
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training import checkpoint, engine
from alsace_dist.training.losses import FrozenTargetLoss
from alsace_dist.training.saving import Saver
from alsace_dist.training.state import MOMENTS
from alsace_dist.training.tensor_file import write_tensors

# ZeRO stage and dtype of those that save and load. Between them are all of DeepSpeed's optimizers.
LAYOUTS = [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
ADAFACTOR = (0, "fp32")
FINGERPRINT = {"made": "here"}


def load(group: Ranks, world: str, stage: int, dtype: str) -> tuple[engine.TrainEngine, Family]:
    """A train engine over the small mT5."""
    answers = answers_of(TaskConfig(fields=["text"], template="{text}", labels=tiny.LABELS), ["en"])
    model = open_model(Path(world) / "model", answers)
    config = EngineConfig(zero_stage=stage, dtype=dtype)
    optimizer = "adafactor" if (stage, dtype) == ADAFACTOR else "adamw"
    section = DistillConfig(num_steps=3, global_batch_size=6, learning_rate=1e-2, optimizer=optimizer)
    return engine.TrainEngine(engine.load_module(model, 0.0, config, group), config, section, group), model


def take_step(trained: engine.TrainEngine, model: Family, group: Ranks) -> None:
    words, answers = tiny.WORDS["en"], model.answers.fixed["en"]
    rows = [Row(f"g{number}", "en", None, (Part(" ".join(words[:number]), True),), answers) for number in range(1, 7)]
    target = torch.tensor([0.7, 0.2, 0.1]).numpy()
    mine = [Example(row, target, 1.0, 0.1) for row in model.encode(rows)][group.rank :: group.world_size]
    loss = FrozenTargetLoss(model.collate([one.row for one in mine]), mine, group.device)
    trained.step([loss], 1e-2)


def saver(trained: engine.TrainEngine, directory: str, group: Ranks, keep: int = 9) -> Saver:
    watchdog = Watchdog(group, Path(directory), None)
    return Saver(Path(directory), trained, FINGERPRINT, keep, watchdog, lambda *_: None, max_bytes=20_000)


def saved_twice(group: Ranks, world: str, out: str) -> tuple[bool, list[str]]:
    """Whether the files of a checkpoint stay as they are when it is asked for again; the checkpoints there are."""
    trained, model = load(group, world, 1, "fp32")
    trained.load_initial(model)
    keeper = saver(trained, out, group, keep=1)
    for step in (1, 2):
        keeper.begin(step)
    keeper.finish()
    found = [{path.name: path.stat().st_ino for path in (Path(out) / "step-00000002").iterdir()}]
    keeper.begin(2)
    found.append({path.name: path.stat().st_ino for path in (Path(out) / "step-00000002").iterdir()})
    keeper.finish()
    return found[0] == found[1] and "manifest.json" in found[0], sorted(path.name for path in Path(out).glob("step-*"))


def test_the_only_checkpoint_is_not_deleted_to_be_written_again(world: Path, tmp_path: Path) -> None:
    found = tiny.run_ranks(saved_twice, 2, world=str(world), out=str(tmp_path))
    assert found == [[True, ["step-00000002"]]] * 2


def digest_of(trained: engine.TrainEngine) -> str:
    """Of all weights and moments, whole, and of the optimizer's own."""
    digest = hashlib.sha256()
    for name in trained.parameters:
        for key, value in sorted(trained.state(name).items()):
            digest.update(f"{name}{key}{tuple(value.shape)}".encode() + value.numpy().tobytes())
        if trained.moments is None:
            for key, value in sorted(trained.optimizer.state[trained.layout.masters[name]].items()):
                digest.update(key.encode() + value.numpy().tobytes() * (key != "step"))
    return digest.hexdigest()


def save_each(group: Ranks, world: str, directory: str, layouts: list[tuple[int, str]]) -> list[str]:
    """A checkpoint after a step of each layout, and what was saved; another step is taken while it is written."""
    found = []
    for number, (stage, dtype) in enumerate(layouts):
        trained, model = load(group, world, stage, dtype)
        take_step(trained, model, group)
        found.append(digest_of(trained))
        saving = saver(trained, directory, group)
        saving.begin(number)
        take_step(trained, model, group)
        assert digest_of(trained) != found[-1]
        saving.finish()
    return found


def load_each(group: Ranks, world: str, directory: str, layouts: list[tuple[int, str]]) -> list[list[str]]:
    """By layout, what is there after loading each checkpoint; the module's weights are the rounded float32 ones."""
    found = []
    for stage, dtype in layouts:
        trained, model = load(group, world, stage, dtype)
        take_step(trained, model, group)  # so that moments and gathered parameters are not what they were made
        digests = []
        for path in sorted(Path(directory).iterdir()):
            checkpoint.load(path, trained, int(path.name.removeprefix("step-")))
            digests.append(digest_of(trained))
            for name, parameter in trained.parameters.items():
                weight = trained.state(name, ("weight",))["weight"]
                with tiny.gathered(parameter):
                    assert torch.equal(parameter.detach().cpu(), weight.to(parameter.dtype)), (path, stage, name)
        take_step(trained, model, group)
        assert digest_of(trained) != digests[-1]
        found.append(digests)
    return found


def test_every_layout_loads_what_every_other_has_saved_bit_by_bit(world: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"world": str(world), "directory": str(tmp_path), "layouts": LAYOUTS}
    saved = tiny.run_ranks(save_each, 3, **arguments)[0]
    for path in sorted(tmp_path.iterdir()):
        verify_files(path, load_manifest(path, "checkpoint"))
        assert all(file.stat().st_size < 40_000 for file in path.glob("*.safetensors"))  # 20,000 and a header
        parts = {re.match(r"rank(\d{5})-\d{5}\.", file.name)[1] for file in path.glob("*.safetensors")}  # type: ignore[index]
        assert parts == {"00000", "00001", "00002"}
    for num_ranks, layouts in ((2, LAYOUTS), (1, [(1, "bf16"), (3, "fp32")])):
        for found in tiny.run_ranks(load_each, num_ranks, **arguments | {"layouts": layouts}):
            assert found == [saved] * len(layouts)


def test_adafactor_goes_on_with_other_ranks(world: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"world": str(world), "directory": str(tmp_path), "layouts": [ADAFACTOR]}
    saved = tiny.run_ranks(save_each, 2, **arguments)[0]
    assert tiny.run_ranks(load_each, 1, **arguments) == [[saved]]
    assert tiny.run_ranks(load_each, 2, **arguments) == [[saved]] * 2


def broken(group: Ranks, world: str, directory: str) -> list[str]:
    """What a rank says when another cannot write its file, and when that file is not there to be read."""
    trained, _ = load(group, world, 3, "fp32")
    said = []
    saving = saver(trained, directory, group, keep=1)
    saving.begin(1)
    saving.finish()
    group.main_first(lambda: Path(directory, "step-00000002/rank00001-00000.safetensors").mkdir(parents=True))
    saving.begin(2)
    with pytest.raises((OSError, PeerFailed)) as caught:
        saving.finish()
    said.append(str(caught.value))
    found = checkpoint.newest(Path(directory), FINGERPRINT, group)
    assert found == (Path(directory, "step-00000001"), 1)
    index = found[0] / "slices.json"
    sound = index.read_text()
    group.barrier()
    group.main_first(lambda: index.write_text(sound.replace("rank00001-", "../rank00001-")))
    with pytest.raises(UserError, match=r"slices\.json: lists other files than manifest\.json"):
        checkpoint.load(found[0], trained, found[1])
    group.main_first(lambda: index.write_text(sound))
    group.main_first(lambda: [path.unlink() for path in found[0].glob("rank00001-*")])
    with pytest.raises((UserError, PeerFailed)) as caught_loading:
        checkpoint.load(found[0], trained, found[1])
    said.append(str(caught_loading.value))
    return said


def test_what_one_rank_cannot_write_or_read_stops_all_and_the_checkpoint_before_stays(
    world: Path, tmp_path: Path
) -> None:
    """Rank 0 reads none of rank 1's files: it has no error of its own."""
    said = tiny.run_ranks(broken, 2, world=str(world), directory=str(tmp_path))
    assert said[0] == ["another rank failed"] * 2
    assert "Is a directory" in said[1][0] and "rank00001-00000.safetensors" in said[1][0]
    assert re.search(r"step-00000001/rank00001-00000\.safetensors: cannot be read as safetensors", said[1][1])


def old_format(group: Ranks, directory: str) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.newest(Path(directory), FINGERPRINT, group)
    return str(caught.value)


def test_a_checkpoint_of_the_format_before_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    path.mkdir()
    manifest = {"kind": "checkpoint", "fingerprint": FINGERPRINT, "files": {}, "details": {"step": 2}}
    (path / "manifest.json").write_text(json.dumps(manifest | {"code_version": "0.9", "format_version": 1}))
    (said,) = tiny.run_ranks(old_format, 1, directory=str(tmp_path))
    assert said == (
        f"{path}: was written by an older alsace_dist, in a format that this one does not read; finish the training "
        f"with that version, or delete {tmp_path} to train from the start"
    )


def test_a_file_written_in_a_stream_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.rand(3, 5),
        "a": torch.rand(4, 1).to(torch.bfloat16),
        "none": torch.empty(0),
        "one": torch.tensor(2.5),
    }
    progress: list[int] = []
    entry = write_tensors(tmp_path / "x.safetensors", tensors, progress.append)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} and sum(progress) == len(
        content
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(name), tensor) and opened.get_tensor(name).dtype == tensor.dtype


def test_a_disk_that_fills_up_while_a_file_is_written_is_named_with_the_file(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_tensors(tmp_path / "x.safetensors", {"weight": torch.ones(50_000)})
        assert caught.value.filename == str(tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SHAPES = {"a": [2, 3], "b": []}
PARAMETERS = [("a", [2, 3]), ("b", [])]
SOUND = {"x": [(0, 0, 4)], "y": [(1, 0, 1), (0, 4, 2)]}


def test_an_index_with_every_element_once_passes() -> None:
    checkpoint.check_index(checkpoint.Index(parameters=PARAMETERS, files=SOUND), SHAPES, Path("p"))


@pytest.mark.parametrize(
    ("parameters", "files", "words"),
    [
        (PARAMETERS, {"x": [(0, 0, 4)], "y": [(1, 0, 1)]}, "each element of each parameter once"),
        (PARAMETERS, {"x": [(0, 0, 4)], "y": [(0, 3, 3), (1, 0, 1)]}, "each element of each parameter once"),
        (PARAMETERS, {"x": [(0, 0, 7), (1, 0, 1)]}, "each element of each parameter once"),
        (PARAMETERS, {**SOUND, "z": [(2, 0, 1)]}, "each element of each parameter once"),
        (PARAMETERS[:1], {"x": [(0, 0, 6)]}, r"not the model's \(b: not there, not \[\]\)"),
        ([("a", [3, 2]), ("b", [])], SOUND, r"not the model's \(a: \[3, 2\], not \[2, 3\]\)"),
    ],
)
def test_an_index_that_is_not_of_the_model(parameters: Any, files: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        checkpoint.check_index(checkpoint.Index(parameters=parameters, files=files), SHAPES, Path("p"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp_avg": None}, "has exp_avg_sq, weight, not exp_avg, exp_avg_sq, weight"),
        ({"other": torch.ones(6)}, "has exp_avg, exp_avg_sq, other, weight, not"),
        ({"exp_avg": torch.ones(5)}, r"exp_avg is F32 \[5\], not F32 \[6\]"),
        ({"weight": torch.ones(2, 3)}, r"weight is F32 \[2, 3\], not F32 \[6\]"),
        ({"weight": torch.ones(6, dtype=torch.int64)}, r"weight is I64 \[6\], not F32 \[6\]"),
    ],
)
def test_a_file_that_no_training_has_left(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    tensors = {name: torch.ones(6) for name in ("weight", *MOMENTS)} | changes
    path = tmp_path / "x.safetensors"
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(UserError, match=f"{path}: {words}"), checkpoint.open_file(path, MOMENTS, 6):
        pass


def test_numbers_that_no_training_has_left() -> None:
    sound = torch.full((6,), 0.5)
    assert [checkpoint.problem_of(key, sound) for key in ("weight", *MOMENTS)] == [""] * 3
    assert "no finite number" in checkpoint.problem_of("weight", torch.tensor([1.0, float("nan")]))
    assert "no finite number" in checkpoint.problem_of("exp_avg_sq", torch.tensor([float("inf")]))
    assert checkpoint.problem_of("exp_avg", -sound) == ""
    assert checkpoint.problem_of("exp_avg_sq", -sound) == "has squares below 0"


def manifest_of(step: Any) -> Manifest:
    return Manifest(
        kind="checkpoint", fingerprint={}, files={}, details={"step": step}, code_version="", format_version=1
    )


@pytest.mark.parametrize("step", [True, 2.0, "2", None, [2], -1, 3, 10**9, float("nan")])
def test_a_step_that_is_not_that_of_the_directory(step: Any) -> None:
    with pytest.raises(UserError, match=r"step-00000002: manifest\.json says step .*, which is not that of its name"):
        checkpoint.step_of(Path("step-00000002"), manifest_of(step))
    assert checkpoint.step_of(Path("step-00000002"), manifest_of(2)) == 2


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"weight": torch.ones(6)}, path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"cut\.safetensors: cannot be read as safetensors"):
        checkpoint.open_file(path, MOMENTS, 6).__enter__()
