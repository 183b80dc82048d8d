"""The method's arithmetic (ALSACE, Zhao et al., NAACL 2024, section 3, and what this project adds), in plain numpy.

A *group* is a mapping language -> log-probabilities [K] over the K candidates of one parallel group; languages may be
missing. Nothing here sees a label.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Group = Mapping[str, np.ndarray]


def calibrate(group: Group, biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Log-probabilities with each language's bias per candidate added, normalised again."""
    return {
        language: _normalise(row + biases[language]) if language in biases else row for language, row in group.items()
    }


def _normalise(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def marginal_biases(
    groups: Iterable[Group], reference: str | None, num_iterations: int = 500, tolerance: float = 1e-6
) -> dict[str, np.ndarray]:
    """Per language, the bias per candidate under which its mean prediction equals the reference's.

    In parallel groups every language has the same distribution of true answers, whatever it is; a language whose mean
    prediction differs is biased. ``reference``: the language whose mean prediction is the aim; None: the mean over all
    languages. A language is compared with the reference on the groups that both have. Returns biases with mean 0.
    Raises ``ValueError`` if the groups do not all have the same number of candidates (then there is no common bias).
    """
    rows = list(groups)
    sizes = {row.shape[-1] for group in rows for row in group.values()}
    if len(sizes) > 1:
        raise ValueError(f"marginal calibration needs the same candidates everywhere, found {sorted(sizes)} of them")
    biases: dict[str, np.ndarray] = {}
    for language in sorted({language for group in rows for language in group}):
        if language == reference:
            biases[language] = np.zeros(max(sizes))
            continue
        shared = [group for group in rows if language in group and (reference is None or reference in group)]
        if not shared:
            continue  # nothing to compare it with
        own = np.stack([group[language] for group in shared]).astype(np.float64)
        aim = np.mean([_reference_row(group, reference) for group in shared], axis=0)
        biases[language] = _match_marginal(own, np.maximum(aim, 1e-9), num_iterations, tolerance)
    return biases


def _reference_row(group: Group, reference: str | None) -> np.ndarray:
    rows = [group[reference]] if reference is not None else list(group.values())
    mean: np.ndarray = np.exp(np.stack(rows).astype(np.float64)).mean(axis=0)
    return mean


def _match_marginal(log_probs: np.ndarray, aim: np.ndarray, num_iterations: int, tolerance: float) -> np.ndarray:
    """Bias b with mean_i softmax(log_probs_i + b) = aim, by iterative scaling (Deming and Stephan 1940)."""
    bias = np.zeros(aim.shape)
    for _ in range(num_iterations):
        marginal = np.exp(_normalise(log_probs + bias)).mean(axis=0)
        if np.abs(marginal - aim).max() < tolerance:
            break
        bias += np.log(aim) - np.log(np.maximum(marginal, 1e-12))
    return bias - bias.mean()


def vote(group: Group, soft: bool = False, leave_out: str | None = None) -> int:
    """Index of the candidate that most languages prefer; ties are broken by summed probability, then by index.

    ``soft``: the candidate with the largest summed probability. ``leave_out``: a language whose vote does not count.
    """
    rows = np.stack([row for language, row in group.items() if language != leave_out]).astype(np.float64)
    summed = np.exp(rows).sum(axis=0)
    if soft:
        return int(np.argmax(summed))
    votes = np.bincount(rows.argmax(axis=1), minlength=rows.shape[1])
    return int(np.argmax(np.where(votes == votes.max(), summed, -np.inf)))


def language_scores(
    groups: Iterable[Group],
    agreement: bool = False,
    soft: bool = False,
    leave_one_out: bool = False,
    source: str | None = None,
) -> dict[str, float]:
    """``s_t = mean_i P(y_i | x_t,i)`` with the vote y_i, over the groups that have language t.

    ``source``: y_i is this language's own best answer instead of a vote, over the groups that have it; for where most
    languages are near chance and their votes are noise.

    ``agreement``: the share of groups in which the language's own best answer is the vote. ``leave_one_out``: against
    the vote of the others; groups with no other language do not count.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for group in groups:
        if source is not None and source not in group:
            continue
        whole = None if leave_one_out else vote(group, soft)
        if source is not None:
            whole = int(np.argmax(group[source]))
        for language, row in group.items():
            if leave_one_out and len(group) < 2:
                continue
            answer = vote(group, soft, language) if whole is None else whole
            value = float(np.argmax(row) == answer) if agreement else float(np.exp(np.float64(row[answer])))
            sums[language] = sums.get(language, 0.0) + value
            counts[language] = counts.get(language, 0) + 1
    return {language: sums[language] / counts[language] for language in sorted(sums)}


def softmax_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """``softmax(s)`` over the languages (the paper's normalised score)."""
    values = np.array(list(scores.values()))
    weights = np.exp(values - values.max())
    return dict(zip(scores, (weights / weights.sum()).tolist(), strict=True))


def teachers_by_threshold(scores: Mapping[str, float]) -> list[str]:
    """Languages whose normalised score is at or above the mean of the normalised scores, best first."""
    normalised = softmax_scores(scores)
    threshold = float(np.mean(list(normalised.values())))
    # Rounding must not push a language that is exactly average below the mean of equals.
    return [language for language in best_first(scores) if normalised[language] >= threshold - 1e-12]


def best_first(scores: Mapping[str, float]) -> list[str]:
    """Languages by falling score, equal ones by name."""
    return sorted(scores, key=lambda language: (-scores[language], language))


def score_weights(scores: Mapping[str, float], teachers: Iterable[str], beta: float) -> dict[str, float]:
    """Weights proportional to ``exp(beta * s_t)`` over the teachers, summing to 1."""
    return softmax_scores({language: beta * scores[language] for language in teachers})


@dataclass(frozen=True)
class Target:
    """What one language of one group learns from.

    ``probabilities`` [K]; ``weight``: number of (teacher, language) pairs that it stands for; ``entropy``: mean entropy
    of those teachers, so that weight * (CE - entropy) is the sum of the pairs' KL divergences.
    """

    probabilities: np.ndarray
    weight: float
    entropy: float


def targets(group: Group, weights: Mapping[str, float], mode: str) -> dict[str, Target]:
    """Frozen-teacher targets of every language of a group that has any.

    ``weights``: language -> weight of the teachers. With ``p_b`` the weighted mean of the teachers' distributions other
    than b itself, ``mean_a KL(p_a || q_b) = CE(p_b, q_b) - mean_a H(p_a)``: one forward per (group, language) instead
    of one per pair. ``mode`` says what a teacher learns from: "others" (the paper), "ensemble" (all teachers with
    itself), "anchor" (its own distribution). Every language counts once in the mean over pairs under the last two, and
    as often as it has teachers under "others".
    """
    assert mode in ("others", "ensemble", "anchor"), mode
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
        # Sharp weights may vanish beside that of the best teacher; where it is missing, the others teach alike.
        share = share / share.sum() if share.sum() > 0 else np.full(len(teachers), 1 / len(teachers))
        rows = np.stack([probabilities[teacher] for teacher in teachers])
        entropy = -(rows * np.log(np.maximum(rows, 1e-30))).sum(axis=1)
        pairs = float(len(teachers)) if mode == "others" else 1.0
        found[language] = Target(share @ rows, pairs, float(share @ entropy))
    return found
