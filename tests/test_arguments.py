"""The command line as typed: what is wrong with it is one line that names the nearest right word; help is on stdout."""

import subprocess
import sys

import pytest

from alsace_dist.arguments import Call, parse
from alsace_dist.commands import COMMANDS
from alsace_dist.errors import UserError

SETTINGS = ["run_dir", "data", "distill", "engine"]


def _parsed(*words: str) -> Call:
    return parse(words, COMMANDS, lambda: SETTINGS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], ["'rnu'", "did you mean run?"]),
        (["__class__"], ["'__class__'", "--help"]),
        (["run"], ["needs CONFIG", "alsace run"]),
        (["run", "a.yaml", "b.yaml"], ["'b.yaml'", "one word too many"]),
        (["run", "a.yaml", "-x"], ["'-x'", "two dashes"]),
        (["run", "a.yaml", "--", "--interactive"], ["no flag"]),
        (["run", "a.yaml", "--dry-runn"], ["--dry-runn", "did you mean --dry-run?"]),
        (["run", "a.yaml", "--distil.num_epochs=2"], ["did you mean --distill?"]),
        (["run", "a.yaml", "--run_dir=a", "--run_dir=b"], ["--run_dir", "twice"]),
        (["run", "a.yaml", "--run_dir"], ["--run_dir", "needs a value"]),
        (["run", "a.yaml", "--dry-run=maybe"], ["maybe", "true or false"]),
        (["score", "a.yaml", "--round=one"], ["one", "whole number"]),
        (["status", "runs/a", "--linse=3"], ["did you mean --lines?"]),
        (["submit", "a.yaml"], ["--cluster"]),
    ],
)
def test_a_slip_is_refused_with_the_word_that_is_wrong_and_the_remedy(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        _parsed(*words)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_flags_take_dashes_or_underscores_and_values_after_a_blank_or_an_equals_sign() -> None:
    for words in (["--dry-run", "--run_dir", "x"], ["--dry_run", "--run_dir=x"], ["--dry-run=true", "--run_dir=x"]):
        call = _parsed("run", "a.yaml", *words)
        assert call.arguments == ["a.yaml"]
        assert call.flags == {"dry_run": True, "run_dir": "x"}
    assert _parsed("score", "a.yaml", "--round=2").flags == {"round": 2}


def test_a_value_keeps_its_equals_signs_and_newlines() -> None:
    assert _parsed("run", "a.yaml", "--run_dir=a=b\nc").flags == {"run_dir": "a=b\nc"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_names_its_arguments_and_flags(name: str) -> None:
    command = COMMANDS[name]
    shown = _parsed(name, "--help").arguments[0]
    assert shown.startswith(f"usage: alsace {name}")
    assert all(f"--{flag.replace('_', '-')}" in shown for flag in command.flags)
    assert all(one.upper() in shown for one in [*command.arguments, *command.optional])
    assert command.example in shown


def _alsace(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "alsace_dist", *words], capture_output=True, text=True, check=False)


def test_the_program_ends_with_2_and_one_line_even_where_a_name_holds_a_newline() -> None:
    done = _alsace("ru\nn")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_init_prints_a_config_that_yaml_reads_and_refuses_what_is_not_there() -> None:
    done = _alsace("init", "classification")
    assert (done.returncode, done.stderr) == (0, "")
    assert "task:" in done.stdout
    refused = _alsace("init", "clasification")
    assert refused.returncode == 2
    assert "classification" in refused.stderr
