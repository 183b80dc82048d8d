"""Edits of what stages hand to each other, signed again: size and sha256 in the manifest are those of the edited file,
so that nothing but a check of the content can notice. Each edit here makes the content nonsense that can be told."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

NAN = float("nan")


def sign(path: Path, top: Path) -> None:
    """List a file with its present size and sha256 in the manifest above it, and that manifest in the one above."""
    for directory in path.parents:
        manifest = directory / "manifest.json"
        if manifest.exists():
            value = json.loads(manifest.read_text(encoding="utf-8"))
            name = path.relative_to(directory).as_posix()
            if name in value["files"]:
                data = path.read_bytes()
                value["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                manifest.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
                path = manifest
        if directory == top:
            return


# --- scores --------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def _normalised(values: list[float]) -> list[float]:
    array = np.asarray(values, dtype=np.float64)
    found: list[float] = (array - np.logaddexp.reduce(array)).tolist()
    return found


def _all(change: Callable[[dict[str, Any]], Any]) -> Callable[[Rows, int], Any]:
    return lambda rows, at: [change(row) for row in rows]


def _one(change: Callable[[dict[str, Any]], Any]) -> Callable[[Rows, int], Any]:
    return lambda rows, at: change(rows[at])


def _other_language(row: dict[str, Any]) -> None:
    row["language"] = "xx" if row["language"] == "de" else row["language"]


SCORES: dict[str, Callable[[Rows, int], Any]] = {
    "a NaN": _one(lambda row: row.update(log_probs=[NAN, *row["log_probs"][1:]])),
    "a row of -inf": _one(lambda row: row.update(log_probs=[-float("inf")] * 3)),
    "a +inf": _one(lambda row: row.update(log_probs=[float("inf"), *row["log_probs"][1:]])),
    "a row that does not normalise": _one(lambda row: row.update(log_probs=[x + 1 for x in row["log_probs"]])),
    "zeros": _all(lambda row: row.update(log_probs=[0.0] * 3)),
    "a row twice": lambda rows, at: rows.append(rows[at]),
    "a row less": lambda rows, at: rows.pop(at),
    "a group less": lambda rows, at: rows.__setitem__(slice(None), [r for r in rows if r["key"] != rows[at]["key"]]),
    "no rows": lambda rows, at: rows.clear(),
    "one candidate": _all(lambda row: row.update(log_probs=[0.0])),
    "a candidate less in a row": _one(lambda row: row.update(log_probs=_normalised(row["log_probs"][:2]))),
    "a candidate less everywhere": _all(lambda row: row.update(log_probs=_normalised(row["log_probs"][:2]))),
    "a candidate more everywhere": _all(lambda row: row.update(log_probs=_normalised([*row["log_probs"], -1.0]))),
    "another language": _all(_other_language),
    "another key": _one(lambda row: row.update(key="stranger")),
    "no key": _one(lambda row: row.update(key=None)),
    "no log_probs": _one(lambda row: row.update(log_probs=None)),
    "an empty language": _one(lambda row: row.update(language="")),
}
TEST_SCORES: dict[str, Callable[[Rows, int], Any]] = {
    "a label too high": _one(lambda row: row.update(label=3)),
    "a label below 0": _one(lambda row: row.update(label=-1)),
    "a label less": _one(lambda row: row.update(label=None)),
}
SCHEMAS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a column less": lambda table: table.drop_columns(["language"]),
    "a column renamed": lambda table: table.rename_columns(["key", "language", "logprobs", "label"]),
    "keys as numbers": lambda table: table.set_column(0, "key", pa.array(range(len(table)))),
    "log_probs as text": lambda table: table.set_column(2, "log_probs", pa.array(["x"] * len(table))),
    "log_probs flat": lambda table: table.set_column(2, "log_probs", pa.array([0.5] * len(table))),
}


def edit_scores(rng: random.Random, path: Path) -> str:
    """Edit one Parquet file of scores."""
    table = pq.read_table(path)
    choices = SCORES | (TEST_SCORES if path.parent.name == "test" else {})
    name = rng.choice([*choices, *SCHEMAS])
    if name in SCHEMAS:
        table = SCHEMAS[name](table)
    else:
        rows = table.to_pylist()
        choices[name](rows, rng.randrange(len(rows)))
        table = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(table, path, compression="zstd")
    return name


# --- shards --------------------------------------------------------------------------------------------------------

Members = list[tuple[str, bytes]]


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Members, int], Any]:
    def edit(members: Members, at: int) -> None:
        name, data = members[at]
        record = json.loads(data)
        change(record)
        members[at] = name, json.dumps(record).encode()

    return edit


def _text(value: Any) -> Callable[[Members, int], Any]:
    return _record(lambda record: record["texts"]["en"].update(text=value))


def _renamed(name: str) -> Callable[[Members, int], Any]:
    return lambda members, at: members.__setitem__(at, (name, members[at][1]))


def _content(data: bytes) -> Callable[[Members, int], Any]:
    return lambda members, at: members.__setitem__(at, (members[at][0], data))


SHARDS: dict[str, Callable[[Members, int], Any]] = {
    "a label too high": _record(lambda record: record.update(label=99)),
    "a label below 0": _record(lambda record: record.update(label=-1)),
    "a label that is true": _record(lambda record: record.update(label=True)),
    "a label that is 0.5": _record(lambda record: record.update(label=0.5)),
    "no label": _record(lambda record: record.pop("label")),
    "no texts": _record(lambda record: record.pop("texts")),
    "texts that are a list": _record(lambda record: record.update(texts=[1])),
    "a text that is a number": _text(5),
    "a text that is empty": _text(""),
    "a text that is blank": _text(" \n"),
    "half a surrogate": _text("\ud800"),
    "a field less": _record(lambda record: record["texts"]["en"].clear()),
    "a field of another name": _record(lambda record: record["texts"].update(en={"other": "x"})),
    "a language less": _record(lambda record: record["texts"].pop("en")),
    "a language more": _record(lambda record: record["texts"].update(xx={"text": "x"})),
    "a group less": lambda members, at: members.pop(at),
    "a group twice": lambda members, at: members.append(members[at]),
    "no groups": lambda members, at: members.clear(),
    "a member that is no JSON": _renamed("g1.txt"),
    "a member without a name": _renamed(".json"),
    "a member of broken JSON": _content(b"{"),
    "a member of a list": _content(b"[]"),
    "a member without end": _content(b"[" * 100_000),
    "a member of digits": _content(b'{"label": ' + b"9" * 5_000 + b', "texts": {"en": {"text": "x"}}}'),
    "a member in Latin-1": _content('{"label": 0, "texts": {"en": {"text": "ä"}}}'.encode("latin-1")),
}


def edit_shard(rng: random.Random, path: Path) -> str:
    """Edit one tar of parallel groups."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    labels = {name for name in SHARDS if "label" in name}
    name = rng.choice([name for name in SHARDS if name not in labels or path.parent.name == "labeled"])
    SHARDS[name](members, rng.randrange(len(members)))
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return name


# --- selections and evaluations ------------------------------------------------------------------------------------

JSONS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "teachers.json": {
        "a weight of NaN": lambda v: v["weights"].update({v["teachers"][0]: NAN}),
        "a weight below 0": lambda v: v["weights"].update({v["teachers"][0]: -1.0}),
        "weights of 2 in all": lambda v: v["weights"].update({v["teachers"][0]: 2.0}),
        "an unknown teacher": lambda v: (v["teachers"].append("xx"), v["weights"].update(xx=0.0)),
        "no teachers": lambda v: v.update(teachers=[], weights={}),
        "a teacher twice": lambda v: v["teachers"].append(v["teachers"][0]),
        "a teacher who is a student": lambda v: v["students"].append(v["teachers"][0]),
        "biases of two": lambda v: v["biases"].update(en=[0.0, 0.0]),
        "biases of NaN": lambda v: v["biases"].update(en=[NAN, 0.0, 0.0]),
        "biases of an unknown language": lambda v: v["biases"].update(xx=[0.0, 0.0, 0.0]),
        "pairs below 0": lambda v: v.update(num_pairs=dict.fromkeys(v["num_pairs"], -1)),
        "no pairs": lambda v: v.update(num_pairs={}),
        "no groups": lambda v: v.update(num_groups=0),
        "more groups than there are": lambda v: v.update(num_groups=10**6),
        "a score of NaN": lambda v: v["scores"].update(en=NAN),
        "a key less": lambda v: v.pop("weights"),
        "a key more": lambda v: v.update(extra=1),
    },
    "metrics.json": {
        "an accuracy of 2": lambda v: v["languages"]["en"].update(after=2.0),
        "an accuracy below 0": lambda v: v["average"].update(after=-0.5),
        "an accuracy of NaN": lambda v: v["average"].update(before=NAN),
        "examples below 0": lambda v: v["languages"]["en"].update(num_examples=-1),
        "a p-value of 3": lambda v: v["languages"]["en"].update(p_value=3.0),
        "an interval from high to low": lambda v: v["average"].update(ci95=[0.5, -0.5]),
        "an unknown worst language": lambda v: v["worst"]["after"].update(language="xx"),
        "no languages": lambda v: v.update(languages={}),
        "a key less": lambda v: v.pop("worst"),
        "a key more": lambda v: v.update(extra=1),
        "a teacher who is a student": lambda v: v.update(students=v["teachers"]),
    },
}


def edit_json(rng: random.Random, path: Path) -> str:
    """Edit teachers.json or metrics.json."""
    value = json.loads(path.read_text(encoding="utf-8"))
    name = rng.choice(list(JSONS[path.name]))
    JSONS[path.name][name](value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return name


# What only some of the readers can tell: kind of edit -> steps that cannot.
UNTOLD = {
    "another key": ("select", "calibrate"),  # they see nothing but the scores
    "more groups than there are": ("evaluate",),
}


# --- tensors -------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]

MODELS: dict[str, Callable[[Tensors, str], Any]] = {
    "a NaN": lambda tensors, name: tensors[name].view(-1).__setitem__(0, NAN),
    "an inf": lambda tensors, name: tensors[name].view(-1).__setitem__(0, float("inf")),
    "whole numbers": lambda tensors, name: tensors.update({name: tensors[name].to(torch.int64)}),
    "truth values": lambda tensors, name: tensors.update({name: tensors[name] > 0}),
    "complex numbers": lambda tensors, name: tensors.update({name: tensors[name].to(torch.complex64)}),
    "a tensor less": lambda tensors, name: tensors.pop(name),
    "a tensor more": lambda tensors, name: tensors.update(extra=torch.zeros(2)),
    "another name": lambda tensors, name: tensors.update({name + "x": tensors.pop(name)}),
    "another shape": lambda tensors, name: tensors.update({name: torch.zeros(3, 5, 7)}),
    "no numbers": lambda tensors, name: tensors.update({name: torch.zeros(0)}),
    "no tensors": lambda tensors, name: tensors.clear(),
}


def write_otherwise(rng: random.Random, model: Path) -> None:
    """Write a model's weights in another form in which models are found: torch's, or in two files and an index."""
    single = model / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    if rng.random() < 0.4:
        torch.save(tensors, model / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = model / f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_tensors(rng: random.Random, path: Path) -> str:
    """Edit the tensors of a model or a checkpoint."""
    is_torch = path.suffix == ".bin"
    found = torch.load(path, weights_only=True) if is_torch else load_file(path)
    tensors = {name: value.clone() for name, value in found.items()}
    choices = dict(MODELS)
    if any("exp_avg_sq" in name for name in tensors):
        choices["a second moment below 0"] = _second_moment
    kind = rng.choice(list(choices))
    name = rng.choice(sorted(tensors))
    choices[kind](tensors, name)
    if is_torch:
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    return f"{name}: {kind}"


def _second_moment(tensors: Tensors, name: str) -> None:
    tensors[next(name for name in sorted(tensors) if "exp_avg_sq" in name)].fill_(-1.0)


STEPS: dict[str, Any] = {"below 0": -1, "after the end": 10**9, "text": "2", "a fraction": 2.5, "true": True}
STEPS |= {"nothing": None, "another than its directory's": 3, "NaN": NAN, "a list": [2]}


def edit_step(rng: random.Random, checkpoint: Path) -> str:
    """Edit the step that the manifest of a checkpoint names."""
    manifest = checkpoint / "manifest.json"
    value = json.loads(manifest.read_text(encoding="utf-8"))
    kind = rng.choice(list(STEPS))
    value["details"]["step"] = STEPS[kind]
    manifest.write_text(json.dumps(value), encoding="utf-8")
    return f"step: {kind}"
