"""Evaluations as tables, for any format of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from alsace_dist.files.evaluation import (
    ALL,
    AverageChange,
    Evaluation,
    GapChange,
    LanguageChange,
    Round,
    SpreadChange,
    WorstLanguage,
)
from alsace_dist.reporting.verdict import (
    OUTCOMES,
    UNDEFINED,
    conditions,
    interval,
    languages_by,
    outcome,
    percent,
    points,
    printable,
)


@dataclass(frozen=True)
class Row:
    """Cells of a table, as texts; ``kind`` says how to emphasise the row: an outcome, "strong" or nothing."""

    cells: list[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table for any output format. The columns in ``words`` hold words, all other columns numbers; those in ``minor``
    may be left out where there is little room."""

    header: list[str]
    rows: list[Row]
    words: frozenset[int] = frozenset({0})
    minor: frozenset[int] = frozenset()


def language_table(evaluation: Evaluation, alpha: float = 0.05) -> Table:
    """Language by language, the best before first."""
    with_score = any(row.score is not None for row in evaluation.languages.values())
    header = ["Language", "Role", "Before", "After", "Change", "Significance", "p", "95 % interval", "Examples"]
    rows = []
    for name, row in sorted_languages(evaluation):
        result = outcome(row, alpha)
        cells = [printable(name), role_of(evaluation, name) or UNDEFINED, percent(row.before), percent(row.after)]
        cells += [points(row.after - row.before), OUTCOMES[result], _p_value(row.p_value)]
        cells += [interval(row.ci95), f"{row.num_examples:,}"]
        if with_score:
            cells.append(UNDEFINED if row.score is None else f"{row.score:.3f}")
        rows.append(Row(cells, result))
    return Table(header + ["Score"] * with_score, rows, frozenset({0, 1, 5}), frozenset({1, 5, 6, 7, 8, 9}))


def precision_table(evaluation: Evaluation) -> Table:
    """Precision by language and category; all of it last. Empty where the evaluation has none."""
    rows = []
    for language in (name for name, _ in sorted_languages(evaluation) if name in evaluation.precision):
        for category, one in sorted(evaluation.precision[language].items(), key=lambda item: (item[0] == ALL, item[0])):
            cells = [printable(language), printable(category), percent(one.before), percent(one.after)]
            cells += [points(one.after - one.before), f"{one.num_right:,}"]
            rows.append(Row(cells, "strong" if category == ALL else ""))
    header = ["Language", "Category", "Before", "After", "Change", "Right answers"]
    return Table(header, rows, frozenset({0, 1}), frozenset({5}))


def overall_table(evaluation: Evaluation) -> Table:
    """The figures over all languages."""
    rows = []
    gap_name = f"Gap ({printable(evaluation.source_language)} minus the others)"
    parts: list[tuple[str, AverageChange | GapChange]] = [("Average over languages", evaluation.average)]
    parts.append((gap_name, evaluation.gap))
    if evaluation.lacks_translations:
        parts.append(("Paired gap (on the groups that both languages have)", evaluation.paired_gap))
    for name, part in parts:
        cells = [name, percent(part.before), percent(part.after), change_of(part), interval(part.ci95)]
        rows.append(Row(cells, "strong"))
    std, worst = evaluation.std, evaluation.worst
    std_cells = [percent(std.before), percent(std.after), change_of(std)]
    rows.append(Row(["Standard deviation over languages", *std_cells, UNDEFINED]))
    worst_change = points(worst.after.accuracy - worst.before.accuracy)
    worst_cells = [_worst(worst.before), _worst(worst.after), worst_change]
    rows.append(Row(["Worst language", *worst_cells, UNDEFINED]))
    return Table(["", "Before", "After", "Change", "95 % interval of the change"], rows, minor=frozenset({4}))


def rounds_table(evaluation: Evaluation) -> Table:
    """Every language's score in the selection of each round, of teachers in brackets. Empty if there was one round."""
    rounds = evaluation.rounds if len(evaluation.rounds) > 1 else []
    header = ["Language", *(f"Score in round {number}" for number in range(1, len(rounds) + 1))]
    rows = [
        Row([printable(name), *(_score_in(one, name) for one in rounds)])
        for name, _ in (sorted_languages(evaluation) if rounds else [])
    ]
    return Table(header, rows, frozenset({0}))


def _score_in(one: Round, language: str) -> str:
    if language not in one.scores:
        return UNDEFINED
    shown = f"{one.scores[language]:.3f}"
    return f"[{shown}]" if language in one.teachers else shown


USES_LABELS = " (uses labels)"  # behind the name of what is an analysis


def variant_table(evaluations: Mapping[str, Evaluation], alpha: float = 0.05) -> Table:
    """One row per variant, after a row of the model that all variants start from."""
    main = next(iter(evaluations.values()))
    header = ["Variant", "Average", "Gap", "Source", "Worst language", "Better", "Worse", "All three hold"]
    rows = [Row(["before", *_variant_cells(figures_before(main)), UNDEFINED, UNDEFINED, UNDEFINED])]
    for number, (name, evaluation) in enumerate(evaluations.items()):
        counts = [str(len(languages_by(evaluation, wanted, alpha))) for wanted in ("better", "worse")]
        holds = "yes" if all(one.holds for one in conditions(evaluation, alpha)) else "no"
        shown = printable(name) + USES_LABELS * evaluation.uses_labels
        cells = [shown, *_variant_cells(figures_after(evaluation)), *counts, holds]
        rows.append(Row(cells, "strong" if number == 0 else ""))
    return Table(header, rows, frozenset({0, 7}), frozenset({3, 4, 5, 6}))


class Figures(NamedTuple):
    """An evaluation's figures over all languages at one of its two moments."""

    average: float
    gap: float | None
    paired_gap: float | None
    source: float | None
    worst: WorstLanguage


def figures_before(evaluation: Evaluation) -> Figures:
    """Of the model that a run starts from."""
    source = evaluation.languages.get(evaluation.source_language)
    gap, paired, worst = evaluation.gap.before, evaluation.paired_gap.before, evaluation.worst.before
    return Figures(evaluation.average.before, gap, paired, source.before if source else None, worst)


def figures_after(evaluation: Evaluation) -> Figures:
    """Of the distilled model."""
    source = evaluation.languages.get(evaluation.source_language)
    gap, paired, worst = evaluation.gap.after, evaluation.paired_gap.after, evaluation.worst.after
    return Figures(evaluation.average.after, gap, paired, source.after if source else None, worst)


def _variant_cells(figures: Figures) -> list[str]:
    return [percent(figures.average), percent(figures.gap), percent(figures.source), _worst(figures.worst)]


def _worst(worst: WorstLanguage) -> str:
    return f"{percent(worst.accuracy)} ({printable(worst.language)})"


def change_of(part: AverageChange | GapChange | SpreadChange) -> str:
    """A change in points."""
    return UNDEFINED if part.before is None or part.after is None else points(part.after - part.before)


def sorted_languages(evaluation: Evaluation) -> list[tuple[str, LanguageChange]]:
    """Languages, the best before first."""
    return sorted(evaluation.languages.items(), key=lambda item: (-item[1].before, item[0]))


def _all_teach(evaluation: Evaluation) -> bool:
    return set(evaluation.languages) <= set(evaluation.teachers)


def role_of(evaluation: Evaluation, language: str) -> str:
    """Source, teacher or both; where every language teaches, the mark would say nothing."""
    teaches = language in evaluation.teachers and not _all_teach(evaluation)
    return ", ".join(["source"] * (language == evaluation.source_language) + ["teacher"] * teaches)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def teachers_in_words(evaluation: Evaluation) -> str:
    """The teachers of the first round."""
    if not evaluation.teachers:
        return "none"
    names = ", ".join(map(printable, evaluation.teachers))
    return f"all languages ({names})" if _all_teach(evaluation) else names
