"""Section 5: what is wrong with the words of a command is one line, which names the nearest right one.

Elsewhere: the parsing by itself, with every command's help, in tests/test_arguments.py; settings by dotted names and
their values in tests/test_pipeline.py; the options of `submit` in tests/cluster.
"""

import pytest
from cases.case import Case, check_untouched, tree

from alsace_dist import __version__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], ("'rnu' is no command", "did you mean run?")),
        (["rnu", "run.yaml"], ("'rnu' is no command", "did you mean run?")),
        (["Run", "run.yaml"], ("'Run' is no command", "run?")),
        (["xyz"], ("'xyz' is no command", "`alsace --help` lists them")),
        ([""], ("'' is no command",)),
        (["--hepl"], ("'--hepl' is no command",)),
        (["__class__"], ("'__class__' is no command",)),
        (["run", "__class__"], ("__class__: no such file",)),
        (["ru\nn"], ("is no command",)),
        (["ru\x1b[31mn"], ("is no command",)),
        (["x" * 10_000], ("is no command",)),
        (["run.yaml"], ("'run.yaml' is no command",)),
        (["run"], ("run: needs CONFIG", "for example: alsace run")),
        (["run", "run.yaml", "b.yaml"], ("'b.yaml' is one word too many",)),
        (["run", "-"], ("-: no such file",)),
        (["run", "run.yaml", "-"], ("'-' is one word too many",)),
        (["run", "run.yaml", "-x"], ("'-x' is no flag", "two dashes")),
        (["run", "run.yaml", "-debug"], ("'-debug' is no flag", "two dashes")),
        (["run", "run.yaml", "--", "--interactive"], ("'--' is no flag",)),
        (["run", "run.yaml", "--interactive"], ("--interactive is no flag",)),
        (["run", "run.yaml", "--trace"], ("--trace is no flag",)),
        (["run", "run.yaml", "dry-run"], ("'dry-run' is one word too many",)),
        (["run", "run.yaml", "seed=3"], ("'seed=3' is one word too many", "--name=value")),
        (["run", "run.yaml", "--dry-runn"], ("did you mean --dry-run?",)),
        (["run", "run.yaml", "--dry-run", "--dry-run"], ("--dry-run is given twice",)),
        (["run", "run.yaml", "--dry-run", "--dry_run=false"], ("is given twice",)),
        (["run", "run.yaml", "--seed=1", "--seed=2"], ("--seed is given twice",)),
        (["run", "run.yaml", "--seed"], ("--seed needs a value",)),
        (["run", "run.yaml", "--seed", "--dry-run"], ("--seed needs a value",)),
        (["run", "run.yaml", "--seed="], ("seed: ",)),
        (["run", "run.yaml", "--=3"], ("is no flag",)),
        (["run", "run.yaml", "--dry-run=maybe"], ("give true or false",)),
        (["run", "run.yaml", "--distil.num_steps=2"], ("did you mean --distill?",)),
        (["run", "run.yaml", "--distill.num_stepps=2"], ("distill.num_stepps: unknown key",)),
        (["run", "run.yaml", "--distill.num-steps=2"], ("distill.num-steps: unknown key",)),
        (["run", "run.yaml", "--distill=2"], ("distill: must be a mapping",)),
        (["run", "run.yaml", "--distill..num_steps=2"], ("distill",)),
        (["run", "run.yaml", "--.num_steps=2"], ("is no flag",)),
        (["run", "run.yaml", "--config=other.yaml"], ("--config is no flag",)),
        (["run", "run.yaml", "--self=1"], ("--self is no flag",)),
        (["score", "run.yaml", "--round=one"], ("give a whole number",)),
        (["score", "run.yaml", "--round=1.5"], ("give a whole number",)),
        (["score", "run.yaml", "--round=7"], ("no stage 'score' with round 7",)),
        (["score", "run.yaml", "--round=" + "9" * 5_000], ("--round=",)),
        (["score", "run.yaml", "--variant=other"], ("--variant=other",)),
        (["prepare", "run.yaml", "--on-bad=drop"], ("data.on_bad",)),
        (["prepare", "nowhere.yaml"], ("nowhere.yaml: no such file",)),
        (["prepare", "."], ("is a directory",)),
        (["prepare", "data.jsonl"], ("data.jsonl: ",)),
        (["prepare", "run.yaml/x"], ("run.yaml/x",)),
        (["prepare", "\udcff.yaml"], ("no such file",)),
        (["prepare", "a\nb.yaml"], ("no such file",)),
        (["report", "nowhere"], ("nowhere/config.yaml: no such file", "give the directory of a run")),
        (["report", "run.yaml"], ("give the directory of a run",)),
        (["status", "/nowhere"], ("give the directory of a run",)),
        (["status", ".", "--linse=3"], ("did you mean --lines?",)),
        (["cancel", "/nowhere"], ("/nowhere: is not the directory of a run",)),
        (["cancel", "."], ("is not the directory of a run",)),
        (["cancel"], ("cancel: needs RUN",)),
        (["plan", "run.yaml", "--num-processes=all"], ("give a whole number",)),
        (["plan", "run.yaml", "--num-processes=-1"], ("--num-processes=-1",)),
        (["doctor", "--foo=3"], ("--foo is no flag",)),
        (["doctor", "--seed=3"], ("--seed", "config")),
        (["doctor", "--cluster=site.yaml"], ("--cluster needs the config",)),
        (["submit", "run.yaml"], ("submit: needs --cluster=...",)),
        (["submit", "run.yaml", "--cluster=nowhere.yaml"], ("nowhere.yaml: no such file",)),
        (["init", "xnil"], ("init: 'xnil' is not there",)),
        (["init", "demo", "run.yaml"], ("run.yaml: is there already",)),
        (["init", "demo", "nowhere/run.yaml"], ("nowhere/run.yaml: No such file or directory",)),
        (["completion", "fish"], ("'fish' is not supported",)),
        (["demo", "here"], ("'here' is one word too many",)),
        (["run", "run.yaml", "--seeds=1-"], ("--seeds",)),
        (["run", "run.yaml", "--seeds=5-1"], ("--seeds",)),
        (["run", "run.yaml", "--seeds=1,1"], ("--seeds",)),
        (["run", "run.yaml", "--seeds=0-999999999"], ("--seeds",)),
        (["run", "run.yaml", "--seeds=1,2", "--seed=3"], ("seed",)),
    ],
    ids=lambda value: ascii(" ".join(value))[1:50] if isinstance(value, list) else None,
)
def test_words_that_no_command_knows(case: Case, words: list[str], said: tuple[str, ...]) -> None:
    """No console is opened, nothing is executed or made."""
    before = tree(case.directory)
    case.refused(*words, says=said, as_rank=False)
    assert tree(case.directory).keys() == before.keys()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "Narrow the gap"),
        (["--help"], "Narrow the gap"),
        (["-h"], "Narrow the gap"),
        (["help"], "Narrow the gap"),
        (["--version"], f"alsace_dist {__version__}"),
        (["run", "--help"], "usage: alsace run CONFIG"),
        (["run", "run.yaml", "--help"], "usage: alsace run CONFIG"),
        (["submit", "-h"], "usage: alsace submit CONFIG"),
        (["completion", "zsh"], "bashcompinit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_only_tells(case: Case, words: list[str], shown: str) -> None:
    before = tree(case.directory)
    done = case.done(*words)
    assert shown in done.stdout
    assert not done.stderr
    after = tree(case.directory)
    check_untouched(before, after)
    assert after.keys() == before.keys()


def test_a_traceback_only_for_those_who_ask(case: Case) -> None:
    case.change(seed="x")
    case.refused("run", "run.yaml", says="seed: ")
    done = case.alsace("run", "run.yaml", "--debug")
    assert done.code == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: run.yaml: seed: ")


@pytest.mark.parametrize(
    "value", ["a=b", "a b", "a'b", 'a"b', "$(touch executed)", "`touch executed`", "ü", "-x", "#1"]
)
def test_a_value_is_taken_as_it_is_typed(case: Case, value: str) -> None:
    case.done("prepare", "run.yaml", f"--run_dir={value}")
    assert (case / value / "data/manifest.json").exists()
    assert not (case / "executed").exists()
