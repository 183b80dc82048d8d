"""Tasks: what a parallel group is as prompt and candidates, and where published datasets come from.

Every module here but ``base`` is a published dataset, and a kind of ``data.inputs`` by its own name. It describes the
files of the dataset (``DATASET``), which are read like anybody's (data/published.py), reads them itself (``SETTINGS``,
``files``, ``rows``) or generates it (``SETTINGS``, ``files``, ``records``).
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from alsace_dist.config import InputConfig
from alsace_dist.tasks.base import FoundProblem, FoundRow, Published


class GeneratedDataset(Protocol):
    """What a module of a dataset that is generated holds.

    ``SETTINGS``: the keys of ``data.inputs`` that it uses beside ``kind`` and ``split``.
    """

    SETTINGS: frozenset[str]

    def files(self, one: InputConfig) -> list[Path]:
        """The files that it reads; none if it is generated."""

    def records(self, one: InputConfig, seed: int) -> Iterator[dict[str, Any]]:
        """Its parallel groups: ``{"id": ..., "label": ..., "texts": {language: {field: text}}}``, as in JSONL.

        Raises ``UserError`` if the settings cannot be met.
        """


class ParsedDataset(Protocol):
    """What a module of a dataset holds whose files are like no other's, so that it reads them itself.

    ``SETTINGS``: as in ``GeneratedDataset``.
    """

    SETTINGS: frozenset[str]

    def files(self, one: InputConfig) -> list[Path]:
        """The files that it reads. Raises ``UserError`` if there are none."""

    def rows(self, one: InputConfig) -> Iterator[FoundRow | FoundProblem]:
        """Its rows in the languages of the input, and what is wrong with lines."""


def published() -> list[str]:
    """Names of the published datasets."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def dataset(name: str) -> Published | ParsedDataset | GeneratedDataset:
    """A published dataset: the description of its files, or the module that reads or generates its rows."""
    module = importlib.import_module(f"{__name__}.{name}")
    found = vars(module).get("DATASET")
    return found if isinstance(found, Published) else cast(ParsedDataset | GeneratedDataset, module)
