"""What a training's losses observe on the way, as sums by language, and what scalars they become.

``training.observer`` makes the sums; only their names and columns are here, for reading needs no torch.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Sums by the name under which a loss gives them, float32 [languages, columns].
BY_LANGUAGE = "by_language"  # of COLUMNS: each example, or pair of live teacher and learner, by its count
COLUMNS = ("count", "divergence", "target_entropy", "model_entropy", "target_agreement")
VOTES = "votes"  # rows, and those of them whose answer is the vote's
ANSWERS, TARGET_ANSWERS = "answers", "target_answers"  # how often each fixed candidate is the best: model's, target's


def scalars(sums: Mapping[str, "np.ndarray"], languages: Sequence[str]) -> dict[str, float]:
    """Means over all languages, and of each that was seen."""
    found: dict[str, float] = {}
    if (by_language := sums.get(BY_LANGUAGE)) is not None and by_language[:, 0].sum() > 0:
        total = by_language.sum(axis=0)
        found |= {name: float(value / total[0]) for name, value in zip(COLUMNS[1:], total[1:], strict=True)}
        for language, row in zip(languages, by_language, strict=True):
            if row[0] > 0:
                found[f"divergence_of/{language}"] = float(row[1] / row[0])
                found[f"agreement_of/{language}"] = float(row[4] / row[0])
    if (votes := sums.get(VOTES)) is not None and votes[:, 0].sum() > 0:
        found["vote_agreement"] = float(votes[:, 1].sum() / votes[:, 0].sum())
    return found
