"""Paired statistics of two models on the same examples: McNemar, Holm, cluster bootstrap; averages and gaps.

Accuracies are in [0, 1]. The macro average is the mean over languages of their accuracies, by definition: every
language counts the same, however many examples it has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Cells of the resample-by-group matrix held at once: 8 MiB in each of the three arrays that need it.
MAX_CELLS = 1 << 20


@dataclass(frozen=True)
class Summary:
    """How accuracy spreads over languages.

    ``gap``: accuracy(source language) - mean accuracy(others), None without the source language or without others.
    ``std``: population standard deviation over languages (they are all there are, not a sample).
    """

    average: float
    gap: float | None
    std: float
    worst_language: str
    worst_accuracy: float


def summary(accuracy: Mapping[str, float], source_language: str) -> Summary:
    """Summarise accuracy by language. Of equally bad languages the first by name is the worst.

    Raises ``ValueError`` if there is no language.
    """
    if not accuracy:
        raise ValueError("accuracy holds no language")
    average = math.fsum(accuracy.values()) / len(accuracy)
    variance = math.fsum((value - average) ** 2 for value in accuracy.values()) / len(accuracy)
    others = [value for language, value in accuracy.items() if language != source_language]
    gap = None
    if others and source_language in accuracy:
        gap = accuracy[source_language] - math.fsum(others) / len(others)
    worst = min(sorted(accuracy), key=lambda language: accuracy[language])
    return Summary(average, gap, math.sqrt(variance), worst, accuracy[worst])


def mcnemar_exact(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided exact p-value of McNemar's test on paired outcomes; bool [N] each, see ``mcnemar_of_counts``.

    Raises ``ValueError`` if the shapes differ.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"paired outcomes must be two vectors of one length, not {before.shape} and {after.shape}")
    return mcnemar_of_counts(int((~before & after).sum()), int((before & ~after).sum()))


def mcnemar_of_counts(gained: int, lost: int) -> float:
    """Two-sided exact p-value of McNemar's test (McNemar 1947) of the examples that changed one way and the other.

    Given the ``n`` discordant pairs, the number ``k`` of one kind is Binomial(n, 1/2) under the null hypothesis, so
    p = min(1, 2 P(X <= min(k, n - k))); 1 if there are none.
    """
    n, k = gained + lost, min(gained, lost)
    # log C(n, i) for i = 0..k by its recurrence; the largest term is the last one, since k <= n / 2.
    i = np.arange(1, k + 1, dtype=np.float64)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])
    log_tail = log_terms[-1] + math.log(float(np.exp(log_terms - log_terms[-1]).sum())) - n * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


Z_95 = 1.959963984540054  # of the standard normal distribution, two-sided


def most_lost(gained: int, lost: int, num_examples: int) -> float:
    """The largest loss of accuracy that a 95 % interval does not rule out; 0 if all of it are gains.

    The lower end of Tango's score interval (1998, Statistics in Medicine 17, section 3) for a difference of paired
    proportions. It is also right where few or no examples changed, of which a bootstrap would know nothing.
    """
    low, high = -1.0, (gained - lost) / num_examples
    for _ in range(60):  # the statistic falls as the difference grows: bisection
        middle = (low + high) / 2
        low, high = (middle, high) if _tango(gained, lost, num_examples, middle) > Z_95 else (low, middle)
    return max(0.0, -low)


def _tango(gained: int, lost: int, num_examples: int, difference: float) -> float:
    """Score statistic of the hypothesis that accuracy changed by this difference."""
    a = 2 * num_examples
    b = -gained - lost + (2 * num_examples - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # most likely under the hypothesis
    variance = num_examples * (2 * share_lost + difference * (1 - difference))
    distance = gained - lost - num_examples * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Step-down adjusted p-values (Holm 1979): reject where they are at most alpha, the family-wise error stays below.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)). Keys keep their order.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def paired_gap(right: np.ndarray, present: np.ndarray, source_column: int | None) -> float | None:
    """Accuracy in the source language minus that of another language on the groups that both have, mean over the
    other languages; None where no group has both.

    ``right``, ``present``: bool [N groups, T languages]. Where translations are missing, the plain gap compares
    accuracies on different groups, and groups that lack a translation may be harder.
    """
    if source_column is None:
        return None
    both = present & present[:, [source_column]]
    gaps = [
        float(right[shared, source_column].mean() - right[shared, column].mean())
        for column, shared in enumerate(both.T)
        if column != source_column and shared.any()
    ]
    return math.fsum(gaps) / len(gaps) if gaps else None


@dataclass(frozen=True)
class BootstrapIntervals:
    """95 % intervals (low, high) of after - before; those of the gaps are None where they are not defined.

    ``languages``: of each language's accuracy, in the order of the columns.
    """

    average: tuple[float, float]
    gap: tuple[float, float] | None
    paired_gap: tuple[float, float] | None
    languages: tuple[tuple[float, float], ...]


def paired_bootstrap(
    before: np.ndarray,
    after: np.ndarray,
    present: np.ndarray,
    source_column: int | None,
    num_resamples: int,
    rng: np.random.Generator,
) -> BootstrapIntervals:
    """Percentile intervals (Efron 1979) for the change of the macro average, of both gaps and of each language.

    ``before``, ``after``, ``present``: bool [N groups, T languages]; outcomes count only where ``present``.
    ``source_column``: column of the source language, None if it is not among them.

    A parallel group is drawn with all its languages (cluster bootstrap), because translations of one example are right
    or wrong together. A language that a resample happens to miss is left out of that resample's means.
    Raises ``ValueError`` if the shapes differ or a language is nowhere present.
    """
    if not before.shape == after.shape == present.shape or present.ndim != 2:
        raise ValueError("before, after and present must be matrices of one shape [groups, languages]")
    if not present.any(axis=0).all() or present.size == 0:
        raise ValueError("every language needs at least one example")
    num_groups, num_languages = present.shape
    difference = np.where(present, after.astype(np.float64) - before.astype(np.float64), 0.0)
    both = present & present[:, [source_column]] if source_column is not None else np.zeros_like(present)
    difference_to_source = np.where(both, difference[:, [source_column or 0]] - difference, 0.0)
    parts = [difference, present, difference_to_source, both]
    columns = np.concatenate([part.astype(np.float64) for part in parts], axis=1)  # [N, 4T]

    rows_at_once = max(1, MAX_CELLS // num_groups)
    sums = np.concatenate(
        [
            _multiplicities(num_groups, min(rows_at_once, num_resamples - start), rng) @ columns
            for start in range(0, num_resamples, rows_at_once)
        ]
    )  # [resamples, 4T]; whole numbers, hence exact in any order of summation
    change, drawn = _means(sums[:, :num_languages], sums[:, num_languages : 2 * num_languages])  # of accuracy
    average = _interval(change.sum(axis=1) / drawn.sum(axis=1))
    languages = tuple(_interval(change[drawn[:, column], column]) for column in range(num_languages))
    if source_column is None or num_languages == 1:
        return BootstrapIntervals(average, None, None, languages)
    others = np.arange(num_languages) != source_column
    num_others = drawn[:, others].sum(axis=1)
    defined = drawn[:, source_column] & (num_others > 0)
    gap = change[defined, source_column] - change[defined][:, others].sum(axis=1) / num_others[defined]
    apart, shared = _means(sums[:, 2 * num_languages : 3 * num_languages], sums[:, 3 * num_languages :])
    num_shared = shared[:, others].sum(axis=1)
    paired = apart[:, others].sum(axis=1)[num_shared > 0] / num_shared[num_shared > 0]
    of_gap, of_paired_gap = (_interval(values) if len(values) else None for values in (gap, paired))
    return BootstrapIntervals(average, of_gap, of_paired_gap, languages)


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means, 0 where there is nothing; and where there is something."""
    drawn = counts > 0
    return np.where(drawn, sums / np.where(drawn, counts, 1.0), 0.0), drawn


def _multiplicities(num_groups: int, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each resample draws each group; float64 [num_resamples, num_groups], rows sum to num_groups."""
    drawn = rng.integers(num_groups, size=(num_resamples, num_groups))
    drawn += np.arange(num_resamples)[:, None] * num_groups
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_groups)
    return counts.reshape(num_resamples, num_groups).astype(np.float64)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
