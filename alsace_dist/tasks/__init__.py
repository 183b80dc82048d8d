"""Tasks: what a parallel group is as prompt and candidates, and where published datasets come from.

Every module here but ``base`` is a published dataset, and a kind of ``data.inputs`` by its own name.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from alsace_dist.config import InputConfig


class PublishedDataset(Protocol):
    """What a module of a published dataset holds.

    ``SETTINGS``: the keys of ``data.inputs`` that it uses beside ``kind`` and ``split``.
    """

    SETTINGS: frozenset[str]

    def files(self, one: InputConfig) -> list[Path]:
        """The files that it reads; none if it is generated."""

    def records(self, one: InputConfig, seed: int) -> Iterator[dict[str, Any]]:
        """Its parallel groups: ``{"id": ..., "label": ..., "texts": {language: {field: text}}}``, as in JSONL.

        Raises ``UserError`` that names the file and the line of what does not fit the layout.
        """


def published() -> list[str]:
    """Names of the published datasets."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def dataset(name: str) -> PublishedDataset:
    """The module of a published dataset."""
    return cast(PublishedDataset, importlib.import_module(f"{__name__}.{name}"))
