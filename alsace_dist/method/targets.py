"""What each language learns from: frozen distributions of the teachers, in the closed form of the mean over all pairs.

The paper's loss (section 3, Cross-lingual Self-Distillation) is the mean over pairs of a teacher and another language
of KL(P(x_a) || P(x_b)); with frozen teachers one target per language does the work of all its pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from alsace_dist.config import NO_TEACHERS, Targets
from alsace_dist.method import GroupScores
from alsace_dist.method.calibration import normalised
from alsace_dist.method.selection import vote

MODES: tuple[str, ...] = get_args(Targets)  # distill.targets: what a teacher learns from


@dataclass(frozen=True)
class Target:
    """What one language of one group learns from.

    ``probabilities`` [K]; ``weight``: number of (teacher, language) pairs that it stands for; ``entropy``: mean entropy
    of those teachers, so that weight * (CE - entropy) is the sum of the pairs' KL divergences.
    """

    probabilities: np.ndarray
    weight: float
    entropy: float


class Lesson(NamedTuple):
    """Who teaches one language of a group. ``shares`` add up to 1; ``weight``: number of pairs that it stands for.
    Nobody teaches votes and labels. ``mass``: of the weight of all teachers that the language has anywhere, the share
    that those of this group have.
    """

    teachers: tuple[str, ...]
    shares: np.ndarray
    weight: float
    mass: float = 1.0


def lessons(languages: Iterable[str], weights: Mapping[str, float], mode: str) -> dict[str, Lesson]:
    """The lesson of every language of a group that has a teacher there.

    ``languages``: of the group; ``weights``: teacher -> weight, the best teacher first. ``mode`` says what a teacher
    learns from: "others" (the paper: every other teacher), "ranked" (the authors' code: the teachers before it),
    "ensemble" (all teachers with itself), "anchor" (itself alone). Every language counts once in the mean over pairs
    under these two and where nobody teaches, and as often as it has teachers under the first two.
    """
    assert mode in MODES, mode
    if mode in NO_TEACHERS:
        return {language: Lesson((), np.empty(0), 1.0) for language in languages}
    present, ranking = set(languages), list(weights)
    found: dict[str, Lesson] = {}
    for language in languages:
        everyone = _teachers_of(language, ranking, mode)
        teachers = [teacher for teacher in everyone if teacher in present]
        if not teachers:
            continue
        shares = np.array([weights[teacher] for teacher in teachers])
        mass = shares.sum() / total if (total := sum(weights[teacher] for teacher in everyone)) > 0 else 1.0
        # exp(beta * score) of weak teachers may underflow to 0. Where all teachers that a group has are such, they
        # teach as equals.
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(teachers), 1 / len(teachers))
        weight = float(len(teachers)) if mode in ("others", "ranked") else 1.0
        found[language] = Lesson(tuple(teachers), shares, weight, float(mass))
    return found


def _teachers_of(language: str, ranking: list[str], mode: str) -> list[str]:
    """Who teaches a language, of these teachers with the best first."""
    if mode == "anchor" and language in ranking:
        return [language]
    if mode == "others":
        return [teacher for teacher in ranking if teacher != language]
    if mode == "ranked" and language in ranking:
        return ranking[: ranking.index(language)]
    return ranking


def targets(
    group: GroupScores,
    weights: Mapping[str, float],
    mode: str,
    log_pool_mass: float | None = None,
    by_presence: bool = False,
) -> dict[str, Target]:
    """Frozen-teacher targets of every language of a group that has any; under "votes" the majority's answer.

    ``group``: calibrated scores, language -> log-probabilities [K]. ``weights`` and ``mode`` as in ``lessons``, but for
    "labels", which scores do not tell. With ``p_b`` the mean of the distributions of b's teachers by their shares,
    ``mean_a KL(p_a || q_b) = CE(p_b, q_b) - mean_a H(p_a)``: one forward per (group, language) instead of one per pair.

    ``log_pool_mass``: the target is the teachers' logarithmic pool instead, ``p_b ~ prod_a p_a ** (mass * share_a)``
    (Genest and Zidek 1986), whose exponents add up to this mass. ``by_presence``: a target counts as much as the weight
    of its teachers that this group has, of all of them.
    """
    assert mode != "labels", "the labels of a group are no scores"
    if mode == "votes" and group:
        one_hot = np.eye(len(next(iter(group.values()))))[vote(group)]
        return {language: Target(one_hot, 1.0, 0.0) for language in group}
    log_probs = {language: np.asarray(row, dtype=np.float64) for language, row in group.items() if language in weights}
    found: dict[str, Target] = {}
    for language, lesson in lessons(group, weights, mode).items():
        rows = np.stack([log_probs[teacher] for teacher in lesson.teachers])
        if log_pool_mass is None:
            pooled, entropy = lesson.shares @ np.exp(rows), lesson.shares @ entropies(np.exp(rows))
        else:
            pooled = np.exp(normalised(log_pool_mass * lesson.shares @ rows))
            entropy = entropies(pooled)
        weight = lesson.weight * (lesson.mass if by_presence else 1.0)
        found[language] = Target(pooled, weight, float(entropy))
    return found


def entropies(probabilities: np.ndarray) -> np.ndarray:
    """Entropy in nats of distributions [..., K]."""
    found: np.ndarray = -(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=-1)
    return found


def num_pairs(counts: Mapping[tuple[str, ...], int], weights: Mapping[str, float], mode: str) -> float:
    """Sum of the weights of all lessons of groups: the number of pairs that the mean loss is taken over.

    ``counts``: the languages of groups -> how many groups have these.
    """
    return sum(
        number * sum(lesson.weight for lesson in lessons(languages, weights, mode).values())
        for languages, number in counts.items()
    )


def learners(languages: Sequence[str], weights: Mapping[str, float], mode: str) -> list[str]:
    """The languages that have a teacher: all, but for an only teacher that learns from the other teachers alone, and
    the first in the authors' ranking."""
    if mode == "others" and len(weights) == 1:
        return [language for language in languages if language not in weights]
    if mode == "ranked":
        return [language for language in languages if language != next(iter(weights))]
    return list(languages)
