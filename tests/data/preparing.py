"""Inputs of a few groups, and what stage prepare makes of them: for tests of every kind of input and of the stage.

All paths are relative to the working directory, which the tests make an empty one.
"""

import json
from pathlib import Path
from typing import Any

from alsace_dist.config import Config
from alsace_dist.files.shards import ParallelGroup, open_dataset, read_shard

Record = dict[str, Any]


def make_config(inputs: list[Record], task: Record | None = None, seed: int = 0, **data: Any) -> Config:
    """A config over these inputs, relative to the working directory; ``data``: the rest of that section."""
    task = {"fields": ["text"], "template": "{text}", "labels": ["good", "bad"], **(task or {})}
    return Config.model_validate(
        {
            "run_dir": "run",
            "seed": seed,
            "task": task,
            "data": {"inputs": inputs, **data},
            "model": {"path": "some-model"},
        }
    )


def record(number: int, label: Any = "good", languages: tuple[str, ...] = ("en", "de")) -> Record:
    """A good record in the JSON form."""
    texts = {language: {"text": f"{language} text {number}"} for language in languages}
    return {"id": f"g{number}", "texts": texts, **({} if label is None else {"label": label})}


def write_jsonl(path: str, rows: list[Any]) -> None:
    """A line per row; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    Path(path).write_bytes(b"\n".join(lines) + b"\n")


def read_back(split: str) -> list[ParallelGroup]:
    """The groups of a split of ``run/data``, in their order."""
    dataset = open_dataset(Path("run/data") / split)
    return [group for shard in dataset.shards for group in read_shard(dataset, shard)]


def by_key(split: str) -> dict[str, ParallelGroup]:
    """The same by key."""
    return {group.key: group for group in read_back(split)}


def problems() -> list[str]:
    """What is wrong with the inputs, line by line."""
    return Path("run/bad-records.txt").read_text(encoding="utf-8").splitlines()


EXPECTED = {
    "1": ParallelGroup("1", 0, {"en": {"text": "dog"}, "de": {"text": "Hund"}}),
    "2": ParallelGroup("2", 1, {"en": {"text": "cat"}, "de": {"text": "Katze"}}),
}
LONG_FORM = {
    "id": ["1", "1", "2", "2"],
    "language": ["en", "de", "en", "de"],
    "text": ["dog", "Hund", "cat", "Katze"],
    "label": ["good", None, "bad", "bad"],
}
MANY = [record(number, label=("good", "bad")[number % 2]) for number in range(100)]
