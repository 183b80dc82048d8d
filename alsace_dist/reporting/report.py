"""Stage report: what a person reads of a run: report.md, report.html, report.json, report.svg, and the final table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alsace_dist.files.evaluation import (
    AverageChange,
    Evaluation,
    GapChange,
    LanguageChange,
    SpreadChange,
    WorstLanguage,
)
from alsace_dist.files.manifest import write_json, write_text
from alsace_dist.reporting import plots
from alsace_dist.reporting.verdict import (
    OUTCOMES,
    UNDEFINED,
    conditions,
    headline,
    interval,
    languages_by,
    outcome,
    percent,
    points,
    printable,
    verdict,
    warning,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

VARIANTS_NOTE = (
    "Better and worse count the languages that changed significantly against before. All three conditions: "
    "the average up, the gap smaller, no language significantly worse."
)


@dataclass(frozen=True)
class Row:
    """Cells of a table, as texts; ``kind`` says how to emphasise the row: an outcome, "strong" or nothing."""

    cells: list[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table for any output format. The columns in ``words`` hold words, all other columns numbers."""

    header: list[str]
    rows: list[Row]
    words: frozenset[int] = frozenset({0})


def language_table(evaluation: Evaluation, alpha: float = 0.05) -> Table:
    """Language by language, the best before first."""
    with_score = any(row.score is not None for row in evaluation.languages.values())
    header = ["Language", "Role", "Before", "After", "Change", "Significance", "p", "Examples"]
    rows = []
    for name, row in _sorted_languages(evaluation):
        result = outcome(row, alpha)
        cells = [printable(name), _role(evaluation, name) or UNDEFINED, percent(row.before), percent(row.after)]
        cells += [points(row.after - row.before), OUTCOMES[result], _p_value(row.p_value)]
        cells.append(f"{row.num_examples:,}")
        if with_score:
            cells.append(UNDEFINED if row.score is None else f"{row.score:.3f}")
        rows.append(Row(cells, result))
    return Table(header + ["Score"] * with_score, rows, frozenset({0, 1, 5}))


def overall_table(evaluation: Evaluation) -> Table:
    """The figures over all languages."""
    rows = []
    gap_name = f"Gap ({printable(evaluation.source_language)} minus the others)"
    for name, part in (("Average over languages", evaluation.average), (gap_name, evaluation.gap)):
        cells = [name, percent(part.before), percent(part.after), _change(part), interval(part.ci95)]
        rows.append(Row(cells, "strong"))
    std, worst = evaluation.std, evaluation.worst
    std_cells = [percent(std.before), percent(std.after), _change(std)]
    rows.append(Row(["Standard deviation over languages", *std_cells, UNDEFINED]))
    worst_change = points(worst.after.accuracy - worst.before.accuracy)
    worst_cells = [_worst(worst.before), _worst(worst.after), worst_change]
    rows.append(Row(["Worst language", *worst_cells, UNDEFINED]))
    return Table(["", "Before", "After", "Change", "95 % interval of the change"], rows)


def variant_table(evaluations: Mapping[str, Evaluation], alpha: float = 0.05) -> Table:
    """One row per variant, after a row of the model that all variants start from."""
    main = next(iter(evaluations.values()))
    header = ["Variant", "Average", "Gap", "Source", "Worst language", "Better", "Worse", "All three hold"]
    rows = [Row(["before", *_variant_cells(_before(main)), UNDEFINED, UNDEFINED, UNDEFINED])]
    for number, (name, evaluation) in enumerate(evaluations.items()):
        counts = [str(len(languages_by(evaluation, wanted, alpha))) for wanted in ("better", "worse")]
        holds = "yes" if all(one.holds for one in conditions(evaluation, alpha)) else "no"
        cells = [printable(name), *_variant_cells(_after(evaluation)), *counts, holds]
        rows.append(Row(cells, "strong" if number == 0 else ""))
    return Table(header, rows, frozenset({0, 7}))


class _Figures(NamedTuple):
    """An evaluation's figures over all languages at one of its two moments."""

    average: float
    gap: float | None
    source: float | None
    worst: WorstLanguage


def _before(evaluation: Evaluation) -> _Figures:
    source = evaluation.languages.get(evaluation.source_language)
    gap, worst = evaluation.gap.before, evaluation.worst.before
    return _Figures(evaluation.average.before, gap, source.before if source else None, worst)


def _after(evaluation: Evaluation) -> _Figures:
    source = evaluation.languages.get(evaluation.source_language)
    gap, worst = evaluation.gap.after, evaluation.worst.after
    return _Figures(evaluation.average.after, gap, source.after if source else None, worst)


def _variant_cells(figures: _Figures) -> list[str]:
    return [percent(figures.average), percent(figures.gap), percent(figures.source), _worst(figures.worst)]


def _worst(worst: WorstLanguage) -> str:
    return f"{percent(worst.accuracy)} ({printable(worst.language)})"


def _change(part: AverageChange | GapChange | SpreadChange) -> str:
    return UNDEFINED if part.before is None or part.after is None else points(part.after - part.before)


def _sorted_languages(evaluation: Evaluation) -> list[tuple[str, LanguageChange]]:
    return sorted(evaluation.languages.items(), key=lambda item: (-item[1].before, item[0]))


def _all_teach(evaluation: Evaluation) -> bool:
    return set(evaluation.languages) <= set(evaluation.teachers)


def _role(evaluation: Evaluation, language: str) -> str:
    """Source, teacher or both; where every language teaches, the mark would say nothing."""
    teaches = language in evaluation.teachers and not _all_teach(evaluation)
    return ", ".join(["source"] * (language == evaluation.source_language) + ["teacher"] * teaches)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _teachers(evaluation: Evaluation) -> str:
    if not evaluation.teachers:
        return "none"
    names = ", ".join(map(printable, evaluation.teachers))
    return f"all languages ({names})" if _all_teach(evaluation) else names


def summary_lines(evaluation: Evaluation, alpha: float = 0.05) -> list[str]:
    """Teachers, average, gap and verdict: what stands below the table of languages."""
    lines = [f"Teachers: {_teachers(evaluation)}"]
    for name, part in (("Average", evaluation.average), ("Gap", evaluation.gap)):
        if part.before is None or part.after is None:
            lines.append(f"{name}: not defined")
            continue
        ends = f"{percent(part.before)} → {percent(part.after)}"
        lines.append(f"{name}: {ends}, {_change(part)} points (95 % interval {interval(part.ci95)})")
    return [*lines, verdict(evaluation, alpha)]


def format_table(evaluation: Evaluation, alpha: float = 0.05) -> "RichTable":
    """The table of languages for a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text  # names of languages are text, never markup

    table = language_table(evaluation, alpha)
    styles = {"better": "green", "worse": "bold red", "same": ""}
    shown = RichTable(title="Accuracy by language (%), change in points")
    for number, name in enumerate(table.header[:6]):
        shown.add_column(name, justify="left" if number in table.words else "right", no_wrap=number == 0)
    for row in table.rows:
        shown.add_row(
            *(Text(cell, style=styles[row.kind] if number > 3 else "") for number, cell in enumerate(row.cells[:6]))
        )
    return shown


def format_plain(evaluation: Evaluation, alpha: float = 0.05) -> str:
    """The table of languages and the lines below it for a log file: columns of spaces, ASCII but for names."""
    table = language_table(evaluation, alpha)
    lines = [table.header[:6], *(row.cells[:6] for row in table.rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(6)]
    text = [
        "  ".join(
            cell.ljust(width) if number in table.words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    whole = "\n".join([*text, "", *summary_lines(evaluation, alpha)])
    return whole.replace("−", "-").replace(UNDEFINED, "-").replace("→", "->")


def print_summary(evaluation: Evaluation, console: "Console", alpha: float = 0.05) -> None:
    """Print the final table: in colours and frames on a terminal, as plain text elsewhere."""
    if not (console.is_terminal and console.encoding.startswith("utf")):
        encodable = format_plain(evaluation, alpha).encode(console.encoding, "replace").decode(console.encoding)
        console.print(encodable, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(format_table(evaluation, alpha))
    for line in summary_lines(evaluation, alpha):
        console.print(line, markup=False, highlight=False)


def main_figure(evaluation: Evaluation, alpha: float = 0.05) -> str:
    """Dumbbell chart of the languages, the best before at the top."""
    rows = []
    for name, row in _sorted_languages(evaluation):
        change = points(row.after - row.before)
        note, is_source = _role(evaluation, name), name == evaluation.source_language
        rows.append(plots.Change(name, note, row.before, row.after, change, outcome(row, alpha), is_source))
    average, gap = evaluation.average, evaluation.gap
    subtitle = f"average {points(average.after - average.before)} points"
    if gap.before is not None and gap.after is not None:
        subtitle += f", gap to {evaluation.source_language} {percent(gap.before)} → {percent(gap.after)} points"
    title = "Accuracy by language, before and after self-distillation"
    return plots.dumbbell(title, subtitle, rows, (average.before, average.after), alpha)


def variants_figure(evaluations: Mapping[str, Evaluation]) -> str:
    """Average, source and worst language of the model before and of every variant after."""
    main = next(iter(evaluations.values()))

    def spread(name: str, figures: _Figures, is_before: bool) -> plots.Spread:
        columns = (percent(figures.average), percent(figures.gap))
        return plots.Spread(name, figures.average, figures.source, figures.worst.accuracy, columns, is_before)

    rows = [spread("before", _before(main), True)]
    rows += [spread(name, _after(evaluation), False) for name, evaluation in evaluations.items()]
    return plots.comparison("Variants: average, source and worst language", rows, ("average", "gap"))


def write_report(
    run_dir: Path,
    evaluations: Mapping[str, Evaluation],
    details: Mapping[str, object],
    alpha: float = 0.05,
    data: Sequence[str] = (),
) -> None:
    """Write report.json, report.md, report.html and report.svg into a run's directory.

    ``evaluations``: variant -> its evaluation, the run itself first. report.json holds the keys of the first one's
    metrics.json and, if there are more, theirs under "variants". ``details``: what to show at the end, where
    things are. ``alpha``: significance level (``evaluate.alpha``). ``data``: what was found in the data.
    """
    main, *others = evaluations
    numbers = evaluations[main].as_json()
    if others:
        numbers["variants"] = {name: evaluations[name].as_json() for name in others}
    figure = main_figure(evaluations[main], alpha)
    title = f"Report of {printable(run_dir.resolve().name)}"
    write_text(run_dir / "report.svg", plots.standalone(figure))
    write_text(run_dir / "report.md", _markdown(title, evaluations, details, alpha, data))
    write_text(run_dir / "report.html", _html(title, figure, evaluations, details, alpha, data))
    write_json(run_dir / "report.json", numbers)


def _notes(evaluation: Evaluation, alpha: float) -> list[str]:
    source = printable(evaluation.source_language)
    return [
        "Accuracy is in percent of a language's test examples; changes are in points (percentage points). "
        "Before and after are measured on the same examples.",
        "The average is the mean over languages, each counting the same. "
        f"The gap is the accuracy in the source language ({source}) minus the mean accuracy in the others.",
        f"Significant means p < {alpha:g} in the exact McNemar test, two-sided, Holm-corrected over the languages.",
        "95 % intervals are of the change, by percentile bootstrap over parallel groups with all their languages.",
        "A smaller gap counts only with a higher average and no language significantly worse: "
        "it also closes when the source language falls.",
    ]


def _detail_rows(details: Mapping[str, object]) -> list[tuple[str, str]]:
    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(value)

    return [(printable(name).replace("_", " "), shown(value)) for name, value in details.items()]


def _markdown(
    title: str,
    evaluations: Mapping[str, Evaluation],
    details: Mapping[str, object],
    alpha: float,
    data: Sequence[str],
) -> str:
    evaluation = next(iter(evaluations.values()))
    parts = [f"# {_escape_markdown(title)}", f"**{_escape_markdown(verdict(evaluation, alpha))}**"]
    parts += [_markdown_table(overall_table(evaluation)), "![Accuracy by language, before and after](report.svg)"]
    parts += ["## Languages", f"Teachers: {_escape_markdown(_teachers(evaluation))}."]
    parts.append(_markdown_table(language_table(evaluation, alpha)))
    if len(evaluations) > 1:
        parts += ["## Variants", _markdown_table(variant_table(evaluations, alpha))]
        parts.append(_escape_markdown(VARIANTS_NOTE))
    if data:
        parts += ["## Data", "\n".join(f"- {_escape_markdown(printable(line))}" for line in data)]
    parts += ["## How to read this", "\n".join(f"- {_escape_markdown(note)}" for note in _notes(evaluation, alpha))]
    if details:
        rows = [Row([name, value]) for name, value in _detail_rows(details)]
        parts += ["## Where things are", _markdown_table(Table(["What", "Where"], rows, frozenset({0, 1})))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [[_escape_markdown(name) for name in table.header]]
    lines.append(["---" if number in table.words else "---:" for number in range(len(table.header))])
    for row in table.rows:
        mark = "**" if row.kind == "strong" else ""
        lines.append([f"{mark}{_escape_markdown(cell)}{mark}" for cell in row.cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape_markdown(text: str) -> str:
    return "".join("\\" + character if character in r"\`*[]<>|&" else character for character in text)


def _html(
    title: str,
    figure: str,
    evaluations: Mapping[str, Evaluation],
    details: Mapping[str, object],
    alpha: float,
    data: Sequence[str],
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    evaluation = next(iter(evaluations.values()))
    several, found = len(evaluations) > 1, conditions(evaluation, alpha)
    template = resources.files("alsace_dist.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        headline=headline(found),
        conditions=found,
        warning=warning(found),
        figure=Markup(figure),  # plots.py escapes the texts of the figure
        overall=overall_table(evaluation),
        languages=language_table(evaluation, alpha),
        teachers=_teachers(evaluation),
        variants_figure=Markup(variants_figure(evaluations)) if several else None,
        variants=variant_table(evaluations, alpha) if several else None,
        variants_note=VARIANTS_NOTE,
        data=[printable(line) for line in data],
        notes=_notes(evaluation, alpha),
        details=_detail_rows(details),
    )
