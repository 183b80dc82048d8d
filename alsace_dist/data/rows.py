"""Rows: what lies between tasks, which know texts, and model families, which know token ids.

A parallel group in one language is a *row* as texts, an *encoded row* as token ids, and an *example* with the target
that a training learns from. Candidates belong to the row: fixed answers are the case where every row of a language has
the same ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from alsace_dist.config import TaskConfig
from alsace_dist.files.shards import ParallelGroup
from alsace_dist.tasks.base import Part, candidates, for_language, prompt

__all__ = ["Part"]  # models take it from here, for they do not know tasks


@dataclass(frozen=True)
class Answers:
    """What a task says of its candidates before any row is read.

    ``fixed``: language -> the candidates of every row, of the languages that are to be encoded. ``every``: all
    candidates of the task, whatever the language. ``decoder_prefix``: text that the decoder has produced before the
    answer. ``templates``: all prompt templates. ``max_tokens``: longest prompt.
    """

    fixed: Mapping[str, tuple[str, ...]]
    every: tuple[str, ...]
    decoder_prefix: str
    max_tokens: int
    templates: tuple[str, ...] = ()

    @property
    def num_candidates(self) -> int:
        """Candidates per row."""
        return len(next(iter(self.fixed.values())))


def answers_of(task: TaskConfig, languages: Iterable[str]) -> Answers:
    """The answers of a task in these languages. Raises ``UserError`` for a language without answers."""
    fixed = {language: tuple(for_language(task.answers(), language, "verbalizers")) for language in languages}
    every = tuple(answer for answers in task.answers().values() for answer in answers)
    return Answers(fixed, every, task.decoder_prefix, task.max_tokens, tuple(task.templates().values()))


@dataclass(frozen=True)
class Row:
    """A parallel group in one language, as texts. ``label``: index of the right candidate, if it is known."""

    key: str
    language: str
    label: int | None
    prompt: tuple[Part, ...]
    candidates: tuple[str, ...]


def rows_of(task: TaskConfig, groups: Iterable[ParallelGroup], languages: Iterable[str]) -> list[Row]:
    """Rows of all groups in the given languages (where a group has them), in the groups' order, languages sorted."""
    wanted = sorted(languages)
    return [
        Row(
            group.key,
            language,
            group.label,
            prompt(task, language, group.texts[language]),
            candidates(task, language, group.texts[language]),
        )
        for group in groups
        for language in wanted
        if language in group.texts
    ]


@dataclass(frozen=True)
class Candidates:
    """The candidates of a row as token ids: one tuple per candidate, in the row's order. Equal ones are one object."""

    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class EncodedRow:
    """A row as token ids. ``num_unknown``: tokens that the vocabulary lacks; ``is_cut``: whether the prompt was cut."""

    key: str
    language: str
    label: int | None
    input_ids: list[int]
    candidates: Candidates
    num_unknown: int
    is_cut: bool


@dataclass(frozen=True)
class Example:
    """An encoded row and its target: float32 [K] probabilities; ``weight`` and ``entropy`` as in
    ``method.targets.Target``."""

    row: EncodedRow
    target: np.ndarray
    weight: float
    entropy: float
