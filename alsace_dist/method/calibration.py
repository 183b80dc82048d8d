"""Marginal calibration: in the same groups every language has the same distribution of true answers.

A language whose mean prediction differs from that of the reference is biased, and the bias can be taken away without a
label. This is the project's addition to the paper; docs/method.md tells what it mends.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from alsace_dist.method import GroupScores


def calibrate(group: GroupScores, biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Log-probabilities with each language's bias per candidate added, normalised again."""
    return {
        language: normalised(row + biases[language]) if language in biases else row for language, row in group.items()
    }


def normalised(logits: np.ndarray) -> np.ndarray:
    """Logits [..., K] as log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def marginal_biases(
    groups: Iterable[GroupScores], reference: str | None, num_iterations: int = 500, tolerance: float = 1e-6
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
            continue  # no group holds this language beside the reference: there is nothing to compare it with
        own = np.stack([group[language] for group in shared]).astype(np.float64)
        aim = np.mean([_reference_row(group, reference) for group in shared], axis=0)
        biases[language] = _match_marginal(own, np.maximum(aim, 1e-9), num_iterations, tolerance)
    return biases


def _reference_row(group: GroupScores, reference: str | None) -> np.ndarray:
    rows = [group[reference]] if reference is not None else list(group.values())
    mean: np.ndarray = np.exp(np.stack(rows).astype(np.float64)).mean(axis=0)
    return mean


def _match_marginal(log_probs: np.ndarray, aim: np.ndarray, num_iterations: int, tolerance: float) -> np.ndarray:
    """Bias b with mean_i softmax(log_probs_i + b) = aim, by iterative scaling (Deming and Stephan 1940)."""
    bias = np.zeros(aim.shape)
    for _ in range(num_iterations):
        marginal = np.exp(normalised(log_probs + bias)).mean(axis=0)
        if np.abs(marginal - aim).max() < tolerance:
            break
        bias += np.log(aim) - np.log(np.maximum(marginal, 1e-12))
    return bias - bias.mean()
