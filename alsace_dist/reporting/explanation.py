"""Why these teachers: a selection language by language, how sure it is, and, where labels exist, how right.

Labels are looked at here and nowhere in the method.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from alsace_dist.config import Config, DistillConfig
from alsace_dist.files.scores import Scores
from alsace_dist.files.selection import Selection
from alsace_dist.method import GroupScores
from alsace_dist.method.block import block_of
from alsace_dist.method.calibration import calibrate
from alsace_dist.method.selection import (
    Yardstick,
    accuracies,
    choose_teachers,
    gold_rows,
    language_scores,
    right_values,
    score_values,
)
from alsace_dist.method.targets import targets
from alsace_dist.reporting.tables import Row, Table
from alsace_dist.reporting.verdict import UNDEFINED, percent, printable

NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Stability:
    """Over bootstrap resamples of the groups (Efron 1979): the 95 % intervals of a language's rank, the best being 1,
    and of its score, and the share of resamples in which the rule makes it a teacher."""

    rank: tuple[int, int]
    teaches: float
    score: tuple[float, float]


def explanation(config: Config, selection: Selection, scores: Scores) -> list[tuple[str, Table]]:
    """Tables with their titles: languages, agreement between languages and, of the groups that have labels, what the
    targets are worth.

    ``scores``: those that the selection was made of, or some of them.
    """
    calibrated = [calibrate(group, selection.bias_rows()) for group in scores.groups().values()]
    names = sorted(selection.scores, key=lambda name: (-selection.scores[name], name))
    names = [name for name in names if any(name in group for group in calibrated)]
    known = list(scores.golds().values())
    labelled = [group for group, right in zip(calibrated, known, strict=True) if right]
    labels = [right for right in known if right]
    rates = accuracies(labelled, labels) if labels else {}
    stable = stability(config, calibrated, names, known)
    agreement = agreements(calibrated, names)
    as_vote = language_scores(calibrated, _yardstick(config, agreement=True))
    rows = []
    for name in names:
        is_teacher = name in selection.weights
        low, high = stable[name].rank
        cells = [printable(name), "teacher" if is_teacher else "student", f"{selection.scores[name]:.3f}"]
        cells += [f"{low} to {high}", f"{stable[name].teaches:.0%}", _share(as_vote.get(name, float("nan")))]
        cells.append(f"{selection.weights[name]:.3f}" if is_teacher else UNDEFINED)
        cells += [percent(rates.get(name))] if labels else []
        rows.append(Row(cells, "strong" if is_teacher else ""))
    header = ["Language", "Role", "Score", "Rank (95 %)", "Teaches", "Agrees with the vote", "Weight"]
    found = [(_title(selection), Table(header + ["Accuracy"] * bool(labels), rows, frozenset({0, 1})))]
    matrix = [Row([printable(name), *map(_share, line)]) for name, line in zip(names, agreement, strict=True)]
    found.append(
        ("Share of groups in which two languages give the same answer", Table(["", *names], matrix, frozenset({0})))
    )
    if labels:
        title, correlation = "What labels say", _spearman(selection, rates)
        if not np.isnan(correlation):  # one language, or equal scores, have no order
            title += f" (rank correlation of score and accuracy: {correlation:.2f})"
        if len(labels) < len(known):
            title += f", of the {len(labels):,} of {len(known):,} groups that have one"
        found.append((title, _worth_table(config, selection, labelled, labels)))
    return found


def stability(
    config: Config, groups: Sequence[GroupScores], names: Sequence[str], labels: Sequence[Collection[int]] = ()
) -> dict[str, Stability]:
    """Language -> how much its rank and role depend on the groups that happened to be there.

    ``labels``: the right candidates of each group, which ``score: accuracy`` looks at.
    """
    section, source = config.select, config.data.source_language
    column = {name: number for number, name in enumerate(names)}
    block = block_of(groups)
    by_labels = section.score == "accuracy"
    found = np.full((len(groups), len(block.languages)), np.nan)
    found[block.group, block.language] = (
        right_values(block, gold_rows(labels)) if by_labels else score_values(block, _yardstick(config))
    )
    values = found[:, [block.languages.index(name) for name in names]]
    rng = np.random.default_rng(config.seed)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=NUM_RESAMPLES).astype(np.float64)
    counts = drawn @ ~np.isnan(values)
    means = np.where(counts > 0, drawn @ np.nan_to_num(values) / np.maximum(counts, 1), 0.0)
    ranks = (-means).argsort(axis=1).argsort(axis=1) + 1
    teaches = np.zeros(len(names))
    for row in means:
        for name in choose_teachers(section, dict(zip(names, row.tolist(), strict=True)), source, config.seed):
            teaches[column[name]] += 1 / NUM_RESAMPLES
    low, high = np.percentile(ranks, [2.5, 97.5], axis=0).round().astype(int).tolist()
    least, most = np.percentile(means, [2.5, 97.5], axis=0).tolist()
    return {
        name: Stability((low[number], high[number]), float(teaches[number]), (least[number], most[number]))
        for name, number in column.items()
    }


def agreements(groups: Sequence[GroupScores], names: Sequence[str]) -> np.ndarray:
    """[T, T] share of the groups that two languages share in which their best answers are the same; NaN without any."""
    answers = np.array([[int(np.argmax(group[name])) if name in group else -1 for name in names] for group in groups])
    present = answers >= 0
    rows = []
    for column in range(len(names)):  # one language at a time: all pairs of all groups may be gigabytes
        both = present & present[:, [column]]
        same = both & (answers == answers[:, [column]])
        with np.errstate(invalid="ignore"):
            rows.append(same.sum(axis=0) / both.sum(axis=0))
    return np.stack(rows)


def _yardstick(config: Config, agreement: bool = False) -> Yardstick:
    """What the selection's scores are the means of; ``agreement``: whatever ``select.score`` says."""
    section, source = config.select, config.data.source_language
    return Yardstick(
        agreement or section.score == "agreement",
        section.vote == "soft",
        section.leave_one_out,
        source if section.vote == "source" else None,
    )


def _title(selection: Selection) -> str:
    title = f"{len(selection.teachers)} teachers by rule {selection.rule}, on {selection.num_groups:,} groups"
    return title if selection.threshold is None else f"{title} (threshold of the softmax {selection.threshold:.4f})"


def _share(value: float) -> str:
    return UNDEFINED if np.isnan(value) else f"{value:.2f}"


def _spearman(selection: Selection, rates: dict[str, float]) -> float:
    """Spearman's rank correlation; ties get their mean rank."""
    names = sorted(set(selection.scores) & set(rates))
    values = np.array([[found[name] for name in names] for found in (selection.scores, rates)])
    if any(len(set(row)) < 2 for row in values.tolist()):
        return float("nan")
    below, equal = (values[:, None] < values[:, :, None]).sum(2), (values[:, None] == values[:, :, None]).sum(2)
    return float(np.corrcoef(below + equal / 2)[0, 1])


@dataclass(frozen=True)
class Worth:
    """How right targets are: the share whose best answer is a right one, and the mean of -log of what they give to the
    right ones, in nats; each target counts as much as in training."""

    accuracy: float
    log_loss: float


def worth(
    section: DistillConfig, selection: Selection, groups: Sequence[GroupScores], labels: Sequence[tuple[int, ...]]
) -> Worth:
    """What languages would learn from calibrated scores is worth. ``labels``: the right candidates of each group."""
    mass = (section.pool_mass or 1.0) if section.pool == "logarithmic" else None
    by_presence = section.group_weight == "presence"
    found = []
    for group, label in zip(groups, labels, strict=True):
        taught = targets(group, selection.ranked_weights, str(section.targets), mass, by_presence)
        found += [(target.probabilities, label, target.weight) for target in taught.values()]
    return _worth(found)


def worth_of_language(language: str, groups: Sequence[GroupScores], labels: Sequence[tuple[int, ...]]) -> Worth:
    """What a language's own answers are worth, in the groups that have it."""
    return _worth(
        [
            (np.exp(group[language]), label, 1.0)
            for group, label in zip(groups, labels, strict=True)
            if language in group
        ]
    )


def _worth(found: Sequence[tuple[np.ndarray, tuple[int, ...], float]]) -> Worth:
    right = [int(np.argmax(row)) in label for row, label, _ in found]
    losses = [-np.log(max(1e-9, float(row[list(label)].sum()))) for row, label, _ in found]
    weights = [weight for *_, weight in found]
    if sum(weights) <= 0:  # nobody learns anything
        return Worth(float("nan"), float("nan"))
    return Worth(float(np.average(right, weights=weights)), float(np.average(losses, weights=weights)))


def _worth_table(
    config: Config, selection: Selection, groups: Sequence[GroupScores], labels: Sequence[tuple[int, ...]]
) -> Table:
    """Each way to make targets of these scores."""
    source = config.data.source_language
    modes = [mode for mode in dict.fromkeys((str(config.distill.targets), "ensemble", "votes")) if mode != "labels"]
    ways = {
        f"targets: {mode}": worth(config.distill.model_copy(update={"targets": mode}), selection, groups, labels)
        for mode in modes
    } | {f"{printable(source)} alone": worth_of_language(source, groups, labels)}
    known = {name: one for name, one in ways.items() if not np.isnan(one.accuracy)}
    rows = [Row([name, percent(one.accuracy), f"{one.log_loss:.3f}"]) for name, one in known.items()]
    return Table(["What languages learn from", "Accuracy", "Log-loss"], rows, frozenset({0}))
