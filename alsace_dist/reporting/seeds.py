"""Several seeds of one config in one report: means with their spread, and what is significant over all of them.

Significant here means the exact McNemar test on the examples of all seeds together, Holm-corrected over the languages.
The seeds share their test examples, so it speaks of these examples and of seeds in general, not of other examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from alsace_dist.files.evaluation import Evaluation
from alsace_dist.reporting.statistics import holm, mcnemar_of_counts
from alsace_dist.reporting.tables import USES_LABELS, Figures, Row, Table, figures_after, figures_before
from alsace_dist.reporting.verdict import UNDEFINED, percent, printable

BySeed = Mapping[int, Mapping[str, Evaluation]]  # seed -> variant -> its evaluation, the run itself as "main"


@dataclass(frozen=True)
class Pooled:
    """One variant over its seeds. ``better``, ``worse``: languages that changed significantly over all of them;
    ``is_start``: whether it is what they are compared with; ``uses_labels``: as in ``Evaluation``."""

    seeds: tuple[int, ...]
    figures: tuple[Figures, ...]
    better: tuple[str, ...]
    worse: tuple[str, ...]
    is_start: bool = False
    uses_labels: bool = False


def pooled(found: BySeed, alpha: float) -> dict[str, Pooled]:
    """Variant -> its seeds together, the model that all start from as "before"; variants may lack seeds."""
    names = dict.fromkeys(name for variants in found.values() for name in variants)
    starts = [variants["main"] for variants in found.values() if "main" in variants]
    seeds = tuple(seed for seed, variants in found.items() if "main" in variants)
    ways = {"before": Pooled(seeds, tuple(map(figures_before, starts)), (), (), is_start=True)} if starts else {}
    for name in names:
        own = {seed: variants[name] for seed, variants in found.items() if name in variants}
        better, worse = _changed(list(own.values()), alpha)
        uses_labels = any(evaluation.uses_labels for evaluation in own.values())
        figures = tuple(map(figures_after, own.values()))
        ways[name] = Pooled(tuple(own), figures, better, worse, uses_labels=uses_labels)
    return ways


def _changed(evaluations: Sequence[Evaluation], alpha: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    gained: dict[str, int] = {}
    lost: dict[str, int] = {}
    for evaluation in evaluations:
        for language, row in evaluation.languages.items():
            gained[language] = gained.get(language, 0) + row.num_gained
            lost[language] = lost.get(language, 0) + row.num_lost
    p_values = holm({name: mcnemar_of_counts(gained[name], lost[name]) for name in sorted(gained)})
    changed = [name for name, value in p_values.items() if value < alpha]
    better = tuple(name for name in changed if gained[name] > lost[name])
    return better, tuple(name for name in changed if name not in better)


def seeds_table(ways: Mapping[str, Pooled]) -> Table:
    """A row for each variant: mean ± standard deviation over its seeds."""
    header = ["Variant", "Seeds", "Average", "Gap", "Paired gap", "Source", "Worst language", "Better", "Worse"]
    rows = []
    for name, one in ways.items():
        columns: list[list[float | None]] = [
            [figures.average for figures in one.figures],
            [figures.gap for figures in one.figures],
            [figures.paired_gap for figures in one.figures],
            [figures.source for figures in one.figures],
            [figures.worst.accuracy for figures in one.figures],
        ]
        changed = [UNDEFINED, UNDEFINED] if one.is_start else [str(len(one.better)), str(len(one.worse))]
        shown = printable(name) + USES_LABELS * one.uses_labels
        cells = [shown, str(len(one.seeds)), *map(_spread, columns), *changed]
        rows.append(Row(cells, "strong" if name == "main" else ""))
    return Table(header, rows, frozenset({0}))


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return UNDEFINED
    return percent(mean(known)) + (f" ± {percent(stdev(known))}" if len(known) > 1 else "")


def as_json(ways: Mapping[str, Pooled]) -> dict[str, Any]:
    """The same for programs: variant -> seeds, figures of each, languages that changed."""
    return {
        name: {
            "seeds": list(one.seeds),
            "average": [figures.average for figures in one.figures],
            "gap": [figures.gap for figures in one.figures],
            "paired_gap": [figures.paired_gap for figures in one.figures],
            "source": [figures.source for figures in one.figures],
            "worst": [figures.worst.accuracy for figures in one.figures],
            "better": list(one.better),
            "worse": list(one.worse),
            "uses_labels": one.uses_labels,
        }
        for name, one in ways.items()
    }
