"""The command line as typed: which command, its arguments and flags; what is wrong with them is one line.

A command is a function: its parameters without default are arguments, its keyword-only parameters flags, and
``**overrides`` takes settings of the config by dotted name. Its docstring is its help.
"""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alsace_dist.errors import UserError
from alsace_dist.reading import shorten

HELP = ("--help", "-h")
OVER_HELP = "sections of a YAML file laid over the config; or a preset: lora, hpz, offload-all ... (configs/engine)"
_FLAG = re.compile(r"--(?P<name>[^=]+)(=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """What was asked for: a command with its values, or its help."""

    function: Callable[..., None]
    arguments: list[str]
    flags: dict[str, Any]

    def __call__(self) -> None:
        """Do it."""
        self.function(*self.arguments, **self.flags)


@dataclass(frozen=True)
class Command:
    """A command. ``function``: what the command calls; ``example``: the command as a person would type it."""

    name: str
    function: Callable[..., None]
    example: str

    @property
    def arguments(self) -> list[str]:
        """Names of what must be given."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        return [one.name for one in self._parameters if one.kind in kinds and one.default is one.empty]

    @property
    def optional(self) -> list[str]:
        """Names of arguments that may be left out."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        return [one.name for one in self._parameters if one.kind in kinds and one.default is not one.empty]

    @property
    def repeated(self) -> str:
        """Name of an argument of which there may be any number; empty if there is none."""
        return next((one.name for one in self._parameters if one.kind is inspect.Parameter.VAR_POSITIONAL), "")

    @property
    def flags(self) -> dict[str, inspect.Parameter]:
        """Flags by the name of their parameter."""
        return {one.name: one for one in self._parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def takes_settings(self) -> bool:
        """Whether it takes settings of the config."""
        return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._parameters)

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @property
    def summary(self) -> str:
        """The first sentence of its help."""
        return inspect.getdoc(self.function).partition("\n")[0]  # type: ignore[union-attr]

    def usage(self) -> str:
        """How it is called."""
        words = [name.upper() for name in self.arguments] + [f"[{name.upper()}]" for name in self.optional]
        words += [f"[{self.repeated.upper()} ...]"] if self.repeated else []
        words += [f"[--{_typed(name)}{'' if _is_switch(flag) else '=...'}]" for name, flag in self.flags.items()]
        return " ".join(["alsace", self.name, *words, *(["[--SETTING=VALUE ...]"] if self.takes_settings else [])])

    def help(self) -> str:
        """All about it."""
        doc, _, rest = (inspect.getdoc(self.function) or "").partition("\nArgs:\n")
        texts = {}
        for line in textwrap.dedent(rest).splitlines():
            if match := re.match(r"(\w+): (.*)", line):
                texts[match[1]] = match[2]
        rows = [
            (name.upper(), texts.get(name, "")) for name in [*self.arguments, *self.optional, self.repeated] if name
        ]
        rows += [(f"--{_typed(name)}", texts.get(name, "")) for name in self.flags]
        if self.takes_settings:
            rows += [("--SETTING=VALUE", texts["overrides"]), ("--over=FILE", OVER_HELP)]
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {text}" for name, text in rows]
        return "\n".join([f"usage: {self.usage()}", "", doc.strip(), "", *lines, "", f"example: {self.example}"])


def parse(words: Sequence[str], commands: Mapping[str, Command], settings: Callable[[], Sequence[str]]) -> Call:
    """What the words after the program's name ask for. ``settings()``: names of the config's keys and sections.

    Raises ``UserError`` for words that no command knows, with the nearest that one does.
    """
    if not words or words[0] in (*HELP, "help"):
        return Call(print, [overview(commands)], {})
    if words[0] == "--version":
        from alsace_dist import __version__

        return Call(print, [f"alsace_dist {__version__}"], {})
    name, *rest = words
    if name not in commands:
        raise UserError(f"{shorten(name)!r} is no command; {_near(name, commands, '')}`alsace --help` lists them")
    command = commands[name]
    if set(HELP) & set(rest):
        return Call(print, [command.help()], {})
    return _call(command, rest, settings)


def overview(commands: Mapping[str, Command]) -> str:
    """The commands, a line each."""
    width = max(map(len, commands))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    head = "Narrow the gap between languages inside one multilingual model, without labels."
    tail = "`alsace COMMAND --help` says what a command takes. Start with `alsace demo`, or `alsace init xnli`."
    return "\n".join([head, "", *rows, "", tail])


def _call(command: Command, words: list[str], settings: Callable[[], Sequence[str]]) -> Call:
    given: list[str] = []
    flags: dict[str, Any] = {}
    pending = list(words)
    while pending:
        word = pending.pop(0)
        match = _FLAG.fullmatch(word)
        if match is None:
            if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
                raise UserError(f"{command.name}: {shorten(word)!r} is no flag; flags begin with two dashes")
            given.append(word)
            continue
        name, value = match["name"], match["value"]
        key = _known(command, name, settings)
        if value is None and not (key in command.flags and _is_switch(command.flags[key])):
            if not pending or pending[0].startswith("--"):
                raise UserError(f"{command.name}: --{shorten(name)} needs a value: --{shorten(name)}=...")
            value = pending.pop(0)
        if key in flags:
            raise UserError(f"{command.name}: --{shorten(name)} is given twice; give it once")
        flags[key] = _value(name, value, command.flags[key]) if key in command.flags else value
    _check_number(command, given)
    for key, flag in command.flags.items():
        if flag.default is flag.empty and key not in flags:
            raise UserError(f"{command.name}: needs --{_typed(key)}=...; for example: {command.example}")
    return Call(command.function, given, flags)


def _known(command: Command, name: str, settings: Callable[[], Sequence[str]]) -> str:
    """The parameter or setting that a flag names. Raises ``UserError`` if there is none."""
    if (parameter := name.replace("-", "_")) in command.flags:
        return parameter
    if command.takes_settings:
        known = settings()
        if name.partition(".")[0] in known:
            return name
        near = _near(name.partition(".")[0], [*known, *map(_typed, command.flags)], "--")
        raise UserError(
            f"{command.name}: --{shorten(name)} is no flag of {command.name} and no setting; {near}"
            f"`alsace {command.name} --help` lists flags, docs/config.md settings"
        )
    near = _near(name, [_typed(one) for one in command.flags], "--")
    raise UserError(f"{command.name}: --{shorten(name)} is no flag; {near}`alsace {command.name} --help` lists them")


def _check_number(command: Command, given: list[str]) -> None:
    most = len(command.arguments) + len(command.optional)
    if len(given) > most and not command.repeated:
        raise UserError(
            f"{command.name}: {shorten(given[most])!r} is one word too many; settings are written --name=value "
            f"({command.usage()})"
        )
    if len(given) < len(command.arguments):
        missing = command.arguments[len(given)]
        raise UserError(f"{command.name}: needs {missing.upper()}; for example: {command.example}")


def _value(name: str, text: str | None, flag: inspect.Parameter) -> Any:
    if isinstance(flag.default, bool):
        if text is None or text.lower() in ("true", "false"):
            return text is None or text.lower() == "true"
        raise UserError(f"--{name}={shorten(text)}: give true or false, or nothing")
    assert text is not None
    if isinstance(flag.default, int):
        try:
            return int(text)
        except ValueError:
            raise UserError(f"--{name}={shorten(text)}: give a whole number") from None
    return text


def _is_switch(flag: inspect.Parameter) -> bool:
    return isinstance(flag.default, bool)


def _typed(parameter: str) -> str:
    return parameter.replace("_", "-")


def _near(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str) -> str:
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"did you mean {prefix}{found[0]}? " if found else ""
