"""Stage report: what a person reads of a run: report.md, report.html, report.json, report.svg, and the final table."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from alsace_dist.config import EvaluateConfig
from alsace_dist.files.evaluation import Evaluation
from alsace_dist.files.manifest import write_json, write_text
from alsace_dist.reporting import markdown, pictures
from alsace_dist.reporting.facts import Facts, cost_table, warning_lines
from alsace_dist.reporting.figures import Picture
from alsace_dist.reporting.tables import (
    Row,
    Table,
    change_of,
    language_table,
    overall_table,
    precision_table,
    rounds_table,
    teachers_in_words,
    variant_table,
)
from alsace_dist.reporting.verdict import (
    AN_ANALYSIS,
    UNDEFINED,
    conditions,
    headline,
    interval,
    percent,
    printable,
    ruled_out,
    verdict,
    warning,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

LEVELS = EvaluateConfig()  # alpha and margin are looked at
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
        lines.append(AN_ANALYSIS)
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


def pictures_of(evaluations: Mapping[str, Evaluation], facts: Facts, alpha: float) -> list[Picture]:
    """All figures of a report, in their order."""
    found = pictures.of_evaluation(next(iter(evaluations.values())), alpha)
    found += facts.pictures.get("selection", ())
    found += facts.pictures.get("training", ())
    return [*found, pictures.of_variants(evaluations)] if len(evaluations) > 1 else found


def write_report(
    run_dir: Path, evaluations: Mapping[str, Evaluation], facts: Facts, levels: EvaluateConfig = LEVELS
) -> None:
    """Write report.json, report.md, report.html and report.svg into a run's directory.

    ``evaluations``: variant -> its evaluation, the run itself first. report.json holds the keys of the first one's
    metrics.json and, if there are more, theirs under "variants"; beside them what is known of the run. ``levels``: the
    section ``evaluate``.
    """
    main, *others = evaluations
    numbers = evaluations[main].as_json()
    if others:
        numbers["variants"] = {name: evaluations[name].as_json() for name in others}
    numbers |= {
        "about": list(facts.about),
        "costs": [one.model_dump() for one in facts.costs],
        "warnings": [{**one.model_dump(), "count": count} for one, count in facts.warnings],
        "reproducibility": dict(facts.again),
    }
    title = f"Report of {printable(run_dir.resolve().name)}"
    languages, *_ = pictures.of_evaluation(evaluations[main], levels.alpha)
    write_text(run_dir / "report.svg", languages.standalone())
    write_text(run_dir / "report.md", _markdown(title, evaluations, facts, levels))
    write_text(run_dir / "report.html", _html(title, evaluations, facts, levels))
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
        *[AN_ANALYSIS] * evaluation.uses_labels,
    ]


def _detail_rows(details: Mapping[str, object]) -> list[tuple[str, str]]:
    def shown(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.1f}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(value)

    return [(printable(name).replace("_", " "), shown(value)) for name, value in details.items()]


def _markdown(title: str, evaluations: Mapping[str, Evaluation], facts: Facts, levels: EvaluateConfig) -> str:
    evaluation = next(iter(evaluations.values()))
    parts = [f"# {markdown.escape(title)}", f"**{markdown.escape(verdict(evaluation, levels.alpha))}**"]
    parts += [markdown.escape(" ".join(facts.about))] if facts.about else []
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
    parts += _titled(facts.tables.get("selection", ()))
    parts += _listed("## Data", [printable(line) for line in facts.data])
    parts += _titled(facts.tables.get("data", ()))
    if facts.costs:
        parts += ["## Cost", markdown.table(cost_table(facts.costs))]
        parts += [markdown.escape(line) for line in facts.speeds]
    parts += _listed("## Warnings", warning_lines(facts.warnings))
    parts += _listed("## How to read this", _notes(evaluation, levels.alpha))
    for head, rows in (("## To run it again", facts.again), ("## Where things are", facts.details)):
        if rows:
            shown = [Row([name, value]) for name, value in _detail_rows(rows)]
            parts += [
                head,
                markdown.table(Table(["What", ""], shown, frozenset({0, 1}))),
            ]
    return "\n\n".join(parts) + "\n"


def _titled(tables: Sequence[tuple[str, Table]]) -> list[str]:
    return [part for title, table in tables for part in (f"{markdown.escape(title)}:", markdown.table(table))]


def _listed(head: str, lines: Sequence[str]) -> list[str]:
    return [head, "\n".join(f"- {markdown.escape(line)}" for line in lines)] if lines else []


def _html(title: str, evaluations: Mapping[str, Evaluation], facts: Facts, levels: EvaluateConfig) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def drawn(found: Sequence[Picture]) -> list[tuple[str, Markup]]:
        return [(one.title, Markup(one.svg())) for one in found]  # matplotlib escapes the texts of a figure

    evaluation = next(iter(evaluations.values()))
    several, found = len(evaluations) > 1, conditions(evaluation, levels.alpha)
    languages, changes = pictures.of_evaluation(evaluation, levels.alpha)
    template = resources.files("alsace_dist.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        headline=headline(found),
        conditions=found,
        warning=warning(found),
        about=facts.about,
        overall=overall_table(evaluation),
        slopes=drawn([languages]),
        languages=language_table(evaluation, levels.alpha),
        intervals=drawn([changes]),
        ruled_out=ruled_out(evaluation, levels.margin),
        rounds=rounds if (rounds := rounds_table(evaluation)).rows else None,
        rounds_note=ROUNDS_NOTE,
        precision=precision_table(evaluation) if evaluation.precision else None,
        precision_note=PRECISION_NOTE,
        teachers=teachers_in_words(evaluation),
        selection=drawn(facts.pictures.get("selection", ())),
        selection_tables=facts.tables.get("selection", ()),
        data_tables=facts.tables.get("data", ()),
        speeds=facts.speeds,
        training=drawn(facts.pictures.get("training", ())),
        compared=drawn([pictures.of_variants(evaluations)] if several else []),
        variants=variant_table(evaluations, levels.alpha) if several else None,
        variants_note=VARIANTS_NOTE,
        data=[printable(line) for line in facts.data],
        costs=cost_table(facts.costs) if facts.costs else None,
        warnings=warning_lines(facts.warnings),
        notes=_notes(evaluation, levels.alpha),
        again=_detail_rows(facts.again),
        details=_detail_rows(facts.details),
    )
