"""Figures of a report and of TensorBoard, with matplotlib: SVG for pages, PNG for TensorBoard.

The colours are Okabe and Ito's, which colour-blind people can tell apart; form and fill repeat what colour says. In an
SVG what is drawn in ink takes the colour of the text around it, so that a page may be light or dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alsace_dist.reporting.verdict import Outcome, points, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1c2127"
COLOURS: dict[Outcome, str] = {"same": "#77828c", "better": "#0072b2", "worse": "#d55e00"}
CYCLE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#77828c"]
WIDTH, ROW_HEIGHT = 5.6, 0.27  # inches: narrow, so that letters can be read on a phone
LARGEST_SCALE = 1.2  # of a figure in a wide page
MOST_ROWS, LONGEST_NAME = 210, 24
PNG_DPI = 110
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "text.parse_math": False,  # a language's name is text, whatever it holds
    "svg.fonttype": "none",  # letters stay letters, that can be found and read aloud
}


@dataclass(frozen=True)
class Picture:
    """A figure. ``title``: what it shows, in a sentence or less; ``alt``: the same for those who do not see it, with
    its most important numbers; ``draw`` makes it."""

    name: str
    title: str
    alt: str
    draw: "Callable[[], Figure]"

    def svg(self) -> str:
        """As an element of a page, in which namespaces are implied and nothing points out of it."""
        text = _saved(self.draw, "svg", self.name).decode()
        text = text[text.index("<svg") :].replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
        text = re.sub(r' id="[\w.]+_\d+"', "", text)  # of groups that nobody refers to, alike in every figure
        width = float(re.search(r' width="([\d.]+)pt"', text)[1]) * LARGEST_SCALE  # type: ignore[index]
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        about = f'role="img" aria-label="{_attribute(self.alt)}" style="max-width:{width:.0f}pt"'
        return text.replace("<svg ", f"<svg {about} ", 1)

    def standalone(self) -> str:
        """As a file of its own, on white."""
        return _saved(self.draw, "svg", self.name, facecolor="white").decode()

    def png(self) -> tuple[bytes, tuple[int, int]]:
        """As a PNG on white, with its width and height in pixels."""
        content = _saved(self.draw, "png", self.name, facecolor="white", dpi=PNG_DPI)
        width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
        return content, (width, height)


def _attribute(text: str) -> str:
    import html

    return html.escape(printable(text), quote=True)


def _saved(draw: "Callable[[], Figure]", form: str, salt: str, **options: Any) -> bytes:
    """``salt``: goes into the names of an SVG's parts, so that those of two figures in one page differ."""
    import matplotlib

    target = io.BytesIO()
    style: Any = STYLE | {"svg.hashsalt": salt}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # in an SVG the reader's own fonts draw a name
        if form == "svg":
            options |= {"metadata": {"Date": None}, "transparent": "facecolor" not in options}
        draw().savefig(target, format=form, bbox_inches="tight", pad_inches=0.1, **options)
    return target.getvalue()


def _figure(num_rows: float, width: float = WIDTH) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 1.1 + ROW_HEIGHT * min(num_rows, MOST_ROWS)))
    return figure, figure.add_subplot()


def name_of(language: str) -> str:
    """A name that fits beside a figure."""
    text = printable(language)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _rows(axes: "Axes", names: Sequence[str]) -> np.ndarray:
    """Prepare an axis on which each name is a row, the first at the top; the height of each."""
    places = np.arange(len(names))[::-1]
    axes.set_yticks(places, [name_of(name) for name in names])
    axes.tick_params(length=0)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(axis="x")
    return places


# --- what a run achieved -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A language before and after, as shares. ``note``: its role, in words; ``interval``: of the change."""

    name: str
    note: str
    before: float
    after: float
    interval: tuple[float, float]
    outcome: Outcome


def slopes(rows: Sequence[Change]) -> "Figure":
    """Accuracy before (hollow) and after (filled), language by language."""
    figure, axes = _figure(len(rows))
    places = _rows(axes, [f"{row.name} ({row.note})" if row.note else row.name for row in rows])
    for place, row in zip(places, rows, strict=True):
        colour = COLOURS[row.outcome]
        axes.plot([100 * row.before, 100 * row.after], [place] * 2, color=colour, linewidth=2.5, alpha=0.5, zorder=1)
        axes.scatter(100 * row.before, place, s=34, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=2)
        axes.scatter(100 * row.after, place, s=36, color=colour, zorder=3)
        axes.annotate(
            f"{points(row.after - row.before)}",
            (100 * max(row.before, row.after), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="normal" if row.outcome == "same" else "bold",
        )
    axes.margins(x=0.12)
    axes.set_xlabel("accuracy in %: before (hollow), after (filled)")
    return figure


def intervals(rows: Sequence[tuple[str, float, tuple[float, float], Outcome]]) -> "Figure":
    """Changes in points with their 95 % intervals."""
    figure, axes = _figure(len(rows))
    places = _rows(axes, [name for name, *_ in rows])
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, (_, change, (low, high), result) in zip(places, rows, strict=True):
        colour = COLOURS[result]
        axes.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=2)
        axes.scatter(100 * change, place, s=36, color=colour, zorder=2)
    axes.set_xlabel("change in points, with its 95 % interval")
    return figure


def comparison(rows: Sequence[tuple[str, float | None, float, float]]) -> "Figure":
    """Variants: name, accuracy of the source, average, worst language."""
    figure, axes = _figure(len(rows))
    places = _rows(axes, [name for name, *_ in rows])
    columns = zip(
        ("source", "average", "worst language"), "Dov", CYCLE, list(zip(*rows, strict=True))[1:], strict=False
    )
    for label, marker, colour, values in columns:
        found = [(100 * float(value), place) for value, place in zip(values, places, strict=True) if value is not None]
        across, down = zip(*found, strict=True) if found else ((), ())
        axes.scatter(across, down, marker=marker, s=40, color=colour, label=label)
    for place, (_, source, average, worst) in zip(places, rows, strict=True):
        ends = [100 * one for one in (source, average, worst) if one is not None]
        axes.plot([min(ends), max(ends)], [place] * 2, color=INK, alpha=0.2, zorder=0)
    axes.margins(x=0.08)
    axes.set_xlabel("accuracy in %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9 / (1 + len(rows))), ncols=3)
    return figure


# --- why, and how it went ------------------------------------------------------------------------------------------


def scores(rows: Sequence[tuple[str, float, tuple[float, float], bool]], threshold: float | None) -> "Figure":
    """Language scores of a selection with bootstrap intervals; teachers filled. ``threshold``: on the scores' scale."""
    figure, axes = _figure(len(rows))
    places = _rows(axes, [name for name, *_ in rows])
    for place, (_, score, (low, high), is_teacher) in zip(places, rows, strict=True):
        colour = CYCLE[0] if is_teacher else COLOURS["same"]
        axes.plot([low, high], [place] * 2, color=colour, linewidth=2)
        axes.scatter(score, place, s=38, facecolors=colour if is_teacher else "none", edgecolors=colour, zorder=2)
    if threshold is not None:
        axes.axvline(threshold, color=CYCLE[1], linestyle="--", linewidth=1.2)
        axes.annotate(
            "threshold",
            (threshold, len(rows) - 0.5),
            color=CYCLE[1],
            fontsize=9,
            ha="right",
            xytext=(-4, 0),
            textcoords="offset points",
        )
    axes.set_xlabel("language score with its 95 % interval; teachers are filled")
    return figure


def matrix(names: Sequence[str], values: np.ndarray) -> "Figure":
    """[T, T] shares of groups in which two languages answer alike; NaN: they share no group."""
    from matplotlib.figure import Figure

    side = 1.2 + 0.26 * min(len(names), 60)
    figure = Figure(figsize=(side + 1.2, side))
    axes = figure.add_subplot()
    shown = axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis")
    labels = [name_of(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90)
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(names) <= 12:
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            axes.text(
                column,
                row,
                f"{value:.2f}".lstrip("0"),
                ha="center",
                va="center",
                fontsize=8,
                color="#ffffff" if value < 0.6 else "#000000",
            )
    figure.colorbar(shown, ax=axes, shrink=0.8, label="share of groups answered alike")
    return figure


@dataclass(frozen=True)
class Reliability:
    """Bins of confidence: their mean confidence, accuracy and number of answers, and the expected calibration error
    (Guo et al. 2017, section 2): the mean of the difference, by the bins' answers."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))


def reliability_of(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = 10) -> Reliability | None:
    """Equally wide bins; None without answers. ``confidence``: float [N], probability of the best candidate;
    ``is_right``: bool [N]."""
    if not len(confidence):
        return None
    place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    filled = count > 0
    means = [np.bincount(place, values, num_bins)[filled] / count[filled] for values in (confidence, is_right)]
    return Reliability(means[0], means[1], count[filled])


def reliability(rows: Mapping[str, Reliability]) -> "Figure":
    """Accuracy over confidence, a line each."""
    figure, axes = _figure(10, 4.6)
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    for (name, one), colour in zip(rows.items(), CYCLE * len(rows), strict=False):
        axes.plot(one.confidence, one.accuracy, marker="o", color=colour, label=f"{name_of(name)} ({one.error:.2f})")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.grid()
    axes.legend(title="expected calibration error", fontsize=9)
    return figure


def curves(parts: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> "Figure":
    """Training curves: title of a part -> name of a scalar -> (step, value)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for one in parts.values() for name in one))
    figure = Figure(figsize=(WIDTH, 2.1 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), len(parts), squeeze=False)
    for column, (title, found) in enumerate(parts.items()):
        for row, name in enumerate(names):
            axes = grid[row, column]
            axes.grid()
            if not (points_of := found.get(name)):
                axes.set_visible(False)
                continue
            axes.plot(*zip(*points_of, strict=True), color=CYCLE[row])
            if row == 0:
                axes.set_title(title)
            if column == 0:
                axes.set_ylabel(name)
            if row == len(names) - 1:
                axes.set_xlabel("step")
    return figure
