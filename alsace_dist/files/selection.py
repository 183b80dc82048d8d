"""``teachers.json``: which languages teach in a round, with what weight, and the biases that calibrate languages.

Written by stage *select*, and by *calibrate* for the biases alone; read by *distill* and *evaluate*.
"""

from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from pydantic import model_validator

from alsace_dist.config import Fraction, Rule, Section, Targets
from alsace_dist.config_file import validate
from alsace_dist.files.manifest import (
    RERUN,
    Manifest,
    load_manifest,
    read_json,
    verify_files,
    write_json,
    write_manifest,
)

KIND = "selection"
TEACHERS = "teachers.json"
TARGETS: tuple[str, ...] = get_args(Targets)
MAX_BIAS = 1e4  # in nats; what a calibration makes of log-probabilities is far below


class Selection(Section):
    """The content of ``teachers.json``; docs/formats.md says what the keys mean."""

    rule: Rule
    num_groups: int
    teachers: list[str]
    students: list[str]
    scores: dict[str, Fraction]
    threshold: float | None
    normalised_scores: dict[str, float]
    weights: dict[str, float]
    biases: dict[str, list[float]]
    num_pairs: dict[str, float]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.teachers or set(self.weights) != set(self.teachers) or set(self.teachers) & set(self.students):
            raise ValueError("weights must be of the teachers, at least one, and no teacher a student")
        if twice := [name for names in (self.teachers, self.students) for name in names if names.count(name) > 1]:
            raise ValueError(f"teachers and students: {twice[0]!r} is there twice")
        if min(self.weights.values()) < 0 or abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError("weights must be 0 or more and add up to 1")
        if unknown := set(self.teachers) - set(self.scores):
            raise ValueError(f"teachers: {min(unknown)!r} has no score")
        if self.num_groups < 1 or set(self.num_pairs) != set(TARGETS) or min(self.num_pairs.values()) < 0:
            raise ValueError(f"num_groups must be 1 or more, num_pairs 0 or more for each of {', '.join(TARGETS)}")
        if len({len(row) for row in self.biases.values()}) > 1:
            raise ValueError("biases must be of one length, a number per candidate")
        if any(abs(bias) > MAX_BIAS for row in self.biases.values() for bias in row):
            raise ValueError(f"biases: one is beyond {MAX_BIAS:g}, which no calibration makes")
        most = len(self.teachers) * (len(self.teachers) + len(self.students)) * self.num_groups
        if max(self.num_pairs.values()) > most:
            raise ValueError(f"num_pairs: more than {most:,}, all pairs of all groups")
        if unknown := set(self.biases) - set(self.teachers) - set(self.students):
            raise ValueError(f"biases: {min(unknown)!r} is neither a teacher nor a student")
        return self

    @property
    def ranked_weights(self) -> dict[str, float]:
        """Teacher -> weight, the best teacher first."""
        return {teacher: self.weights[teacher] for teacher in self.teachers}

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
    return validate(Selection, read_json(path), f"{path}: ", RERUN)
