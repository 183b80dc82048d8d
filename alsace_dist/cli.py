"""The command ``alsace``: one thin function per command, read by fire. ``alsace COMMAND --help`` shows its flags."""

import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist.errors import Stopped, UserError

if TYPE_CHECKING:
    from alsace_dist.config import Config


def demo(*, run_dir: str = "runs/demo", debug: bool = False, **overrides: Any) -> None:
    """Run the whole method on the embedded corpus: a few minutes on two cores, no network.

    Args:
        run_dir: where everything is written.
        debug: show tracebacks.
        overrides: settings of the demo's config by dotted name, such as --distill.num_epochs=2.
    """
    path = Path(__file__).parent / "tasks/demo.yaml"
    run(str(path), debug=debug, **{"run_dir": run_dir} | overrides)
    tool = Path(sys.argv[0])  # the program as it was called: a virtual environment need not be on the PATH
    alsace, board = (tool, tool.with_name("tensorboard")) if tool.name == "alsace" else ("alsace", "tensorboard")
    print(
        f"""
What next:
  {board} --logdir {run_dir}/tensorboard     the curves
  {alsace} run {path} --run_dir=runs/paper --method=paper     the paper's own rule on the same corpus
  {alsace} run YOUR.yaml     your data and model: start from configs/classification.yaml, see docs/data.md"""
    )


def run(config: str, *, dry_run: bool = False, debug: bool = False, **overrides: Any) -> None:
    """Run every stage of a config in order; what is complete is skipped.

    Args:
        config: the run's YAML.
        dry_run: only print what would be done.
        debug: show tracebacks.
        overrides: settings by dotted name, such as --distill.learning_rate=3e-5.
    """
    from alsace_dist import pipeline, runner

    loaded = _load(config, overrides)
    found = pipeline.stages(loaded)
    if dry_run:
        for stage in found:
            print(f"{stage.state():<9} {stage.name}")
        return
    pipeline.write_config(loaded, Path(config), found)
    for stage in found:
        runner.run_stage(stage, debug)
    runner.report(loaded)


def prepare(config: str, *, on_bad: str = "", debug: bool = False, **overrides: Any) -> None:
    """Turn inputs into shards.

    Args:
        config: the run's YAML.
        on_bad: what to do with bad records: stop (and list them all) or skip (and count them); default data.on_bad.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("prepare", config, overrides | ({"data.on_bad": on_bad} if on_bad else {}), debug)


def pretrain_nano(config: str, *, debug: bool = False, **overrides: Any) -> None:
    """Train the nano model's tokenizer and weights from nothing.

    Args:
        config: the run's YAML.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("pretrain-nano", config, overrides, debug)


def finetune(config: str, *, debug: bool = False, **overrides: Any) -> None:
    """Stage 0: learn the task from the source language's labels.

    Args:
        config: the run's YAML.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("finetune", config, overrides, debug)


def score(config: str, *, round: int = 0, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Score unlabeled and test groups with the model after a round of distillation (0: before any).

    Args:
        config: the run's YAML.
        round: which model.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("score", config, overrides, debug, round, variant)


def select(config: str, *, round: int = 1, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Stage 1: choose the teacher languages of a round from the scores before it.

    Args:
        config: the run's YAML.
        round: the round that they teach in.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("select", config, overrides, debug, round, variant)


def distill(config: str, *, round: int = 1, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Stage 2: train every language towards the teachers.

    Args:
        config: the run's YAML.
        round: which round.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("distill", config, overrides, debug, round, variant)


def evaluate(config: str, *, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Compare the test scores before and after: accuracy per language, average, gap, significance.

    Args:
        config: the run's YAML.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("evaluate", config, overrides, debug, 0, variant)


def report(run: str, *, debug: bool = False) -> None:
    """Write report.md, report.html, report.json and report.svg of a run, and print its summary.

    Args:
        run: the run's directory.
        debug: show tracebacks.
    """
    from alsace_dist import runner

    runner.report(_of_run(run))


def calibrate(config: str, *, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Find the biases of the final model, which evaluate.calibrate adds at inference, from its unlabeled scores.

    Args:
        config: the run's YAML.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("calibrate", config, overrides, debug, None, variant)


def plan(config: str, *, num_processes: str = "auto", debug: bool = False, **overrides: Any) -> None:
    """Say how many parameters the model has and what memory its states take per rank, without loading it.

    Args:
        config: the run's YAML.
        num_processes: ranks over all nodes; auto: as many as would run here.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    from alsace_dist import plan as planning

    num_ranks = None if num_processes == "auto" else _whole_number("num_processes", num_processes)
    planning.print_plan(_load(config, overrides), num_ranks)


def doctor(config: str = "", *, cluster: str = "", nodes: int = 0, debug: bool = False, **overrides: Any) -> None:
    """Check this machine: versions, devices, process group, writable directories and, with a config, its inputs.

    Args:
        config: a run's YAML, to check what it names.
        cluster: a site profile: check the cluster's nodes and the network between them instead, in a job.
        nodes: how many of them; default: what the profile says.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    from alsace_dist.ranks import failures, job

    if cluster:
        if not config:
            raise UserError("--cluster needs the config of a run, in whose directory the nodes meet")
        from alsace_dist.cluster.submit import check_cluster

        check_cluster(_load(config, overrides), Path(config), cluster, nodes)
    elif failures.in_group() and (directory := job.attempt_directory()):
        from alsace_dist.cluster.nodes import check_node

        check_node(directory)
    else:
        from alsace_dist.doctor import run_checks

        if overrides and not config:
            raise UserError(f"--{next(iter(overrides))}: no flag of doctor; settings need the config that they change")
        run_checks(_load(config, overrides) if config else None)


def submit(
    config: str,
    *,
    cluster: str,
    nodes: int = 0,
    stages: str = "",
    dry_run: bool = False,
    debug: bool = False,
    **overrides: Any,
) -> None:
    """Submit every stage that is not complete to Slurm; each job starts when the job before it has succeeded.

    Args:
        config: the run's YAML.
        cluster: the site profile, a YAML as in slurm/clusters.
        nodes: nodes of the stages that compute on ranks; default: what the profile says.
        stages: comma-separated commands to submit, such as score,select,distill; default: all.
        dry_run: write the job scripts and submit nothing.
        debug: show tracebacks.
        overrides: settings of the config by dotted name.
    """
    from alsace_dist.cluster.submit import submit as submit_run

    submit_run(_load(config, overrides), Path(config), cluster, nodes, stages, dry_run)


def status(run: str, *, lines: int = 5, debug: bool = False) -> None:
    """Say of every stage of a run whether it waits, runs, is done or has failed, and how far it is.

    Args:
        run: the run's directory.
        lines: how many last lines to show of the log of what runs or has failed.
        debug: show tracebacks.
    """
    from alsace_dist.cluster.status import print_status

    print_status(_of_run(run), lines)


def cancel(run: str, *, debug: bool = False) -> None:
    """Cancel what a run has in Slurm's queue.

    Args:
        run: the run's directory.
        debug: show tracebacks.
    """
    from alsace_dist.cluster.submit import cancel as cancel_run

    cancel_run(Path(run))


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "run": run,
    "prepare": prepare,
    "pretrain-nano": pretrain_nano,
    "finetune": finetune,
    "score": score,
    "select": select,
    "distill": distill,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "report": report,
    "submit": submit,
    "status": status,
    "cancel": cancel,
    "plan": plan,
    "doctor": doctor,
}


def main() -> None:
    """Entry point. A person's mistake ends with one line on stderr and a non-zero exit code."""
    import fire
    import fire.parser

    # Let fire hand over all values as text: it would read 1e-3 in a name as a number, and drop what follows a '#'.
    fire.parser.DefaultParseValue = str
    debug = any(argument in ("--debug", "--debug=True", "--debug=true") for argument in sys.argv)
    _stop_on_signals()
    command = sys.argv[1:]
    if len(command) > 1 and {"--help", "-h"} & set(command[1:]):
        # Commands accept any --flag as an override, so fire would swallow --help; put it behind fire's `--`.
        command = [command[0], "--", "--help"]
    error: BaseException | None = None
    # fire complains of arguments that it has no use for only after it has called the command: so let it choose the
    # command, and call that afterwards.
    chosen: list[Callable[[], None]] = []
    try:
        fire.Fire({name: _chooser(function, chosen) for name, function in COMMANDS.items()}, command, "alsace")
        for call in chosen:
            call()
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    _leave(error, debug)


def _stop_on_signals() -> None:
    """The signals that stop a rank between two steps (ranks/group.py) stop any other process at once, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, interrupt)


def _chooser(function: Callable[..., None], chosen: list[Callable[[], None]]) -> Callable[..., None]:
    """The command as fire sees it: a function that notes the call, with its flags as typed."""

    @functools.wraps(function)
    def choose(*arguments: str, **flags: str) -> None:
        defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        # Fire writes _ for - in the name of a flag, but a language or a variant may have a - in its own.
        typed = [argument.removeprefix("--").partition("=")[0] for argument in sys.argv[2:]]
        spelling = {name.replace("-", "_"): name for name in typed if "." in name}
        values: dict[str, Any] = {spelling.get(name, name): text for name, text in flags.items()}
        for name in flags.keys() & defaults.keys():
            if isinstance(defaults[name], bool):
                values[name] = _is_true(name, flags[name])
            elif isinstance(defaults[name], int):
                values[name] = _whole_number(name, flags[name])
        chosen.append(functools.partial(function, *arguments, **values))

    return choose


def _leave(error: BaseException | None, debug: bool) -> None:
    """End the process: exit code 0, or what is to be said of the error and its exit code."""
    from alsace_dist.ranks import failures

    code = 0
    if error is not None:
        shown = failures.readable(error)
        if shown is not error:
            shown.__cause__ = error  # --debug prints the traceback of the cause
        code = failures.exit_code(shown)
        if failures.in_group():
            failures.record_failure(shown)
        if debug or not failures.is_plain(shown):
            traceback.print_exception(shown)
        # The launcher prints the error that came first, once, as the last line.
        if failures.ERROR_DIR not in os.environ:
            prefix = "" if isinstance(shown, Stopped) else "error: "
            print(f"{prefix}{shown}", file=sys.stderr)
            failures.record_cause(shown)
    sys.stdout.flush()
    sys.stderr.flush()
    if failures.in_group():
        # Threads of the communication libraries abort the interpreter on its way out, now and then.
        os._exit(code)
    sys.exit(code)


def _load(path: str, overrides: Mapping[str, Any]) -> "Config":
    from alsace_dist.config_file import parse_value
    from alsace_dist.pipeline import load_run

    values = {key: value if key == "run_dir" else parse_value(value) for key, value in overrides.items()}
    return load_run(path, values)


def _of_run(run: str) -> "Config":
    """The resolved config of a run, wherever it lies now."""
    from alsace_dist.files.layout import CONFIG_FILE

    path = Path(run) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; give the directory of a run")
    return _load(str(path), {"run_dir": run})


def _single(
    command: str, path: str, overrides: Mapping[str, Any], debug: bool, round_: int | None = 0, variant: str = ""
) -> None:
    """One stage: as a rank if torchrun started this process, else as the launcher of its ranks.

    ``round_``: None for a stage that there is once, whatever its round.
    """
    from alsace_dist import pipeline, runner
    from alsace_dist.ranks import failures

    config = _load(path, overrides)
    if variant and variant not in config.variants:
        raise UserError(f"--variant={variant}: the config has the variants {', '.join(config.variants) or '(none)'}")
    found = pipeline.stages(config)
    matching = [
        stage
        for stage in found
        if (stage.command, stage.variant) == (command, variant) and round_ in (None, stage.round)
    ]
    if not matching:
        which = f"{command!r} with round {round_}" if round_ is not None else repr(command)
        raise UserError(f"{path}: has no stage {which}; `alsace run --dry-run` lists them")
    if failures.in_group():
        for stage in matching:
            runner.run_as_rank(stage)
        return
    pipeline.write_config(config, Path(path), found)
    for stage in matching:
        runner.run_stage(stage, debug)


def _is_true(name: str, text: str) -> bool:
    """A flag's value; fire makes True of ``--flag``."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise UserError(f"--{name}={text}: give true or false, or nothing")


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name}={text}: give a whole number") from None
