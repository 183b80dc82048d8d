"""What every task is: for an example in one language, the prompt and the candidates that the model chooses from; and
what a published dataset says of itself."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, TypeVar

from alsace_dist.config import ANSWER, TaskConfig
from alsace_dist.errors import UserError
from alsace_dist.reading import shorten

Value = TypeVar("Value")


class Part(NamedTuple):
    """A piece of a prompt. ``is_text``: whether it is the example's, and not the template's."""

    content: str
    is_text: bool


GAP = Part("{answer}", False)  # the place of the answer; no other piece of a template holds a whole pair of braces


def prompt(task: TaskConfig, language: str, fields: Mapping[str, str]) -> tuple[Part, ...]:
    """The model's input for one example, in pieces: only the example's own texts may be cut.

    Raises ``UserError`` if there is no template, a field is missing or one has a value that there are no words for.
    """
    return _rendered(for_language(task.templates(), language, "template"), task, language, fields)


def context_free_prompt(task: TaskConfig, language: str, fields: Mapping[str, str]) -> tuple[Part, ...]:
    """The prompt that says nothing of the example but its question, as ``prompt``; empty where the task has none."""
    templates = task.context_free_templates()
    if not templates:
        return ()
    return _rendered(for_language(templates, language, "context_free_template"), task, language, fields)


def _rendered(template: str, task: TaskConfig, language: str, fields: Mapping[str, str]) -> tuple[Part, ...]:
    """A template with an example in it."""
    parts: list[Part] = []
    words = for_language(task.words_of(), language, "words") if task.words else {}
    for literal, name, _, _ in Formatter().parse(template):
        parts += [Part(literal, False)] if literal else []
        if name is None:
            continue
        if name == ANSWER and name not in task.fields:
            parts.append(GAP)
        elif name in words:
            parts.append(Part(_in_words(words[name], _text_of(fields, name, language), name), False))
        else:
            parts += _around_gap(_text_of(fields, name, language), task.gap)
    return tuple(parts)


def fields_of(template: str) -> list[str]:
    """The names in the braces of a template."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _around_gap(text: str, gap: str) -> list[Part]:
    """A text as a piece, or as the pieces before and behind the gap that it holds."""
    before, *after = text.split(gap, maxsplit=1) if gap else [text]
    parts = [Part(before, True), *([GAP] if after else []), *(Part(one, True) for one in after)]
    return [part for part in parts if part.content]


def _in_words(words: Mapping[str, str], value: str, name: str) -> str:
    if value not in words:
        raise UserError(
            f"task.words.{name}: has nothing for {shorten(repr(value), 60)}; prepare the data with this task"
        )
    return words[value]


def _text_of(fields: Mapping[str, str], name: str, language: str) -> str:
    if name not in fields:
        raise UserError(
            f"task.fields: an example in {language!r} lacks the field {name!r}; prepare the data with this task"
        )
    return fields[name]


def candidates(
    task: TaskConfig, language: str, fields: Mapping[str, str], own: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The candidates of one example, in the order that labels count them: its group's own, its fields', or the
    language's fixed answers.

    Raises ``UserError`` if there are none for the language.
    """
    if task.has_own_candidates:
        if own is None:
            raise UserError(f"task.candidates: an example in {language!r} has none; prepare the data with this task")
        return own
    if task.candidate_fields:
        return tuple(_text_of(fields, name, language) for name in task.candidate_fields)
    return tuple(for_language(task.answers(), language, "verbalizers"))


def for_language(values: Mapping[str, Value], language: str, name: str) -> Value:
    """A language's own value or the default one. Raises ``UserError`` if there is neither."""
    if language in values:
        return values[language]
    if "default" in values:
        return values["default"]
    other = ", or take template: english" if name == "template" else ""
    raise UserError(f"task.{name}: has nothing for language {language!r} and no default; add one{other}")


@dataclass(frozen=True)
class Layout:
    """A form in which a dataset is published: which files there are, and what their columns hold.

    ``paths``: patterns of the files below the dataset's folder, with ``{part}`` and ``{language}`` in them; a language
    is in the first that has it. ``parts``: our name of a part (train, dev, test) -> the name there; a part that is not
    named has our name. ``columns``: as in ``data.inputs.columns``. ``header``, ``quoting``: as in ``data.inputs``.
    ``language``: of all rows, where neither files nor columns say it.
    """

    paths: tuple[str, ...]
    columns: Mapping[str, Any]
    parts: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    quoting: str = "csv"
    language: str = ""


@dataclass(frozen=True)
class Published:
    """A dataset that people published, in all its layouts.

    ``name``: as people write it. ``fields``, ``labels``: as ``task`` must name them, whatever the layout says.
    ``languages``: all of them, or a pattern of their names. ``layouts``: the first that fits counts. ``hub_columns``:
    of its configurations on the hub, one per language. ``hub_parts``: our name of a part -> the hub's. ``spellings``:
    other spellings of labels -> the label. ``no_label``: labels that say that nobody knows the true one; empty for no
    label. ``missing``: texts that stand for a missing translation. ``shared``: fields that say the same in all
    languages of a group; where files differ, most languages are right, English among them. ``hub_subsets``: the last
    part of a name on the hub -> language -> its configuration there, for sets that are no folder of languages.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    languages: tuple[str, ...] | re.Pattern[str]
    layouts: tuple[Layout, ...]
    hub_columns: Mapping[str, Any]
    hub_parts: Mapping[str, str] = field(default_factory=lambda: {"dev": "validation"})
    spellings: Mapping[str, str] = field(default_factory=dict)
    no_label: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    hub_subsets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def has_language(self, name: str) -> bool:
        """Whether a language of the dataset has this name."""
        if isinstance(self.languages, tuple):
            return name in self.languages
        return self.languages.fullmatch(name) is not None


class FoundRow(NamedTuple):
    """A row of a dataset that is read by its own module: one language of a group, and the line where it stands.

    ``label``: index of the right candidate, or indices. ``is_apart``: whether its candidates correspond to no other
    language's. ``unit``, ``category``: as in a parallel group.
    """

    path: Path
    line: int
    key: str
    language: str
    fields: Mapping[str, str]
    candidates: tuple[str, ...]
    label: list[int]
    is_apart: bool
    unit: str
    category: str


class FoundProblem(NamedTuple):
    """What is wrong with a line, as ``data.records.KINDS_OF_BAD`` names it. ``keys``: groups that lack a row by it."""

    path: Path
    line: int
    kind: str
    detail: str
    keys: tuple[str, ...] = ()
