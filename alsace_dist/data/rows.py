"""Rows: what lies between tasks, which know texts, and model families, which know token ids.

A parallel group in one language is a *row* as texts, an *encoded row* as token ids, and an *example* with the target
that a training learns from. Candidates belong to the row: fixed answers are the case where every row of a language has
the same ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alsace_dist.config import TaskConfig
from alsace_dist.errors import UserError
from alsace_dist.files.shards import Label, ParallelGroup, golds
from alsace_dist.tasks.base import GAP, Part, candidates, context_free_prompt, for_language, prompt

__all__ = ["GAP", "Part"]  # models take them from here, for they do not know tasks


@dataclass(frozen=True)
class Answers:
    """What a task says of its candidates before any row is read.

    ``fixed``: language -> the candidates of every row, of the languages that are to be encoded; empty if every row has
    its own. ``every``: all fixed candidates of the task, whatever the language. ``decoder_prefix``: text that the
    decoder has produced before the answer. ``templates``: all prompt templates. ``max_tokens``: longest prompt.
    ``labels``: what the candidates of a row stand for, in their order. ``by_token``, ``less_context_free``: whether a
    candidate's score is a mean over its tokens, and less its score in the row's context-free prompt.
    """

    fixed: Mapping[str, tuple[str, ...]]
    every: tuple[str, ...]
    decoder_prefix: str
    max_tokens: int
    templates: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    by_token: bool = False
    less_context_free: bool = False

    @property
    def num_candidates(self) -> int:
        """Candidates per row; 0: as many as each has of its own."""
        return len(self.labels) or len(next(iter(self.fixed.values()), ()))


def answers_of(task: TaskConfig, languages: Iterable[str]) -> Answers:
    """The answers of a task in these languages. Raises ``UserError`` for a language without answers."""
    fixed = {}
    if task.answers():
        fixed = {language: tuple(for_language(task.answers(), language, "verbalizers")) for language in languages}
    every = tuple(answer for answers in task.answers().values() for answer in answers)
    templates = [*_worded(task, task.templates()), *_worded(task, task.context_free_templates())]
    return Answers(
        fixed,
        every,
        task.decoder_prefix,
        task.max_tokens,
        # Where the texts hold the gap, the templates that a family sees have it, too: how it answers depends on that.
        tuple(f"{one} {GAP.content}" if task.gap else one for one in templates),
        tuple(task.labels),
        by_token=task.candidate_score in ("mean", "mean_pmi"),
        less_context_free=task.needs_context_free,
    )


def _worded(task: TaskConfig, templates: Mapping[str, str]) -> list[str]:
    """Templates with all that ``task.words`` may put into them, so that a family checks that, too."""
    words = task.words_of()
    found: list[str] = []
    for language, template in templates.items():
        of_language = list(words.values()) if language == "default" else [words.get(language, words.get("default", {}))]
        for fields in of_language or [{}]:
            rendered = [template]
            for field, texts in fields.items():
                rendered = [one.replace(f"{{{field}}}", text) for one in rendered for text in texts.values()]
            found += rendered
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Row:
    """A parallel group in one language, as texts.

    ``label``, ``category``: as in ``ParallelGroup``; ``is_apart``: whether the candidates correspond to no other
    language's. ``context_free``: the prompt without context, where scores are compared with it.
    """

    key: str
    language: str
    label: Label
    prompt: tuple[Part, ...]
    candidates: tuple[str, ...]
    is_apart: bool = False
    category: str = ""
    context_free: tuple[Part, ...] = ()


def rows_of(task: TaskConfig, groups: Iterable[ParallelGroup], languages: Iterable[str]) -> list[Row]:
    """Rows of all groups in the given languages (where a group has them), in the groups' order, languages sorted."""
    wanted = sorted(languages)
    return [
        Row(
            group.key,
            language,
            group.label_of(language),
            prompt(task, language, group.texts[language]),
            candidates(task, language, group.texts[language], group.candidates.get(language)),
            language in group.apart,
            group.category,
            context_free_prompt(task, language, group.texts[language]),
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
    """A row as token ids.

    ``num_unknown``: tokens that the vocabulary lacks; ``is_cut``: whether the prompt was cut; ``context_free_ids``: of
    the prompt without context; the rest as in ``Row``.
    """

    key: str
    language: str
    label: Label
    input_ids: list[int]
    candidates: Candidates
    num_unknown: int
    is_cut: bool
    is_apart: bool = False
    category: str = ""
    context_free_ids: tuple[int, ...] = ()

    @property
    def context_free(self) -> "EncodedRow":
        """The same candidates after the prompt without context."""
        return replace(self, input_ids=list(self.context_free_ids), context_free_ids=())


def comparable_groups(rows: Sequence[Row] | Sequence[EncodedRow], indices: Iterable[int]) -> dict[str, dict[str, int]]:
    """Group -> language -> index of its row, of rows whose candidates are those of the group's other languages."""
    groups: dict[str, dict[str, int]] = {}
    for index in indices:
        if not rows[index].is_apart:
            groups.setdefault(rows[index].key, {})[rows[index].language] = index
    sizes = {key: {len(rows[index].candidates) for index in group.values()} for key, group in groups.items()}
    return {key: group for key, group in groups.items() if len(sizes[key]) == 1}


@dataclass(frozen=True)
class Example:
    """An encoded row and its target: float32 [K] probabilities; ``weight`` and ``entropy`` as in
    ``method.targets.Target``."""

    row: EncodedRow
    target: np.ndarray
    weight: float
    entropy: float


def one_hot_example(row: EncodedRow, place: str) -> Example:
    """A row that learns its label; several right candidates share the target.

    Raises ``UserError`` that names the place if it has no label, or none of its candidates.
    """
    right = golds(row.label)
    if not right or any(not 0 <= index < len(row.candidates) for index in right):
        wrong = "no label" if row.label is None else f"the label {row.label}"
        raise UserError(f"{place}: group {row.key!r} has {wrong}; prepare the data again, with labels in this split")
    target = np.zeros(len(row.candidates), dtype=np.float32)
    target[list(right)] = 1 / len(right)
    return Example(row, target, 1.0, float(np.log(len(right))))
