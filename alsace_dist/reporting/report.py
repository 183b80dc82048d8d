"""Stage report: what a person reads of a run: report.md, report.html, report.json, report.svg, and the final table."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from alsace_dist.files.manifest import write_json, write_text
from alsace_dist.reporting import plots
from alsace_dist.reporting.verdict import (
    OUTCOMES,
    UNDEFINED,
    Metrics,
    checks,
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
    """A table for any output format. The columns in ``words`` hold words, the others numbers."""

    header: list[str]
    rows: list[Row]
    words: frozenset[int] = frozenset({0})


def language_table(metrics: Metrics, alpha: float = 0.05) -> Table:
    """Language by language, the best before first."""
    with_score = any(row["score"] is not None for row in metrics["languages"].values())
    header = ["Language", "Role", "Before", "After", "Change", "Significance", "p", "Examples"]
    rows = []
    for name, row in _sorted_languages(metrics):
        result = outcome(row, alpha)
        cells = [printable(name), _role(metrics, name) or UNDEFINED, percent(row["before"]), percent(row["after"])]
        cells += [points(row["after"] - row["before"]), OUTCOMES[result], _p_value(row["p_value"])]
        cells.append(f"{row['num_examples']:,}")
        if with_score:
            cells.append(UNDEFINED if row["score"] is None else f"{row['score']:.3f}")
        rows.append(Row(cells, result))
    return Table(header + ["Score"] * with_score, rows, frozenset({0, 1, 5}))


def overall_table(metrics: Metrics) -> Table:
    """The figures over all languages."""
    rows = []
    gap_name = f"Gap ({printable(metrics['source_language'])} minus the others)"
    for name, part in (("Average over languages", metrics["average"]), (gap_name, metrics["gap"])):
        cells = [name, percent(part["before"]), percent(part["after"]), _change(part), interval(part["ci95"])]
        rows.append(Row(cells, "strong"))
    std, worst = metrics["std"], metrics["worst"]
    std_cells = [percent(std["before"]), percent(std["after"]), _change(std)]
    rows.append(Row(["Standard deviation over languages", *std_cells, UNDEFINED]))
    worst_change = points(worst["after"]["accuracy"] - worst["before"]["accuracy"])
    worst_cells = [_worst(metrics, "before"), _worst(metrics, "after"), worst_change]
    rows.append(Row(["Worst language", *worst_cells, UNDEFINED]))
    return Table(["", "Before", "After", "Change", "95 % interval of the change"], rows)


def variant_table(evaluations: Mapping[str, Metrics], alpha: float = 0.05) -> Table:
    """One row per variant, after the model that all of them start from."""
    main = next(iter(evaluations.values()))
    header = ["Variant", "Average", "Gap", "Source", "Worst language", "Better", "Worse", "All three hold"]
    rows = [Row(["before", *_variant_cells(main, "before"), UNDEFINED, UNDEFINED, UNDEFINED])]
    for number, (name, metrics) in enumerate(evaluations.items()):
        counts = [str(len(languages_by(metrics, wanted, alpha))) for wanted in ("better", "worse")]
        holds = "yes" if all(check.holds for check in checks(metrics, alpha)) else "no"
        cells = [printable(name), *_variant_cells(metrics, "after"), *counts, holds]
        rows.append(Row(cells, "strong" if number == 0 else ""))
    return Table(header, rows, frozenset({0, 7}))


def _variant_cells(metrics: Metrics, when: str) -> list[str]:
    numbers = [metrics["average"][when], metrics["gap"][when], _source_accuracy(metrics, when)]
    return [*map(percent, numbers), _worst(metrics, when)]


def _worst(metrics: Metrics, when: str) -> str:
    worst = metrics["worst"][when]
    return f"{percent(worst['accuracy'])} ({printable(worst['language'])})"


def _change(part: Metrics) -> str:
    return UNDEFINED if part["before"] is None or part["after"] is None else points(part["after"] - part["before"])


def _source_accuracy(metrics: Metrics, when: str) -> float | None:
    return metrics["languages"].get(metrics["source_language"], {}).get(when)


def _sorted_languages(metrics: Metrics) -> list[tuple[str, Metrics]]:
    return sorted(metrics["languages"].items(), key=lambda item: (-item[1]["before"], item[0]))


def _all_teach(metrics: Metrics) -> bool:
    return set(metrics["languages"]) <= set(metrics["teachers"])


def _role(metrics: Metrics, language: str) -> str:
    """Source, teacher or both; where every language teaches, the mark would say nothing."""
    teaches = language in metrics["teachers"] and not _all_teach(metrics)
    return ", ".join(["source"] * (language == metrics["source_language"]) + ["teacher"] * teaches)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _teachers(metrics: Metrics) -> str:
    if not metrics["teachers"]:
        return "none"
    names = ", ".join(map(printable, metrics["teachers"]))
    return f"all languages ({names})" if _all_teach(metrics) else names


def summary_lines(metrics: Metrics, alpha: float = 0.05) -> list[str]:
    """Teachers, average, gap and verdict: what stands below the table of languages."""
    lines = [f"Teachers: {_teachers(metrics)}"]
    for name, part in (("Average", metrics["average"]), ("Gap", metrics["gap"])):
        if part["before"] is None or part["after"] is None:
            lines.append(f"{name}: not defined")
            continue
        ends = f"{percent(part['before'])} → {percent(part['after'])}"
        lines.append(f"{name}: {ends}, {_change(part)} points (95 % interval {interval(part['ci95'])})")
    return [*lines, verdict(metrics, alpha)]


def format_table(metrics: Metrics, alpha: float = 0.05) -> "RichTable":
    """The table of languages for a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text  # names of languages are text, never markup

    table = language_table(metrics, alpha)
    styles = {"better": "green", "worse": "bold red", "same": ""}
    shown = RichTable(title="Accuracy by language (%), change in points")
    for number, name in enumerate(table.header[:6]):
        shown.add_column(name, justify="left" if number in table.words else "right", no_wrap=number == 0)
    for row in table.rows:
        shown.add_row(
            *(Text(cell, style=styles[row.kind] if number > 3 else "") for number, cell in enumerate(row.cells[:6]))
        )
    return shown


def format_plain(metrics: Metrics, alpha: float = 0.05) -> str:
    """The table of languages and the lines below it for a log file: columns of spaces, ASCII but for names."""
    table = language_table(metrics, alpha)
    lines = [table.header[:6], *(row.cells[:6] for row in table.rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(6)]
    text = [
        "  ".join(
            cell.ljust(width) if number in table.words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    whole = "\n".join([*text, "", *summary_lines(metrics, alpha)])
    return whole.replace("−", "-").replace(UNDEFINED, "-").replace("→", "->")


def print_summary(metrics: Metrics, console: "Console", alpha: float = 0.05) -> None:
    """Print the final table: in colours and frames on a terminal, as plain text elsewhere."""
    if not (console.is_terminal and console.encoding.startswith("utf")):
        encodable = format_plain(metrics, alpha).encode(console.encoding, "replace").decode(console.encoding)
        console.print(encodable, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(format_table(metrics, alpha))
    for line in summary_lines(metrics, alpha):
        console.print(line, markup=False, highlight=False)


def main_figure(metrics: Metrics, alpha: float = 0.05) -> str:
    """Dumbbell chart of the languages, the best before at the top."""
    rows = []
    for name, row in _sorted_languages(metrics):
        change = points(row["after"] - row["before"])
        note, is_source = _role(metrics, name), name == metrics["source_language"]
        rows.append(plots.Change(name, note, row["before"], row["after"], change, outcome(row, alpha), is_source))
    average, gap = metrics["average"], metrics["gap"]
    subtitle = f"average {points(average['after'] - average['before'])} points"
    if gap["before"] is not None and gap["after"] is not None:
        subtitle += f", gap to {metrics['source_language']} {percent(gap['before'])} → {percent(gap['after'])} points"
    title = "Accuracy by language, before and after self-distillation"
    return plots.dumbbell(title, subtitle, rows, (average["before"], average["after"]), alpha)


def variants_figure(evaluations: Mapping[str, Metrics]) -> str:
    """Average, source and worst language of the model before and of every variant after."""
    main = next(iter(evaluations.values()))

    def spread(name: str, metrics: Metrics, when: str) -> plots.Spread:
        average, worst = metrics["average"][when], metrics["worst"][when]["accuracy"]
        columns = (percent(average), percent(metrics["gap"][when]))
        return plots.Spread(name, average, _source_accuracy(metrics, when), worst, columns, when == "before")

    rows = [spread("before", main, "before")]
    rows += [spread(name, metrics, "after") for name, metrics in evaluations.items()]
    return plots.comparison("Variants: average, source and worst language", rows, ("average", "gap"))


def write_report(
    run_dir: Path, evaluations: Mapping[str, Metrics], details: Mapping[str, object], alpha: float = 0.05
) -> None:
    """Write report.json, report.md, report.html and report.svg into a run's directory.

    ``evaluations``: variant -> content of its metrics.json, the run itself first. report.json holds the first one's
    metrics and, if there are more, these under "variants". ``details``: what to show at the end, where things are.
    ``alpha``: significance level (``evaluate.alpha``).
    """
    main, *others = evaluations
    metrics = dict(evaluations[main])
    if others:
        metrics["variants"] = {name: dict(evaluations[name]) for name in others}
    figure = main_figure(evaluations[main], alpha)
    title = f"Report of {printable(run_dir.resolve().name)}"
    write_text(run_dir / "report.svg", plots.standalone(figure))
    write_text(run_dir / "report.md", _markdown(title, evaluations, details, alpha))
    write_text(run_dir / "report.html", _html(title, figure, evaluations, details, alpha))
    write_json(run_dir / "report.json", metrics)


def _notes(metrics: Metrics, alpha: float) -> list[str]:
    source = printable(metrics["source_language"])
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


def _markdown(title: str, evaluations: Mapping[str, Metrics], details: Mapping[str, object], alpha: float) -> str:
    metrics = next(iter(evaluations.values()))
    parts = [f"# {_escape_markdown(title)}", f"**{_escape_markdown(verdict(metrics, alpha))}**"]
    parts += [_markdown_table(overall_table(metrics)), "![Accuracy by language, before and after](report.svg)"]
    parts += ["## Languages", f"Teachers: {_escape_markdown(_teachers(metrics))}."]
    parts.append(_markdown_table(language_table(metrics, alpha)))
    if len(evaluations) > 1:
        parts += ["## Variants", _markdown_table(variant_table(evaluations, alpha))]
        parts.append(_escape_markdown(VARIANTS_NOTE))
    parts += ["## How to read this", "\n".join(f"- {_escape_markdown(note)}" for note in _notes(metrics, alpha))]
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
    title: str, figure: str, evaluations: Mapping[str, Metrics], details: Mapping[str, object], alpha: float
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    metrics = next(iter(evaluations.values()))
    several, found = len(evaluations) > 1, checks(metrics, alpha)
    template = resources.files("alsace_dist.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        headline=headline(found),
        checks=found,
        warning=warning(found),
        figure=Markup(figure),  # its texts are escaped where they are put in
        overall=overall_table(metrics),
        languages=language_table(metrics, alpha),
        teachers=_teachers(metrics),
        variants_figure=Markup(variants_figure(evaluations)) if several else None,
        variants=variant_table(evaluations, alpha) if several else None,
        variants_note=VARIANTS_NOTE,
        notes=_notes(metrics, alpha),
        details=_detail_rows(details),
    )
