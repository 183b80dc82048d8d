"""Which figures a run has, made of what its stages wrote."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from alsace_dist.config import Config
from alsace_dist.files.evaluation import Evaluation
from alsace_dist.files.scores import Scores
from alsace_dist.files.selection import Selection
from alsace_dist.method.calibration import calibrate
from alsace_dist.reporting import figures
from alsace_dist.reporting.explanation import agreements, stability
from alsace_dist.reporting.figures import Change, Picture, Reliability, reliability_of
from alsace_dist.reporting.tables import change_of, figures_after, figures_before, role_of, sorted_languages
from alsace_dist.reporting.verdict import Outcome, outcome, percent, points, printable

CURVES = {"loss": "loss", "target_agreement": "agreement with the targets"}
MOST_LINES = 7  # of one figure


def of_evaluation(evaluation: Evaluation, alpha: float) -> list[Picture]:
    """Accuracy by language before and after, and every change with its interval."""
    rows = [
        Change(
            name,
            role_of(evaluation, name),
            row.before,
            row.after,
            (row.ci95[0], row.ci95[1]),
            outcome(row, alpha),
        )
        for name, row in sorted_languages(evaluation)
    ]
    average, gap = evaluation.average, evaluation.gap
    said = f"average {percent(average.before)} to {percent(average.after)} %"
    if gap.before is not None and gap.after is not None:
        said += f", gap to {printable(evaluation.source_language)} {percent(gap.before)} to {percent(gap.after)} points"
    each = "; ".join(f"{printable(row.name)} {percent(row.before)} to {percent(row.after)}" for row in rows[:30])
    first = Picture(
        "languages",
        f"Accuracy by language, before (hollow) and after (filled): {said}; blue is significantly better, orange worse",
        f"Accuracy in % by language before and after: {said}. {each}.",
        partial(figures.slopes, rows),
    )
    changes: list[tuple[str, float, tuple[float, float], Outcome]] = [
        ("average", average.after - average.before, (average.ci95[0], average.ci95[1]), "same")
    ]
    if gap.ci95 is not None and gap.before is not None and gap.after is not None:
        changes.append(("gap (less is better)", gap.after - gap.before, (gap.ci95[0], gap.ci95[1]), "same"))
    changes += [(row.name, row.after - row.before, row.interval, row.outcome) for row in rows]
    second = Picture(
        "changes",
        "Every change with its 95 % interval",
        f"Changes in points with 95 % intervals: average {change_of(average)}, gap {change_of(gap)}; "
        + "; ".join(f"{printable(row.name)} {points(row.after - row.before)}" for row in rows[:30]),
        partial(figures.intervals, changes),
    )
    return [first, second]


def of_variants(evaluations: Mapping[str, Evaluation]) -> Picture:
    """Average, source and worst language of the model before, and of every variant after."""
    main = next(iter(evaluations.values()))
    found = {"before": figures_before(main)} | {name: figures_after(one) for name, one in evaluations.items()}
    rows = [(name, one.source, one.average, one.worst.accuracy) for name, one in found.items()]
    said = "; ".join(f"{printable(name)}: average {percent(one.average)}" for name, one in found.items())
    title = "Variants: average, source and worst language"
    return Picture("variants", title, f"{title}, in %. {said}.", partial(figures.comparison, rows))


def of_selection(config: Config, selection: Selection, scores: Scores) -> list[Picture]:
    """The scores of the first round's selection, and how often languages answer alike. ``scores``: those that it was
    made of, or some of them."""
    groups = [calibrate(group, selection.bias_rows()) for group in scores.groups().values()]
    names = sorted(selection.scores, key=lambda name: (-selection.scores[name], name))
    names = [name for name in names if any(name in group for group in groups)]
    stable = stability(config, groups, names, list(scores.golds().values()))
    rows = [(name, selection.scores[name], stable[name].score, name in selection.weights) for name in names]
    threshold = None
    if selection.threshold is not None:  # of the softmax of the scores
        threshold = float(np.log(selection.threshold * np.exp(list(selection.scores.values())).sum()))
    agreement = agreements(groups, names)
    teachers = ", ".join(map(printable, selection.weights))
    pairs = agreement[~np.eye(len(names), dtype=bool)]
    said = "" if np.isnan(pairs).all() else f" From {np.nanmin(pairs):.2f} to {np.nanmax(pairs):.2f}."
    each = "; ".join(f"{printable(name)} {score:.2f}" for name, score, *_ in rows[:30])
    return [
        Picture(
            "scores",
            "Who teaches: language scores with their 95 % intervals",
            f"Language scores; teachers are {teachers}. {each}.",
            partial(figures.scores, rows, threshold),
        ),
        Picture(
            "agreement",
            "How often two languages give the same answer",
            f"Share of the groups in which two of {len(names)} languages answer alike.{said}",
            partial(figures.matrix, names, agreement),
        ),
    ]


def of_teachers(teachers: Sequence[str], test: Scores) -> Picture | None:
    """How right teachers are when they are so sure, on test groups with labels; None without any."""
    answers: dict[str, list[tuple[float, bool]]] = {}
    golds = test.golds()
    for key, group in test.groups().items():
        for language in teachers:
            if language in group and golds[key]:
                best = int(np.argmax(group[language]))
                answers.setdefault(language, []).append((float(np.exp(group[language][best])), best in golds[key]))
    found: dict[str, Reliability] = {}
    for language in [name for name in teachers if name in answers][:MOST_LINES]:
        confidence, is_right = (np.array(column) for column in zip(*answers[language], strict=True))
        if (one := reliability_of(confidence.astype(float), is_right.astype(bool))) is not None:
            found[language] = one
    if not found:
        return None
    said = "; ".join(f"{printable(name)} {one.error:.2f}" for name, one in found.items())
    title = "How far teachers can be trusted: accuracy over confidence, on the test groups"
    return Picture(
        "reliability", title, f"{title}. Expected calibration error: {said}.", partial(figures.reliability, found)
    )


def of_trainings(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture | None:
    """Loss and agreement over the steps. ``rows``: name of a training -> lines of its metrics.jsonl."""
    parts = {
        title: {
            label: [(row["step"], row[name]) for row in found if isinstance(row.get(name), int | float)]
            for name, label in CURVES.items()
        }
        for title, found in rows.items()
    }
    parts = {title: found for title, found in parts.items() if any(found.values())}
    if not parts:
        return None
    ends = [f"{title}: loss {found['loss'][-1][1]:.3g} at the end" for title, found in parts.items() if found["loss"]]
    title = "How training went: loss, and agreement with the targets"
    return Picture("training", title, f"{title}. {'; '.join(map(printable, ends))}.", partial(figures.curves, parts))
