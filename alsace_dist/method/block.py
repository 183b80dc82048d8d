"""Scores of many parallel groups as columns, which the arithmetic goes through without a Python object for each row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alsace_dist.method import GroupScores


@dataclass(frozen=True)
class Block:
    """N rows, each the scores of one of G groups in one of T languages; by group, and within a group by language.

    ``languages``: sorted. ``group``, ``language``: int [N], which of them a row is of. ``log_probs``: float [N, K],
    -inf behind the ``sizes[i]`` candidates of a row that has fewer than K. Of a group all rows have equally many.
    """

    languages: tuple[str, ...]
    num_groups: int
    group: np.ndarray
    language: np.ndarray
    log_probs: np.ndarray
    sizes: np.ndarray

    def dense(self, values: np.ndarray) -> np.ndarray:
        """Values of rows [N, ...] as [G, T, ...], 0 where a group lacks a language."""
        found = np.zeros((self.num_groups, len(self.languages), *values.shape[1:]), values.dtype)
        found[self.group, self.language] = values
        return found

    def present(self) -> np.ndarray:
        """bool [G, T]: which group has which language."""
        return self.dense(np.ones(len(self.group), bool))

    def answers(self) -> np.ndarray:
        """int [N]: the best candidate of each row, the first of equals."""
        found: np.ndarray = self.log_probs.argmax(axis=1) if len(self.group) else np.empty(0, np.int64)
        return found

    def probabilities(self) -> np.ndarray:
        """float64 [N, K], 0 behind the candidates of a row."""
        return np.exp(self.log_probs.astype(np.float64))

    def with_log_probs(self, log_probs: np.ndarray) -> "Block":
        """The same rows with other scores."""
        return replace(self, log_probs=log_probs)


def block_of(groups: Iterable[GroupScores]) -> Block:
    """Groups as a block. Raises ``ValueError`` if rows of one group differ in their number of candidates."""
    listed = list(groups)
    languages = sorted({language for group in listed for language in group})
    found = [
        (index, languages.index(language), np.asarray(group[language]))
        for index, group in enumerate(listed)
        for language in sorted(group)
    ]
    sizes = np.array([len(row) for _, _, row in found], np.int64)
    group, language = (np.array([one[place] for one in found], np.int64) for place in (0, 1))
    if len({(index, len(row)) for index, _, row in found}) != len(set(group.tolist())):
        raise ValueError("rows of one group differ in their number of candidates")
    kind = np.result_type(np.float32, *{row.dtype for *_, row in found})
    log_probs = np.full((len(found), int(sizes.max(initial=0))), -np.inf, kind)
    for place, (*_, row) in enumerate(found):
        log_probs[place, : len(row)] = row
    return Block(tuple(languages), len(listed), group, language, log_probs, sizes)


class Presence:
    """How many groups have which languages, a block at a time: some bytes for each block and for each combination of
    languages in it."""

    def __init__(self) -> None:
        self.num_groups = 0
        self._columns: dict[str, int] = {}  # of the bits of a combination
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # combinations as bits, and how often each is there

    def add(self, block: Block) -> None:
        """Add the groups of a block."""
        if block.num_groups == 0:
            return
        self.num_groups += block.num_groups
        columns = [self._columns.setdefault(name, len(self._columns)) for name in block.languages]
        present = np.zeros((block.num_groups, len(self._columns)), bool)
        present[:, columns] = block.present()
        combinations, counts = np.unique(present, axis=0, return_counts=True)
        self._parts.append((np.packbits(combinations, axis=1), counts))

    @property
    def languages(self) -> list[str]:
        """Those of all groups, sorted."""
        return sorted(self._columns)

    def kinds(self, teachers: Sequence[str]) -> dict[tuple[str, ...], int]:
        """The languages of a group of each kind -> how many groups are of this kind: which have as many teachers, and
        as many other languages. To ``num_pairs`` these are alike, whatever languages they are."""
        others = [name for name in self._columns if name not in teachers]
        is_teacher = np.array([name in teachers for name in self._columns], bool)
        numbers = np.zeros((len(teachers) + 1, len(others) + 1), np.int64)
        for combinations, counts in self._parts:
            present = np.unpackbits(combinations, axis=1, count=len(self._columns)).astype(bool)
            kind = present[:, is_teacher].sum(axis=1), present[:, ~is_teacher].sum(axis=1)
            np.add.at(numbers, kind, counts)
        found = zip(*np.nonzero(numbers), strict=True)
        return {(*teachers[:some], *others[:more]): int(numbers[some, more]) for some, more in found}
