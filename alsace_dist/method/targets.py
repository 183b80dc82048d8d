"""What each language learns from: frozen distributions of the teachers, in the closed form of the mean over all pairs.

The paper's loss (section 3, Cross-lingual Self-Distillation) is the mean over pairs of a teacher and another language
of KL(P(x_a) || P(x_b)); with frozen teachers one target per language does the work of all its pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alsace_dist.method import GroupScores

MODES = ("others", "ensemble", "anchor")  # distill.targets: what a teacher learns from


@dataclass(frozen=True)
class Target:
    """What one language of one group learns from.

    ``probabilities`` [K]; ``weight``: number of (teacher, language) pairs that it stands for; ``entropy``: mean entropy
    of those teachers, so that weight * (CE - entropy) is the sum of the pairs' KL divergences.
    """

    probabilities: np.ndarray
    weight: float
    entropy: float


def targets(group: GroupScores, weights: Mapping[str, float], mode: str) -> dict[str, Target]:
    """Frozen-teacher targets of every language of a group that has any.

    ``group``: calibrated scores, language -> log-probabilities [K]. ``weights``: teacher -> weight. With ``p_b`` the
    weighted mean of the teachers' distributions other than b itself, ``mean_a KL(p_a || q_b) = CE(p_b, q_b) - mean_a
    H(p_a)``: one forward per (group, language) instead of one per pair. ``mode`` says what a teacher learns from:
    "others" (the paper), "ensemble" (all teachers with itself), "anchor" (its own distribution). Every language counts
    once in the mean over pairs under the last two, and as often as it has teachers under "others".
    """
    assert mode in MODES, mode
    probabilities = {
        language: np.exp(np.asarray(row, dtype=np.float64)) for language, row in group.items() if language in weights
    }
    found: dict[str, Target] = {}
    for language in group:
        if mode == "anchor" and language in weights:
            teachers = [language]
        elif mode == "others":
            teachers = [teacher for teacher in probabilities if teacher != language]
        else:
            teachers = list(probabilities)
        if not teachers:
            continue
        share = np.array([weights[teacher] for teacher in teachers])
        # exp(beta * score) of weak teachers may underflow to 0. Where all teachers that a group has are such, they
        # teach as equals.
        share = share / share.sum() if share.sum() > 0 else np.full(len(teachers), 1 / len(teachers))
        rows = np.stack([probabilities[teacher] for teacher in teachers])
        entropy = -(rows * np.log(np.maximum(rows, 1e-30))).sum(axis=1)
        pairs = float(len(teachers)) if mode == "others" else 1.0
        found[language] = Target(share @ rows, pairs, float(share @ entropy))
    return found


def num_pairs(groups: Iterable[GroupScores], weights: Mapping[str, float], mode: str) -> float:
    """Sum of the weights of all targets of these groups: the number of pairs that the mean loss is taken over."""
    total = 0.0
    for group in groups:
        num_teachers = sum(language in weights for language in group)
        for language in group:
            is_teacher = language in weights
            if mode == "others":
                total += num_teachers - is_teacher
            elif num_teachers or (mode == "anchor" and is_teacher):
                total += 1
    return total


def learners(languages: Sequence[str], weights: Mapping[str, float], mode: str) -> list[str]:
    """The languages that have a teacher: all, but for an only teacher that learns from the other teachers alone."""
    if mode == "others" and len(weights) == 1:
        return [language for language in languages if language not in weights]
    return list(languages)
