"""``teachers.json``: which languages teach in a round, with what weight, and the biases that calibrate languages.

Written by stage *select*, and by *calibrate* for the biases alone; read by *distill* and *evaluate*.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.files.manifest import Manifest, load_manifest, read_json, verify_files, write_json, write_manifest

KIND = "selection"
TEACHERS = "teachers.json"


class Selection(Section):
    """The content of ``teachers.json``; docs/formats.md says what the keys mean."""

    rule: str
    num_groups: int
    teachers: list[str]
    students: list[str]
    scores: dict[str, float]
    threshold: float | None
    normalised_scores: dict[str, float]
    weights: dict[str, float]
    biases: dict[str, list[float]]
    num_pairs: dict[str, float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.teachers or set(self.weights) != set(self.teachers) or set(self.teachers) & set(self.students):
            raise ValueError("weights must be of the teachers, at least one, and no teacher a student")
        if min(self.weights.values()) < 0 or abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError("weights must be 0 or more and add up to 1")
        if unknown := set(self.teachers) - set(self.scores):
            raise ValueError(f"teachers: {min(unknown)!r} has no score")
        if self.num_groups < 1 or min(self.num_pairs.values(), default=0) < 0:
            raise ValueError("num_groups must be 1 or more, num_pairs 0 or more")
        return self

    def bias_rows(self) -> dict[str, np.ndarray]:
        """Language -> bias per candidate, float64 [K]."""
        return {language: np.asarray(row, dtype=np.float64) for language, row in self.biases.items()}


def write_selection(directory: Path, selection: Selection, fingerprint: dict[str, Any]) -> None:
    """Write the file and the manifest that makes the directory complete."""
    write_json(directory / TEACHERS, selection.model_dump(mode="json"))
    write_manifest(directory, KIND, fingerprint, [directory / TEACHERS])


def selection_manifest(directory: Path) -> Manifest:
    """The manifest of a complete selection. Raises ``NotReady`` if there is none."""
    return load_manifest(directory, KIND)


def read_selection(directory: Path) -> Selection:
    """Read a complete selection.

    Raises ``NotReady`` if there is none, ``UserError`` if the file is not what its manifest lists, or no selection.
    """
    verify_files(directory, selection_manifest(directory))
    path = directory / TEACHERS
    return validate(Selection, read_json(path), f"{path}: ")
