"""Two SVG figures, built as strings: accuracies before and after by language, and a comparison of variants.

The colours are Okabe and Ito's, which colour-blind people can tell apart, and shape and fill repeat what colour says.
A figure brings its own background, so that it is legible wherever it is embedded, and follows the reader's light or
dark preference. Colours stand in plain class rules because many SVG programs know no CSS variables.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from alsace_dist.reporting.verdict import Outcome, printable

WIDTH, PADDING, ROW_HEIGHT = 760, 24, 26
LONGEST_NAME = 24  # characters; longer names are cut, and their tooltips hold them whole
CHARACTER_WIDTH, SMALL_CHARACTER_WIDTH = 7.2, 6.0  # pixels, on the generous side
LEAST_SPAN = 10  # of the axis, in points
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
COLOURS = {  # on a light and on a dark background
    "back": ("#ffffff", "#15191d"),
    "ink": ("#1c2127", "#e9ecef"),
    "muted": ("#5b6670", "#a0abb5"),
    "rule": ("#e4e8eb", "#2d343b"),
    "same": ("#77828c", "#8f9aa4"),
    "better": ("#0072b2", "#56b4e9"),
    "worse": ("#d55e00", "#f0a030"),
}


def _style() -> str:
    base = (
        f".af text{{font-family:{FONT};font-size:13px}}.af .title{{font-size:16px;font-weight:600}}"
        ".af .small{font-size:11.5px}.af .strong{font-weight:600}.af .number{font-variant-numeric:tabular-nums}"
        ".af .link{stroke-width:3;stroke-linecap:round;opacity:.5}.af .dot{stroke-width:2}"
        ".af .dashed{stroke-dasharray:4 3}.af .halo{paint-order:stroke;stroke-width:4px;stroke-linejoin:round}"
    )

    def rules(scheme: int) -> str:
        back = COLOURS["back"][scheme]
        parts = [f".af .back{{fill:{back}}}.af .halo{{stroke:{back}}}"]
        for name, values in COLOURS.items():
            # t: text, l: line, d: filled marker, h: hollow marker, filled with the background.
            value = values[scheme]
            parts.append(f".af .t-{name}{{fill:{value}}}.af .l-{name}{{stroke:{value}}}")
            parts.append(f".af .d-{name}{{fill:{value};stroke:{value}}}.af .h-{name}{{fill:{back};stroke:{value}}}")
        return "".join(parts)

    return f"<style>{base}{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}</style>"


def escape(text: object) -> str:
    """Text as XML or HTML content or attribute value."""
    return html.escape(printable(text), quote=True)


def shorten(text: str) -> str:
    """A name that fits the label column."""
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def standalone(figure: str) -> str:
    """A figure as an SVG file of its own (inside HTML the namespace is implied)."""
    return figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


@dataclass(frozen=True)
class Change:
    """One language of the dumbbell chart; accuracies in [0, 1], ``change`` is the text at the right."""

    name: str
    note: str
    before: float
    after: float
    change: str
    outcome: Outcome
    is_source: bool


@dataclass(frozen=True)
class Spread:
    """One row of the comparison; accuracies in [0, 1], ``columns`` are the texts at the right."""

    name: str
    average: float
    source: float | None
    worst: float
    columns: tuple[str, ...]
    is_reference: bool


class _Axis:
    """Maps accuracies to pixels between ``left`` and ``right``, over the part of [0, 1] that the data needs."""

    def __init__(self, values: Sequence[float], left: float, right: float) -> None:
        low, high = min(values) * 100, max(values) * 100
        if high - low < LEAST_SPAN:  # do not make much of a small difference
            middle = min(max((low + high) / 2, LEAST_SPAN / 2), 100 - LEAST_SPAN / 2)
            low, high = middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2
        self.step = next((step for step in (1, 2, 5, 10) if (high - low) / step <= 8), 20)
        self.low = max(0, int((low - self.step / 10) // self.step) * self.step)
        self.high = min(100, -int(-(high + self.step / 10) // self.step) * self.step)
        self.left, self.right = left, right

    def at(self, value: float) -> float:
        return self.left + (100 * value - self.low) / (self.high - self.low) * (self.right - self.left)

    def draw(self, top: float, bottom: float) -> list[str]:
        """Grid lines, tick labels and the axis title."""
        parts = []
        for tick in range(self.low, self.high + 1, self.step):
            x = self.at(tick / 100)
            parts.append(_line(x, top, x, bottom, "l-rule"))
            parts.append(_text(x, bottom + 17, str(tick), "small t-muted number", "middle"))
        middle = (self.left + self.right) / 2
        return [*parts, _text(middle, bottom + 36, "accuracy (%)", "small t-muted", "middle")]


def dumbbell(title: str, subtitle: str, rows: Sequence[Change], averages: tuple[float, float], alpha: float) -> str:
    """Accuracy by language before (hollow) and after (filled), sorted as given, with lines at both averages."""
    left = PADDING + _label_width([f"{row.note}  {shorten(row.name)}" for row in rows], least=100)
    right = WIDTH - PADDING - 76
    top, bottom = 132, 132 + ROW_HEIGHT * len(rows)
    axis = _Axis([value for row in rows for value in (row.before, row.after)], left, right)
    parts = [*_heading(title, subtitle), *_dumbbell_legend(rows, alpha), *axis.draw(top, bottom)]
    parts.append(_text(WIDTH - PADDING - 12, top - 4, "points", "small t-muted", "end"))
    parts += _averages(axis, averages, top, bottom)
    for number, row in enumerate(rows):
        parts += _dumbbell_row(axis, row, top + ROW_HEIGHT * (number + 0.5))
    return _figure(parts, bottom + 36 + 18, f"{title}. {subtitle}")


def _dumbbell_row(axis: _Axis, row: Change, y: float) -> list[str]:
    before, after = axis.at(row.before), axis.at(row.after)
    marker = _diamond if row.outcome == "worse" else _circle
    significant = row.outcome != "same"
    name_class = "t-ink strong" if row.is_source else "t-ink"
    label = f'<tspan class="small t-muted">{escape(row.note)}</tspan>' if row.note else ""
    label += f'<tspan class="{name_class}" dx="{8 if row.note else 0}">{escape(shorten(row.name))}</tspan>'
    tooltip = f"{row.name}: {100 * row.before:.1f} before, {100 * row.after:.1f} after, {row.change} points"
    number = f"number {f't-{row.outcome} strong' if significant else 't-muted'}"
    return [
        f"<g><title>{escape(tooltip)}</title>",
        f'<text x="{axis.left - 14:.1f}" y="{y + 4.5:.1f}" text-anchor="end">{label}</text>',
        _line(before, y, after, y, f"link l-{row.outcome}"),
        _circle(before, y, 4.5, "h-same"),
        marker(after, y, 5.5, f"d-{row.outcome}"),
        _text(WIDTH - PADDING - 12, y + 4.5, row.change, number, "end"),
        _text(WIDTH - PADDING - 9, y + 4.5, "*", f"t-{row.outcome} strong") if significant else "",
        "</g>",
    ]


def _averages(axis: _Axis, averages: tuple[float, float], top: float, bottom: float) -> list[str]:
    """Vertical lines at both averages; their labels run away from each other, so that they do not overlap."""
    parts = []
    for value, is_before in zip(averages, (True, False), strict=True):
        x, y = axis.at(value), top - 17
        label = f"average {'before' if is_before else 'after'} {100 * value:.1f}"
        to_the_left = is_before == (averages[0] <= averages[1])
        if not to_the_left and x + 5 + SMALL_CHARACTER_WIDTH * len(label) > WIDTH - PADDING:
            to_the_left, y = (
                True,
                top - 3,
            )  # there is no room at the right: draw the label on the left, below the other one
        css = "small halo number " + ("t-muted" if is_before else "t-ink strong")
        parts.append(_line(x, top - 26, x, bottom, "l-muted dashed" if is_before else "l-ink"))
        parts.append(_text(x - 5 if to_the_left else x + 5, y, label, css, "end" if to_the_left else "start"))
    return parts


def _dumbbell_legend(rows: Sequence[Change], alpha: float) -> list[str]:
    """Only what occurs in the figure is explained."""
    outcomes = {row.outcome for row in rows}
    items = [(_circle, "h-same", "before")]
    if "better" in outcomes:
        items.append((_circle, "d-better", "after, significantly better"))
    if "worse" in outcomes:
        items.append((_diamond, "d-worse", "after, significantly worse"))
    if "same" in outcomes:
        items.append((_circle, "d-same", "after, no significant change"))
    parts = _legend(items, 82)
    if outcomes != {"same"}:
        parts.append(_text(WIDTH - PADDING, 86, f"* p < {alpha:g}", "small t-muted", "end"))
    return parts


def comparison(title: str, rows: Sequence[Spread], headers: tuple[str, ...]) -> str:
    """Average, source language and worst language of each variant on one axis, with numbers at the right."""
    left = PADDING + _label_width([shorten(row.name) for row in rows], least=70)
    right = WIDTH - PADDING - 66 * len(headers) - 10
    top, bottom = 106, 106 + ROW_HEIGHT * len(rows)
    values = [value for row in rows for value in (row.average, row.source, row.worst) if value is not None]
    axis = _Axis(values, left, right)
    items = [
        (_circle, "d-better", "average"),
        (_square, "h-same", "source language"),
        (_bar, "d-same", "worst language"),
    ]
    parts = [*_heading(title, ""), *_legend(items, 62), *axis.draw(top, bottom)]
    columns = [WIDTH - PADDING - 66 * (len(headers) - 1 - number) for number in range(len(headers))]
    parts += [_text(x, top - 8, header, "small t-muted", "end") for x, header in zip(columns, headers, strict=True)]
    for number, row in enumerate(rows):
        y = top + ROW_HEIGHT * (number + 0.5)
        ends = [axis.at(value) for value in (row.average, row.source, row.worst) if value is not None]
        strong = "" if row.is_reference else " strong"
        parts += [
            f"<g><title>{escape(row.name)}</title>",
            _text(left - 14, y + 4.5, shorten(row.name), "t-muted" if row.is_reference else "t-ink", "end"),
            _line(min(ends), y, max(ends), y, "link l-same"),
            _bar(axis.at(row.worst), y, 5.5, "d-same"),
            "" if row.source is None else _square(axis.at(row.source), y, 4.5, "h-same"),
            _circle(axis.at(row.average), y, 5.5, "d-same" if row.is_reference else "d-better"),
        ]
        parts += [
            _text(x, y + 4.5, text, f"number t-ink{strong if x == columns[0] else ''}", "end")
            for x, text in zip(columns, row.columns, strict=True)
        ]
        parts.append("</g>")
    return _figure(parts, bottom + 36 + 18, title)


def _label_width(labels: Sequence[str], least: float) -> float:
    return max(least, 14 + CHARACTER_WIDTH * max(map(len, labels), default=0))


def _figure(parts: Sequence[str], height: float, description: str) -> str:
    return (
        f'<svg class="af" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img">'
        f"<title>{escape(description)}</title>{_style()}"
        f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>\n'
        + "\n".join(part for part in parts if part)
        + "\n</svg>"
    )


def _heading(title: str, subtitle: str) -> list[str]:
    return [_text(PADDING, 34, title, "title t-ink"), _text(PADDING, 56, subtitle, "t-muted") if subtitle else ""]


def _legend(items: Sequence[tuple], y: float) -> list[str]:
    parts, x = [], PADDING + 6.0
    for marker, css, text in items:
        parts += [marker(x, y, 5, css), _text(x + 11, y + 4, text, "small t-ink")]
        x += 11 + SMALL_CHARACTER_WIDTH * len(text) + 16
    return parts


def _text(x: float, y: float, text: str, css: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _circle(x: float, y: float, radius: float, css: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {css}"/>'


def _diamond(x: float, y: float, radius: float, css: str) -> str:
    corners = f"M{x - radius:.1f} {y:.1f}l{radius} -{radius}l{radius} {radius}l-{radius} {radius}z"
    return f'<path d="{corners}" class="dot {css}"/>'


def _square(x: float, y: float, radius: float, css: str) -> str:
    size = f'width="{2 * radius}" height="{2 * radius}"'
    return f'<rect x="{x - radius:.1f}" y="{y - radius:.1f}" {size} class="dot {css}"/>'


def _bar(x: float, y: float, radius: float, css: str) -> str:
    return f'<rect x="{x - 1:.1f}" y="{y - radius:.1f}" width="2" height="{2 * radius}" class="{css}"/>'
