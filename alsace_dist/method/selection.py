"""Which languages teach, and with what weight: votes, language scores, rules, weights."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np

from alsace_dist.config import SelectConfig
from alsace_dist.errors import UserError
from alsace_dist.method import GroupScores


def vote(group: GroupScores, soft: bool = False, leave_out: str | None = None) -> int:
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
    groups: Iterable[GroupScores],
    agreement: bool = False,
    soft: bool = False,
    leave_one_out: bool = False,
    source_language: str | None = None,
) -> dict[str, float]:
    """``s_t = mean_i P(y_i | x_t,i)`` with the vote y_i, over the groups that have language t.

    ``source_language``: y_i is this language's own best answer instead of a vote, over the groups that have it; for
    models that are near chance in most languages, whose votes are noise.

    ``agreement``: the share of groups in which the language's own best answer is the vote. ``leave_one_out``: against
    the vote of the other languages; groups with no other language do not count.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for _, language, value in score_values(groups, agreement, soft, leave_one_out, source_language):
        sums[language] = sums.get(language, 0.0) + value
        counts[language] = counts.get(language, 0) + 1
    return {language: sums[language] / counts[language] for language in sorted(sums)}


def score_values(
    groups: Iterable[GroupScores],
    agreement: bool = False,
    soft: bool = False,
    leave_one_out: bool = False,
    source_language: str | None = None,
) -> Iterator[tuple[int, str, float]]:
    """What ``language_scores`` takes the means of: index of a group, language, value."""
    for index, group in enumerate(groups):
        if source_language is not None and source_language not in group:
            continue
        whole = None if leave_one_out else vote(group, soft)
        if source_language is not None:
            whole = int(np.argmax(group[source_language]))
        for language, row in group.items():
            if leave_one_out and len(group) < 2:
                continue
            answer = vote(group, soft, language) if whole is None else whole
            yield (
                index,
                language,
                float(np.argmax(row) == answer) if agreement else float(np.exp(np.float64(row[answer]))),
            )


def accuracies(groups: Iterable[GroupScores], labels: Iterable[Collection[int]]) -> dict[str, float]:
    """Share of groups in which a language's best answer is a right one: for analysis, as no method may know it."""
    right: dict[str, list[bool]] = {}
    for group, label in zip(groups, labels, strict=True):
        for language, row in group.items():
            right.setdefault(language, []).append(int(np.argmax(row)) in label)
    return {language: float(np.mean(right[language])) for language in sorted(right)}


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


# --- rules ---------------------------------------------------------------------------------------------------------

Scores = Mapping[str, float]


def choose_teachers(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    """Teachers under the section's rule, best score first. Raises ``UserError`` for a rule that cannot be met."""
    assert section.rule is not None, "the config fills it in from the method"
    return RULES[section.rule](section, scores, source_language, seed)


def _threshold(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    return teachers_by_threshold(scores)


def _top_k(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    assert section.top_k is not None
    if section.top_k > len(scores):
        raise UserError(f"select.top_k: {section.top_k} asked for, there are {len(scores)} languages; lower it")
    return best_first(scores)[: section.top_k]


def _explicit(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    ranked = best_first(scores)
    if unknown := sorted(set(section.teachers) - set(ranked)):
        raise UserError(f"select.teachers: {', '.join(unknown)} not among the scored languages {', '.join(ranked)}")
    return list(dict.fromkeys(section.teachers))  # whose order is the ranking that targets: ranked goes by


def _all(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    return best_first(scores)


def _source(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    return [source_language]


def _random(section: SelectConfig, scores: Scores, source_language: str, seed: int) -> list[str]:
    """As many as the threshold picks."""
    ranked = best_first(scores)
    size = len(teachers_by_threshold(scores))
    drawn = np.random.default_rng([seed, 1]).choice(ranked, size=size, replace=False)
    return [language for language in ranked if language in drawn]


# ``select.rule`` -> the rule: (section, language -> score, source language, seed) -> teachers.
RULES: dict[str, Callable[[SelectConfig, Scores, str, int], list[str]]] = {
    "threshold": _threshold,
    "top_k": _top_k,
    "explicit": _explicit,
    "all": _all,
    "source": _source,
    "random": _random,
}
