"""``evaluation/metrics.json``: accuracies before and after, and whether they changed; the stable interface of a run.

Accuracies are in [0, 1]; ``ci95`` is the interval of after - before. docs/formats.md says what the keys mean.
"""

from pathlib import Path
from typing import Any

from alsace_dist.config import Section
from alsace_dist.config_file import validate
from alsace_dist.files.manifest import load_manifest, read_json, verify_files, write_json, write_manifest

KIND = "evaluation"
METRICS = "metrics.json"

Interval = tuple[float, float]


class LanguageChange(Section):
    """One language: its accuracy before and after, and the exact McNemar test, with and without Holm's correction."""

    before: float
    after: float
    num_examples: int
    p_value: float
    p_value_raw: float
    score: float | None


class AverageChange(Section):
    """Mean over languages."""

    before: float
    after: float
    ci95: Interval


class GapChange(Section):
    """Accuracy in the source language minus the mean of the other languages; null where that is not defined."""

    before: float | None
    after: float | None
    ci95: Interval | None


class SpreadChange(Section):
    """Population standard deviation over languages."""

    before: float
    after: float


class WorstLanguage(Section):
    """The language with the lowest accuracy."""

    language: str
    accuracy: float


class WorstChange(Section):
    """The worst language before, and the one after."""

    before: WorstLanguage
    after: WorstLanguage


class Evaluation(Section):
    """The content of ``metrics.json``."""

    source_language: str
    teachers: list[str]
    students: list[str]
    languages: dict[str, LanguageChange]
    average: AverageChange
    gap: GapChange
    std: SpreadChange
    worst: WorstChange

    def as_json(self) -> dict[str, Any]:
        """The keys of ``metrics.json``."""
        return self.model_dump(mode="json")


def write_evaluation(directory: Path, evaluation: Evaluation, fingerprint: dict[str, Any], num_groups: int) -> None:
    """Write the file and the manifest that makes the directory complete."""
    write_json(directory / METRICS, evaluation.as_json())
    write_manifest(directory, KIND, fingerprint, [directory / METRICS], {"num_groups": num_groups})


def read_evaluation(directory: Path) -> Evaluation:
    """Read a complete evaluation.

    Raises ``NotReady`` if there is none, ``UserError`` if the file is not what its manifest lists, or no evaluation.
    """
    verify_files(directory, load_manifest(directory, KIND))
    path = directory / METRICS
    return validate(Evaluation, read_json(path), f"{path}: ")
