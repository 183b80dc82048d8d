"""Tab-completion as bash itself does it, with the script that the program prints."""

import subprocess
from functools import cache

import pytest
import tiny

TRY = r"""
eval "$SCRIPT"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
[[ $(complete -p alsace) == "complete -o default -F _alsace alsace" ]] || exit 1
_alsace
printf '%s\n' "${COMPREPLY[@]}"
"""


@cache
def script() -> str:
    return tiny.alsace("completion", "bash").stdout


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words; bash takes --flag=value for three."""
    done = subprocess.run(
        ["bash", "-u", "-c", TRY, "bash", *words], env={"SCRIPT": script()}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("alsace", "pre"), ["prepare", "pretrain-nano"]),
        (("alsace", "run", "config.yaml", "--dry"), ["--dry-run"]),
        (("alsace", "run", "config.yaml", "--distill.learn"), ["--distill.learning_rate"]),
        (("alsace", "run", "config.yaml", "--ov"), ["--over"]),
        (("alsace", "status", "runs/demo", "--lines", "=", "3", "--"), ["--debug", "--every", "--watch"]),
        (("alsace", "submit", "--cluster", "=", "site.yaml", "config.yaml", "--aft"), ["--after"]),
        (("alsace", "run", "conf"), []),  # of which bash makes files
        (("alsace", "report", "runs/demo", "--distill"), []),
    ],
)
def test_commands_flags_and_settings_are_offered_behind_a_config_too(
    words: tuple[str, ...], offered: list[str]
) -> None:
    assert completed(*words) == offered


def test_settings_are_those_of_the_config() -> None:
    offered = completed("alsace", "run", "config.yaml", "--")
    assert {"--dry-run", "--seed", "--data.splits", "--finetune.num_epochs", "--model.nano.vocab_size"} <= set(offered)
    assert not [name for name in offered if name.startswith("--data.inputs.")]


def test_zsh_is_told_to_take_the_script_of_bash() -> None:
    assert tiny.alsace("completion", "zsh").stdout.startswith("autoload -U +X bashcompinit && bashcompinit\n")
