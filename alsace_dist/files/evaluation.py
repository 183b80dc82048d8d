"""``evaluation/metrics.json``: accuracies before and after, and whether they changed; the stable interface of a run.

Accuracies are in [0, 1]; ``ci95`` is the interval of after - before. docs/formats.md says what the keys mean.
"""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from alsace_dist.config import Fraction, Section
from alsace_dist.config_file import validate
from alsace_dist.files.manifest import RERUN, load_manifest, read_json, verify_files, write_json, write_manifest

KIND = "evaluation"
METRICS = "metrics.json"

Difference = Annotated[float, Field(ge=-1.0, le=1.0)]  # of two accuracies


def _in_order(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"must go from low to high, not from {interval[0]} to {interval[1]}")
    return interval


Interval = Annotated[tuple[Difference, Difference], AfterValidator(_in_order)]
TwiceDifference = Annotated[float, Field(ge=-2.0, le=2.0)]  # of two gaps
GapInterval = Annotated[tuple[TwiceDifference, TwiceDifference], AfterValidator(_in_order)]


ROUNDING = 1e-6


class LanguageChange(Section):
    """One language: its accuracy before and after, and the exact McNemar test, with and without Holm's correction.

    ``num_gained``, ``num_lost``: examples that are right after and were not before, and the reverse. ``score``: in the
    first round's selection.
    """

    before: Fraction
    after: Fraction
    ci95: Interval
    num_examples: Annotated[int, Field(ge=1, le=10**12)]
    num_gained: Annotated[int, Field(ge=0, le=10**12)]
    num_lost: Annotated[int, Field(ge=0, le=10**12)]
    p_value: Fraction
    p_value_raw: Fraction
    score: float | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.p_value < self.p_value_raw - ROUNDING:
            raise ValueError("p_value: is below p_value_raw, which a correction only raises")
        if abs((self.num_gained - self.num_lost) / self.num_examples - (self.after - self.before)) > ROUNDING:
            raise ValueError("num_gained, num_lost: are not what after is above before")
        return self


ALL = "all"  # the row over all categories


class PrecisionChange(Section):
    """Share of the right candidates that are among as many best answers; ``num_right``: how many are right in all."""

    before: Fraction
    after: Fraction
    num_right: Annotated[int, Field(ge=1)]


class AverageChange(Section):
    """Mean over languages."""

    before: Fraction
    after: Fraction
    ci95: Interval


class GapChange(Section):
    """Accuracy in the source language minus the mean of the other languages; null where that is not defined."""

    before: Difference | None
    after: Difference | None
    ci95: GapInterval | None


class Round(Section):
    """Who taught in a round, and every language's score in its selection."""

    teachers: list[str]
    scores: dict[str, float]


class SpreadChange(Section):
    """Population standard deviation over languages."""

    before: Fraction
    after: Fraction


class WorstLanguage(Section):
    """The language with the lowest accuracy."""

    language: str
    accuracy: Fraction


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
    paired_gap: GapChange
    rounds: list[Round]
    std: SpreadChange
    worst: WorstChange
    uses_labels: bool
    """Whether labels of the unlabeled groups were looked at: an oracle or an upper bound, not the method."""
    # Language -> category, and "all" -> precision; empty where every example has one right candidate and no category.
    precision: dict[str, dict[str, PrecisionChange]] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, one in (("before", self.worst.before), ("after", self.worst.after)):
            if one.language not in self.languages:
                raise ValueError(f"worst.{name}.language: {one.language!r} is none of languages")
            accuracies = {language: getattr(row, name) for language, row in self.languages.items()}
            least, mean = min(accuracies.values()), sum(accuracies.values()) / len(accuracies)
            if max(abs(one.accuracy - least), abs(accuracies[one.language] - least)) > ROUNDING:
                raise ValueError(f"worst.{name}: is not the lowest of languages")
            if abs(getattr(self.average, name) - mean) > ROUNDING:
                raise ValueError(f"average.{name}: is not the mean of languages")
            others = [value for language, value in accuracies.items() if language != self.source_language]
            gap = getattr(self.gap, name)
            has_gap = bool(others) and self.source_language in accuracies
            if has_gap != (gap is not None) or (
                has_gap and abs(accuracies[self.source_language] - sum(others) / len(others) - gap) > ROUNDING
            ):
                raise ValueError(f"gap.{name}: is not that of languages and source_language")
        if both := set(self.teachers) & set(self.students):
            raise ValueError(f"teachers and students: {min(both)!r} is both")
        return self

    @property
    def lacks_translations(self) -> bool:
        """Whether languages have different groups, so that the plain gap compares different examples."""
        return len({row.num_examples for row in self.languages.values()}) > 1

    def as_json(self) -> dict[str, Any]:
        """The keys of ``metrics.json``."""
        return self.model_dump(mode="json", exclude=None if self.precision else {"precision"})


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
    return validate(Evaluation, read_json(path), f"{path}: ", RERUN)
