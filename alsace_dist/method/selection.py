"""Which languages teach, and with what weight: votes, language scores, rules, weights."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from alsace_dist.config import SelectConfig
from alsace_dist.errors import UserError
from alsace_dist.method import GroupScores
from alsace_dist.method.block import Block, block_of


@dataclass(frozen=True)
class Yardstick:
    """What languages are scored against, and how.

    The default: the mean probability of the vote. ``soft``: the vote is the candidate with the largest summed
    probability. ``source_language``: instead of a vote, this language's own best answer, over the groups that have it;
    for models that are near chance in most languages, whose votes are noise. ``agreement``: the share of groups in
    which the language's own best answer is the vote. ``leave_one_out``: against the vote of the other languages; groups
    with no other language do not count.
    """

    agreement: bool = False
    soft: bool = False
    leave_one_out: bool = False
    source_language: str | None = None

    def __post_init__(self) -> None:
        assert not (self.leave_one_out and self.source_language), "the source language's answer is no vote"


def vote(group: GroupScores, soft: bool = False) -> int:
    """Index of the candidate that most languages of a group prefer; see ``votes``."""
    return int(votes(block_of([group]), soft)[0])


def votes(block: Block, soft: bool = False) -> np.ndarray:
    """int [G]: the candidate that most languages prefer; ties are broken by summed probability, then by index.

    ``soft``: the candidate with the largest summed probability. Every group must have a language.
    """
    ballots = np.eye(block.log_probs.shape[1], dtype=np.int64)[block.answers()]
    return _winners(block.dense(ballots).sum(axis=1), block.dense(block.probabilities()).sum(axis=1), soft)


def _votes_of_others(block: Block, soft: bool) -> np.ndarray:
    """int [N]: for each row the vote of its group without it; -1 where its group has no other row."""
    ballots = block.dense(np.eye(block.log_probs.shape[1], dtype=np.int64)[block.answers()])
    probabilities = block.dense(block.probabilities())
    found = np.full(len(block.group), -1)
    for language in range(len(block.languages)):
        # Without the language the sum is taken anew: what a subtraction leaves is not to the last digit what adding
        # the others gives, and might break ties in another way.
        others = [np.delete(values, language, axis=1).sum(axis=1) for values in (ballots, probabilities)]
        winners = np.where(others[0].any(axis=1), _winners(others[0], others[1], soft), -1)
        rows = block.language == language
        found[rows] = winners[block.group[rows]]
    return found


def _winners(ballots: np.ndarray, summed: np.ndarray, soft: bool) -> np.ndarray:
    """int [G] from the numbers of votes and the summed probabilities, [G, K] each."""
    is_first = (ballots == ballots.max(axis=1, keepdims=True)) | soft
    found: np.ndarray = np.where(is_first, summed, -np.inf).argmax(axis=1)
    return found


def score_values(block: Block, yardstick: Yardstick) -> np.ndarray:
    """float64 [N]: what language scores are the means of; NaN where a row does not count."""
    answers = block.answers()
    if yardstick.leave_one_out:
        aims = _votes_of_others(block, yardstick.soft)
    elif yardstick.source_language is None:
        aims = votes(block, yardstick.soft)[block.group]
    else:
        of_group = np.full(block.num_groups, -1)
        rows = np.array([name == yardstick.source_language for name in block.languages], bool)[block.language]
        of_group[block.group[rows]] = answers[rows]
        aims = of_group[block.group]
    counts = aims >= 0
    values = np.full(len(aims), np.nan)
    if yardstick.agreement:
        values[counts] = answers[counts] == aims[counts]
    else:
        values[counts] = np.exp(block.log_probs[counts, aims[counts]].astype(np.float64))
    return values


def right_values(block: Block, golds: np.ndarray) -> np.ndarray:
    """float64 [N]: whether a row's best answer is a right one: for analysis, as no method may know it.

    ``golds``: int [G, M], the right candidates of each group, -1 where it has fewer.
    """
    found: np.ndarray = (block.answers()[:, None] == golds[block.group]).any(axis=1).astype(np.float64)
    return found


class Means:
    """Means of values by language, a block at a time; the values are added one after another, in their order."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, block: Block, values: np.ndarray) -> None:
        """Add values of a block's rows, [N]; NaN: one that does not count."""
        counts = ~np.isnan(values)
        rows = block.language[counts]
        sums = np.array([self._sums.get(name, 0.0) for name in block.languages])
        np.add.at(sums, rows, values[counts])
        numbers = np.bincount(rows, minlength=len(block.languages))
        for name, total, number in zip(block.languages, sums.tolist(), numbers.tolist(), strict=True):
            if number:
                self._sums[name], self._counts[name] = total, self._counts.get(name, 0) + number

    def means(self) -> dict[str, float]:
        """Language -> mean, for those that have a value."""
        return {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}


def language_scores(groups: Iterable[GroupScores], yardstick: Yardstick = Yardstick()) -> dict[str, float]:
    """``s_t = mean_i P(y_i | x_t,i)`` with the vote y_i, over the groups that have language t."""
    block, means = block_of(groups), Means()
    means.add(block, score_values(block, yardstick))
    return means.means()


def accuracies(groups: Iterable[GroupScores], labels: Iterable[Collection[int]]) -> dict[str, float]:
    """Share of groups in which a language's best answer is a right one."""
    block, means = block_of(groups), Means()
    means.add(block, right_values(block, gold_rows(labels)))
    return means.means()


def gold_rows(labels: Iterable[Collection[int]]) -> np.ndarray:
    """The right candidates of each group as ``right_values`` takes them."""
    rows = [list(label) for label in labels]
    most = max(map(len, rows), default=0)
    return np.array([row + [-1] * (most - len(row)) for row in rows], np.int64).reshape(len(rows), most)


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
