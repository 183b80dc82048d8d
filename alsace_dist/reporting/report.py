"""Stage report: what a person reads of a run: report.md, report.html, report.json, report.svg, and the final table."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from alsace_dist.config import EvaluateConfig
from alsace_dist.files.evaluation import (
    Evaluation,
)
from alsace_dist.files.manifest import write_json, write_text
from alsace_dist.reporting import markdown, plots
from alsace_dist.reporting.tables import (
    Figures,
    Row,
    Table,
    change_of,
    figures_after,
    figures_before,
    language_table,
    overall_table,
    precision_table,
    role_of,
    rounds_table,
    sorted_languages,
    teachers_in_words,
    variant_table,
)
from alsace_dist.reporting.verdict import (
    UNDEFINED,
    conditions,
    headline,
    interval,
    outcome,
    percent,
    points,
    printable,
    ruled_out,
    verdict,
    warning,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

LEVELS = EvaluateConfig()  # alpha and margin are looked at
USES_LABELS = "This run looked at labels of the unlabeled groups: it is an analysis, not the method."
PRECISION_NOTE = (
    "Where several answers are right: the share of the right answers that are among as many best ones, by category. "
    "Accuracy, above, asks whether the best answer is a right one."
)
ROUNDS_NOTE = "Scores in the selection of each round, those of teachers in brackets."
VARIANTS_NOTE = (
    "Better and worse count the languages that changed significantly against before. All three conditions: "
    "the average up, the gap smaller, no language significantly worse."
)


def summary_lines(evaluation: Evaluation, levels: EvaluateConfig = LEVELS) -> list[str]:
    """Teachers, average, gap and verdict: what stands below the table of languages."""
    lines = [f"Teachers: {teachers_in_words(evaluation)}"]
    for name, part in (("Average", evaluation.average), ("Gap", evaluation.gap)):
        if part.before is None or part.after is None:
            lines.append(f"{name}: not defined")
            continue
        ends = f"{percent(part.before)} → {percent(part.after)}"
        lines.append(f"{name}: {ends}, {change_of(part)} points (95 % interval {interval(part.ci95)})")
    if evaluation.uses_labels:
        lines.append(USES_LABELS)
    return [*lines, ruled_out(evaluation, levels.margin), verdict(evaluation, levels.alpha)]


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


def format_plain(evaluation: Evaluation, levels: EvaluateConfig = LEVELS) -> str:
    """The table of languages and the lines below it for a log file: columns of spaces, ASCII but for names."""
    table = language_table(evaluation, levels.alpha)
    lines = [table.header[:6], *(row.cells[:6] for row in table.rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(6)]
    text = [
        "  ".join(
            cell.ljust(width) if number in table.words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    whole = "\n".join([*text, "", *summary_lines(evaluation, levels)])
    return whole.replace("−", "-").replace(UNDEFINED, "-").replace("→", "->")


def print_summary(evaluation: Evaluation, console: "Console", levels: EvaluateConfig = LEVELS) -> None:
    """Print the final table: in colours and frames on a terminal, as plain text elsewhere."""
    if not (console.is_terminal and console.encoding.startswith("utf")):
        encodable = format_plain(evaluation, levels).encode(console.encoding, "replace").decode(console.encoding)
        console.print(encodable, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(format_table(evaluation, levels.alpha))
    for line in summary_lines(evaluation, levels):
        console.print(line, markup=False, highlight=False)


def main_figure(evaluation: Evaluation, alpha: float = 0.05) -> str:
    """Dumbbell chart of the languages, the best before at the top."""
    rows = []
    for name, row in sorted_languages(evaluation):
        change = points(row.after - row.before)
        note, is_source = role_of(evaluation, name), name == evaluation.source_language
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

    def spread(name: str, figures: Figures, is_before: bool) -> plots.Spread:
        columns = (percent(figures.average), percent(figures.gap))
        return plots.Spread(name, figures.average, figures.source, figures.worst.accuracy, columns, is_before)

    rows = [spread("before", figures_before(main), True)]
    rows += [spread(name, figures_after(evaluation), False) for name, evaluation in evaluations.items()]
    return plots.comparison("Variants: average, source and worst language", rows, ("average", "gap"))


def write_report(
    run_dir: Path,
    evaluations: Mapping[str, Evaluation],
    details: Mapping[str, object],
    levels: EvaluateConfig = LEVELS,
    data: Sequence[str] = (),
) -> None:
    """Write report.json, report.md, report.html and report.svg into a run's directory.

    ``evaluations``: variant -> its evaluation, the run itself first. report.json holds the keys of the first one's
    metrics.json and, if there are more, theirs under "variants". ``details``: what to show at the end, where
    things are. ``levels``: the section ``evaluate``. ``data``: what was found in the data.
    """
    main, *others = evaluations
    numbers = evaluations[main].as_json()
    if others:
        numbers["variants"] = {name: evaluations[name].as_json() for name in others}
    figure = main_figure(evaluations[main], levels.alpha)
    title = f"Report of {printable(run_dir.resolve().name)}"
    write_text(run_dir / "report.svg", plots.standalone(figure))
    write_text(run_dir / "report.md", _markdown(title, evaluations, details, levels, data))
    write_text(run_dir / "report.html", _html(title, figure, evaluations, details, levels, data))
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
        *[USES_LABELS] * evaluation.uses_labels,
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
    levels: EvaluateConfig,
    data: Sequence[str],
) -> str:
    evaluation = next(iter(evaluations.values()))
    parts = [f"# {markdown.escape(title)}", f"**{markdown.escape(verdict(evaluation, levels.alpha))}**"]
    parts += [markdown.table(overall_table(evaluation)), "![Accuracy by language, before and after](report.svg)"]
    parts += ["## Languages", f"Teachers: {markdown.escape(teachers_in_words(evaluation))}."]
    parts += [markdown.table(language_table(evaluation, levels.alpha))]
    parts.append(markdown.escape(ruled_out(evaluation, levels.margin)))
    if (rounds := rounds_table(evaluation)).rows:
        parts += [ROUNDS_NOTE, markdown.table(rounds)]
    if evaluation.precision:
        parts += ["## Precision", markdown.escape(PRECISION_NOTE), markdown.table(precision_table(evaluation))]
    if len(evaluations) > 1:
        parts += ["## Variants", markdown.table(variant_table(evaluations, levels.alpha))]
        parts.append(markdown.escape(VARIANTS_NOTE))
    if data:
        parts += ["## Data", "\n".join(f"- {markdown.escape(printable(line))}" for line in data)]
    parts += [
        "## How to read this",
        "\n".join(f"- {markdown.escape(note)}" for note in _notes(evaluation, levels.alpha)),
    ]
    if details:
        rows = [Row([name, value]) for name, value in _detail_rows(details)]
        parts += ["## Where things are", markdown.table(Table(["What", "Where"], rows, frozenset({0, 1})))]
    return "\n\n".join(parts) + "\n"


def _html(
    title: str,
    figure: str,
    evaluations: Mapping[str, Evaluation],
    details: Mapping[str, object],
    levels: EvaluateConfig,
    data: Sequence[str],
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    evaluation = next(iter(evaluations.values()))
    several, found = len(evaluations) > 1, conditions(evaluation, levels.alpha)
    template = resources.files("alsace_dist.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        headline=headline(found),
        conditions=found,
        warning=warning(found),
        figure=Markup(figure),  # plots.py escapes the texts of the figure
        overall=overall_table(evaluation),
        languages=language_table(evaluation, levels.alpha),
        ruled_out=ruled_out(evaluation, levels.margin),
        rounds=rounds if (rounds := rounds_table(evaluation)).rows else None,
        rounds_note=ROUNDS_NOTE,
        precision=precision_table(evaluation) if evaluation.precision else None,
        precision_note=PRECISION_NOTE,
        teachers=teachers_in_words(evaluation),
        variants_figure=Markup(variants_figure(evaluations)) if several else None,
        variants=variant_table(evaluations, levels.alpha) if several else None,
        variants_note=VARIANTS_NOTE,
        data=[printable(line) for line in data],
        notes=_notes(evaluation, levels.alpha),
        details=_detail_rows(details),
    )
