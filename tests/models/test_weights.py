"""The files of a model: weights whole and in parts, broken ones, tokenizers, names. Nothing in them is executed."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_mt5 import make_state, write_model
from safetensors.torch import save_file

from alsace_dist.errors import UserError
from alsace_dist.models.weights import Weights, load_tokenizer, model_identity, resolve_model


def split(directory: Path, suffix: str) -> dict[str, torch.Tensor]:
    """Write tensors over two files and an index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    state = {f"t{index}": torch.full((2, index + 1), float(index)) for index in range(4)}
    weight_map: dict[str, str] = {}
    for number, names in enumerate((("t0", "t2"), ("t1", "t3"))):
        file = f"{stem}-{number}.{suffix}"
        part = {name: state[name] for name in names}
        weight_map |= dict.fromkeys(names, file)
        if suffix == "safetensors":
            save_file(part, directory / file)
        else:
            torch.save(part, directory / file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


def check_tensors(directory: Path, state: dict[str, torch.Tensor]) -> None:
    weights = Weights(directory)
    assert weights.keys() == state.keys()
    assert "t0" in weights and "t9" not in weights
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.tensor(name), tensor)
        assert torch.equal(weights.rows(name, [1, 0]), tensor[[1, 0]])
        assert torch.equal(weights.tensor(name, slice(1, 2)), tensor[1:2])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_from_several_files(tmp_path: Path, suffix: str) -> None:
    check_tensors(tmp_path, split(tmp_path, suffix))


def test_tensors_from_one_file(tmp_path: Path) -> None:
    state = {"t0": torch.arange(6.0).view(2, 3), "t1": torch.ones(4)}
    save_file(state, tmp_path / "model.safetensors")
    check_tensors(tmp_path, state)


@pytest.mark.parametrize("as_zip", [True, False], ids=["since torch 1.6", "before"])
def test_tensors_from_one_torch_file(tmp_path: Path, as_zip: bool) -> None:
    state = {"t0": torch.arange(6.0).view(2, 3), "t1": torch.ones(4)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    check_tensors(tmp_path, state)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no model\.safetensors and no pytorch_model\.bin; model\.path must name"
    ):
        Weights(tmp_path)


class Evil:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("plain", [False, True], ids=["torch", "pickle"])
@pytest.mark.parametrize("indexed", [True, False])
def test_nothing_in_a_torch_file_is_executed(tmp_path: Path, plain: bool, indexed: bool) -> None:
    marker = tmp_path / "executed"
    file = tmp_path / ("part.bin" if indexed else "pytorch_model.bin")
    if plain:
        file.write_bytes(pickle.dumps({"t0": Evil(marker)}))
    else:
        torch.save({"t0": Evil(marker)}, file)
    if indexed:
        (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"t0": "part.bin"}}')
    try:
        with pytest.raises(UserError, match=rf"{file.name}: cannot be read as weights \(.*\); get the file again"):
            Weights(tmp_path).tensor("t0")
    finally:
        assert not marker.exists()
    if not plain:
        torch.load(file, weights_only=False)
        assert marker.exists()  # it would have


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\..\\x/y"])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, name: str, stem: str) -> None:
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": {"a": "part", "t0": name}}))
    with pytest.raises(UserError, match=rf"{stem}\.index\.json: names the file .* outside its directory; get a sound"):
        Weights(tmp_path)


def test_broken_weight_files(tmp_path: Path) -> None:
    state = split(tmp_path, "safetensors")
    path = tmp_path / "model-0.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-8], b"", b"junk" * 100):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"model-0\.safetensors: cannot be read as safetensors \(.*\); get the file"
        ):
            Weights(tmp_path).tensor("t0")
    path.unlink()
    with pytest.raises(UserError, match=r"model-0\.safetensors: cannot be read as safetensors"):
        Weights(tmp_path).shape("t0")
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(state, tmp_path / "part.bin")
    (tmp_path / "part.bin").write_bytes((tmp_path / "part.bin").read_bytes()[:-50])
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"t0": "part.bin"}}')
    with pytest.raises(UserError, match=r"part\.bin: cannot be read as weights"):
        Weights(tmp_path).tensor("t0")


@pytest.mark.parametrize(
    "index",
    [{}, [], {"weight_map": []}, {"weight_map": {"t0": 3}}, {"weight_map": {"t9": "model-0.safetensors"}}],
    ids=str,
)
def test_a_broken_index(tmp_path: Path, index: Any) -> None:
    split(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        Weights(tmp_path).shape("t9")


# --- tokenizers, names ---------------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no usable tokenizer \(.*\); put the model's tokenizer files there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [None, "{}"], ids=["none beside a config", "broken"])
def test_a_tokenizer_that_is_none(tmp_path: Path, text: str | None) -> None:
    make_state()[0].save_pretrained(tmp_path)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_names_of_models(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"^model\.revision: .* is a directory, which has no revisions; remove it"):
        resolve_model(str(tmp_path), "main")
    with pytest.raises(UserError, match=r"^model\.path: 'a/b/c' is no directory that is here, and no name on the hub"):
        resolve_model("a/b/c")  # not even a possible name, so the hub is not asked


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "spiece.model"])
def test_a_pipe_in_a_model_directory_is_named_and_not_read(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: is no regular file"):
        model_identity(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_a_terabyte_is_named_and_not_read(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    with (tmp_path / name).open("ab") as file:
        file.truncate(1 << 40)
    for read in (model_identity, load_tokenizer):
        with pytest.raises(UserError, match=rf"{name}: 1,099,511,627,776 bytes where at most 268,435,456 are read"):
            read(tmp_path)


def test_the_identity_of_a_model_changes_with_its_files(tmp_path: Path) -> None:
    found = [model_identity(write_model(tmp_path))]
    assert model_identity(write_model(tmp_path)) == found[0]
    save_file(make_state(seed=1)[1], tmp_path / "model.safetensors")
    found.append(model_identity(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    found.append(model_identity(tmp_path))
    assert len({json.dumps(one) for one in found}) == 3


def test_one_model_whole_and_one_in_parts_are_two(tmp_path: Path) -> None:
    """Beside a newer file the index of an older one may be left; transformers reads the whole one without a word."""
    save_file({"t0": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"t0": torch.zeros(2)}, tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": "part.safetensors"}}))
    with pytest.raises(UserError, match=r"holds model\.safetensors and model\.safetensors\.index\.json.*; remove one"):
        Weights(tmp_path)
    index.unlink()
    assert Weights(tmp_path).tensor("t0").sum() == 2


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_values(tmp_path: Path, kind: str) -> None:
    tensor = torch.eye(3).to_sparse() if kind == "sparse" else torch.empty(3, 3, device="meta")
    torch.save({"t0": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"(t0 is a sparse or an empty \(meta\) tensor|cannot be read as weights)"):
        Weights(tmp_path).tensor("t0")
