"""Completion in bash and zsh: fire makes the script from functions, and here is what it does not know of this program.

fire takes the last word that is no flag for the command, so that nothing would be completed behind a config's name; it
knows no settings, whose names have dots; and it keeps the shell from completing files.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import get_args, get_origin

from alsace_dist.arguments import Command
from alsace_dist.config import Section

SETTINGS = "SETTINGS"  # the flag that stands for all settings in what fire writes
WRAPPER = """
_alsace() {
  local word words=("${COMP_WORDS[0]}" "${COMP_WORDS[1]}") cur="${COMP_WORDS[COMP_CWORD]}" number=$((COMP_CWORD - 2))
  COMPREPLY=()
  if ((COMP_CWORD > 1)); then
    [[ $cur == -* ]] || return 0
    for word in "${COMP_WORDS[@]:2:$number}"; do [[ $word == --?* ]] && words+=("$word"); done
    words+=("$cur")
    COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
  fi
  _complete-alsace
}
complete -o default -F _alsace alsace
"""


def script(commands: Mapping[str, Command], settings: type[Section], shell: str) -> str:
    """The script that a ``shell`` (bash or zsh) evaluates; ``settings``: the config, whose dotted names are flags."""
    from fire import completion

    names = " ".join(f"--{name}" for name in dotted_names(settings))
    text: str = completion.Script("alsace", {name: _flags_of(one) for name, one in commands.items()}, shell="bash")
    text = text.replace(f"--{SETTINGS}", names) + WRAPPER
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + text


def _flags_of(command: Command) -> Callable[[], None]:
    """A function that has the command's flags as its parameters, for fire to look at."""

    def function() -> None:
        """Never called."""

    flags = [*command.flags, *(["over", SETTINGS] if command.takes_settings else [])]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in flags]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def dotted_names(section: type[Section], prefix: str = "") -> Iterable[str]:
    """Names of all settings of a section, those of the sections within it too."""
    for name, field in section.model_fields.items():
        # A section may be left out (a union with None); the items of a list of sections have no dotted names.
        kinds = [field.annotation] if get_origin(field.annotation) is None else list(get_args(field.annotation))
        is_list = get_origin(field.annotation) in (list, dict)
        inner = next((one for one in kinds if inspect.isclass(one) and issubclass(one, Section) and not is_list), None)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from dotted_names(inner, f"{prefix}{name}.")
