"""What every task is: for an example in one language, the prompt and the candidates that the model chooses from."""

from collections.abc import Mapping
from string import Formatter
from typing import NamedTuple, TypeVar

from alsace_dist.config import TaskConfig
from alsace_dist.errors import UserError

Value = TypeVar("Value")


class Part(NamedTuple):
    """A piece of a prompt. ``is_text``: whether it is the example's, and not the template's."""

    content: str
    is_text: bool


def prompt(task: TaskConfig, language: str, fields: Mapping[str, str]) -> tuple[Part, ...]:
    """The model's input for one example, in pieces: only the example's own texts may be cut.

    Raises ``UserError`` if there is no template or a field is missing.
    """
    parts: list[Part] = []
    for literal, name, _, _ in Formatter().parse(for_language(task.templates(), language, "template")):
        parts += [Part(literal, False)] if literal else []
        if name is None:
            continue
        if name not in fields:
            raise UserError(
                f"task.fields: an example in {language!r} lacks the field {name!r}; prepare the data with this task"
            )
        parts.append(Part(fields[name], True))
    return tuple(parts)


def candidates(task: TaskConfig, language: str, fields: Mapping[str, str]) -> tuple[str, ...]:
    """The candidates of one example, in the order that labels count them.

    ``fields`` plays no part as long as every task has fixed answers. Raises ``UserError`` if there are none for the
    language.
    """
    return tuple(for_language(task.answers(), language, "verbalizers"))


def for_language(values: Mapping[str, Value], language: str, name: str) -> Value:
    """A language's own value or the default one. Raises ``UserError`` if there is neither."""
    if language in values:
        return values[language]
    if "default" in values:
        return values["default"]
    raise UserError(f"task.{name}: has nothing for language {language!r} and no default; add one")
