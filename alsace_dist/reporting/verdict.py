"""Evaluations in words: percent and points, significantly better or worse, and the verdict on a run.

Changes are in *points* (percentage points). *Significantly* means the exact McNemar test, Holm-corrected over
languages. A smaller gap is never praised alone, since it also closes when the source language falls: the verdict asks
for the average up, the gap smaller and no language significantly worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alsace_dist.files.evaluation import AverageChange, Evaluation, GapChange, LanguageChange
from alsace_dist.reporting.statistics import most_lost

Outcome = Literal["better", "worse", "same"]

OUTCOMES: dict[Outcome, str] = {
    "better": "significantly better",
    "worse": "significantly worse",
    "same": "no significant change",
}
UNDEFINED = "–"
FEW = 30  # examples, below which a percentile bootstrap knows too few results: its intervals are too narrow
AN_ANALYSIS = "This run looked at labels of the unlabeled groups: it is an analysis, not the method."


@dataclass(frozen=True)
class Condition:
    """One of the three conditions of success, as a clause of the verdict."""

    holds: bool
    clause: str


def printable(text: object) -> str:
    """Text without control characters, which are no XML and could steer a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in str(text))


def percent(value: float | None) -> str:
    """An accuracy in [0, 1], or a difference of two, as percent without the sign %."""
    if value is None:
        return UNDEFINED
    return f"{round(100 * value, 1) + 0.0:.1f}".replace("-", "−")  # + 0.0: no negative zero


def points(change: float | None) -> str:
    """A change of accuracy in percentage points, with its sign."""
    if change is None:
        return UNDEFINED
    rounded = round(100 * change, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def interval(ci95: Sequence[float] | None) -> str:
    """A 95 % interval of a change, in points."""
    return UNDEFINED if ci95 is None else f"{points(ci95[0])} to {points(ci95[1])}"


def outcome(row: LanguageChange, alpha: float) -> Outcome:
    """Whether a language changed significantly (Holm-adjusted p below alpha), and which way."""
    if row.p_value >= alpha:
        return "same"
    return "better" if row.after > row.before else "worse"


def languages_by(evaluation: Evaluation, wanted: Outcome, alpha: float) -> list[str]:
    """Languages with that outcome, by name."""
    return [name for name, row in sorted(evaluation.languages.items()) if outcome(row, alpha) == wanted]


def conditions(evaluation: Evaluation, alpha: float = 0.05) -> list[Condition]:
    """The three conditions: average up, gap smaller (both with 95 % intervals that exclude 0), nobody worse."""
    worse = languages_by(evaluation, "worse", alpha)
    nobody_worse = Condition(True, "no language is significantly worse")
    if worse:
        changes = [
            f"{printable(name)} {points(evaluation.languages[name].after - evaluation.languages[name].before)}"
            for name in worse
        ]
        subject = "1 language is" if len(worse) == 1 else f"{len(worse)} languages are"
        nobody_worse = Condition(False, f"{subject} significantly worse ({', '.join(changes)} points)")
    return [_average_went_up(evaluation.average), _gap_shrank(evaluation.gap), nobody_worse]


def _average_went_up(average: AverageChange) -> Condition:
    change = average.after - average.before
    size = percent(abs(change))
    low, high = average.ci95
    if low > 0:
        return Condition(True, f"the average went up by {size} points")
    if high < 0:
        return Condition(False, f"the average went down by {size} points")
    return Condition(
        False, f"the average did not clearly change ({points(change)} points, interval {interval([low, high])})"
    )


def _gap_shrank(gap: GapChange) -> Condition:
    if gap.before is None or gap.after is None or gap.ci95 is None:
        return Condition(False, "the gap is not defined (it needs the source language and another one)")
    ends = f"from {percent(gap.before)} to {percent(gap.after)} points"
    low, high = gap.ci95
    if low <= 0 <= high:
        return Condition(
            False, f"the gap did not clearly change ({ends}, interval of the change {interval([low, high])})"
        )
    shrank = abs(gap.after) < abs(gap.before)
    return Condition(shrank, f"the gap {'shrank' if shrank else 'grew'} {ends}")


def ruled_out(evaluation: Evaluation, margin: float) -> str:
    """In which languages a loss of a margin or more can be ruled out (non-inferiority): "nobody is significantly worse"
    also holds where a test set is too small to see a loss."""
    loss = f"a loss of {percent(margin)} points or more"
    losses = {
        name: most_lost(row.num_gained, row.num_lost, row.num_examples)
        for name, row in sorted(evaluation.languages.items())
    }
    open_ones = {name: most for name, most in losses.items() if most >= margin}
    most_examples = max(row.num_examples for row in evaluation.languages.values())
    few = f" With {most_examples} examples the intervals of average and gap are too narrow." * (most_examples < FEW)
    if not open_ones:
        return f"In every language {loss} can be ruled out (95 % score interval).{few}"
    number = f"{len(evaluation.languages) - len(open_ones)} of {len(evaluation.languages)} languages"
    shown = ", ".join(f"{printable(name)} (up to {percent(most)})" for name, most in list(open_ones.items())[:5])
    more = f", and {len(open_ones) - 5} more" if len(open_ones) > 5 else ""
    return f"In {number} {loss} can be ruled out (95 % score interval), not in {shown}{more}.{few}"


def headline(found: Sequence[Condition]) -> str:
    """How many of the three conditions hold, in words."""
    number = sum(one.holds for one in found)
    if number == len(found):
        return "All three conditions hold"
    return {0: "None of the three conditions holds", 1: "Only one of the three conditions holds"}.get(
        number, "Only two of the three conditions hold"
    )


def warning(found: Sequence[Condition]) -> str:
    """What to say of a smaller gap without the other two conditions."""
    return "A smaller gap alone proves nothing." if found[1].holds and not all(one.holds for one in found) else ""


def verdict(evaluation: Evaluation, alpha: float = 0.05) -> str:
    """One sentence that names all three conditions, those that hold first."""
    found = conditions(evaluation, alpha)
    holding = [one.clause for one in found if one.holds]
    failing = [one.clause for one in found if not one.holds]
    clauses = ", but ".join(_enumerate(clauses) for clauses in (holding, failing) if clauses)
    return f"{headline(found)}: {clauses}. {warning(found)}".rstrip()


def _enumerate(clauses: Sequence[str]) -> str:
    return " and ".join(clauses) if len(clauses) < 3 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
