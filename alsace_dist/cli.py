"""The command ``alsace``: one thin function per command, read by fire. ``alsace COMMAND --help`` shows its flags."""

import errno
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist.errors import STOPPED, Stopped, UserError

if TYPE_CHECKING:
    from alsace_dist.config import Config
    from alsace_dist.pipeline import Stage


def demo(*, run_dir: str = "runs/demo", debug: bool = False, **overrides: Any) -> None:
    """Run the whole method on the embedded corpus: a few minutes on two cores, no network.

    Args:
        run_dir: where everything is written.
        debug: show tracebacks.
        overrides: settings of the demo's config by dotted name, such as --distill.num_epochs=2.
    """
    path = Path(__file__).parent / "tasks/demo.yaml"
    run(str(path), debug=debug, **{"run_dir": run_dir} | overrides)
    tool = Path(sys.argv[0])  # as it was called: a virtual environment need not be on the PATH
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
    from alsace_dist import pipeline

    loaded = _load(config, overrides)
    found = pipeline.stages(loaded)
    if dry_run:
        for stage in found:
            print(f"{stage.state():<9} {stage.name}")
        return
    pipeline.write_config(loaded, Path(config), found)
    for stage in found:
        _run_stage(stage, loaded, debug)
    _report(loaded)


def prepare(config: str, *, on_bad: str = "", debug: bool = False, **overrides: Any) -> None:
    """Turn source data into shards.

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
    _report(_of_run(run))


def calibrate(config: str, *, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Biases of the final model from its own unlabeled scores, which evaluate.calibrate adds at inference.

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
    from alsace_dist.ranks import group as runtime

    if cluster:
        if not config:
            raise UserError("--cluster needs the config of a run, in whose directory the nodes meet")
        from alsace_dist.cluster import submit as submission

        submission.check_cluster(_load(config, overrides), Path(config), cluster, nodes)
    elif runtime.in_group() and runtime.ATTEMPT_DIR in os.environ:
        from alsace_dist.cluster import nodes as cluster_doctor

        cluster_doctor.check_node(Path(os.environ[runtime.ATTEMPT_DIR]))
    else:
        from alsace_dist import doctor as checks

        if overrides and not config:
            raise UserError(f"--{next(iter(overrides))}: no flag of doctor; settings need the config that they change")
        checks.run_checks(_load(config, overrides) if config else None)


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
    """Submit every stage that is not complete to Slurm, each to start when the one before has succeeded.

    Args:
        config: the run's YAML.
        cluster: the site profile, a YAML as in slurm/clusters.
        nodes: nodes of the stages that compute on ranks; default: what the profile says.
        stages: comma-separated commands to submit, such as score,select,distill; default: all.
        dry_run: write the job scripts and submit nothing.
        debug: show tracebacks.
        overrides: settings of the config by dotted name.
    """
    from alsace_dist.cluster import submit as submission

    submission.submit(_load(config, overrides), Path(config), cluster, nodes, stages, dry_run)


def status(run: str, *, lines: int = 5, debug: bool = False) -> None:
    """Say of every stage of a run whether it waits, runs, is done or has failed, and how far it is.

    Args:
        run: the run's directory.
        lines: how many last lines to show of the log of what runs or has failed.
        debug: show tracebacks.
    """
    from alsace_dist.cluster import submit as submission

    submission.print_status(_of_run(run), lines)


def cancel(run: str, *, debug: bool = False) -> None:
    """Cancel what a run has in Slurm's queue.

    Args:
        run: the run's directory.
        debug: show tracebacks.
    """
    from alsace_dist.cluster import submit as submission

    submission.cancel(Path(run))


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

    # As text: fire would read 1e-3 in a name as a number, and drop what follows a '#'.
    fire.parser.DefaultParseValue = str
    debug = any(argument in ("--debug", "--debug=True", "--debug=true") for argument in sys.argv)
    _stop_on_signals()
    command = sys.argv[1:]
    if len(command) > 1 and {"--help", "-h"} & set(command[1:]):  # else a flag of commands that take any
        command = [command[0], "--", "--help"]
    error: BaseException | None = None
    # Fire complains of arguments that it has no use for after the command has run: so it only chooses.
    chosen: list[Callable[[], None]] = []
    try:
        fire.Fire({name: _chooser(function, chosen) for name, function in COMMANDS.items()}, command, "alsace")
        for call in chosen:
            call()
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    _leave(error, debug)


def _stop_on_signals() -> None:
    """What stops a rank between two steps (runtime.py) stops everything else at once, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, interrupt)


def _chooser(function: Callable[..., None], chosen: list[Callable[[], None]]) -> Callable[..., None]:
    """The command as fire sees it: it notes the call, with its flags as typed."""

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
    from alsace_dist.ranks import group as runtime

    code = 0
    if error is not None:
        readable = _as_readable(error)
        if readable is not error:
            readable.__cause__ = error  # for --debug
        error = readable
        code = runtime.exit_code(error)
        if runtime.in_group():
            runtime.record_failure(error)
        if debug or not runtime.is_plain(error):
            traceback.print_exception(error)
        # The launcher prints the error that came first, once, as the last line.
        if runtime.ERROR_DIR not in os.environ:
            prefix = "" if isinstance(error, Stopped) else "error: "
            print(f"{prefix}{error}", file=sys.stderr)
            runtime.record_cause(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if runtime.in_group():
        # Threads of the communication libraries abort the interpreter on its way out, now and then.
        os._exit(code)
    sys.exit(code)


# Others, such as a network disk that does not answer or no memory for a process, may pass by themselves.
_FOR_PEOPLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR}
_FOR_PEOPLE |= {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EFBIG}


def _as_readable(error: BaseException) -> BaseException:
    """What the system refuses (full disk, no permission, no memory) is one line; the rest is a defect of ours."""
    from alsace_dist.ranks import group as runtime

    if isinstance(error, KeyboardInterrupt):
        return Stopped(STOPPED)
    if runtime.is_out_of_memory(error):
        return runtime.RankFailed(runtime.out_of_memory(error))
    if isinstance(error, OSError) and error.errno in _FOR_PEOPLE and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{error.strerror}; free space or correct the path, then run the same command again")
    return error


def _load(path: str, overrides: Mapping[str, Any]) -> "Config":
    from alsace_dist.config_file import load_config, parse_value

    values = {key: value if key == "run_dir" else parse_value(value) for key, value in overrides.items()}
    return load_config(path, values)


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
    from alsace_dist import pipeline
    from alsace_dist.ranks import group as runtime

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
    if runtime.in_group():
        for stage in matching:
            _run_as_rank(stage)
        return
    pipeline.write_config(config, Path(path), found)
    for stage in matching:
        _run_stage(stage, config, debug)


def _run_as_rank(stage: "Stage") -> None:
    from alsace_dist.ranks import group as runtime

    if not stage.is_distributed:
        raise UserError(f"{stage.name} runs in one process; start it without torchrun")
    group = runtime.start(stage.config.engine)
    with ExitStack() as stack:
        found: list[bool] = []

        def look() -> None:
            stack.enter_context(runtime.alone(stage.lock, stage.name))
            found.append(stage.is_complete())  # whoever held the lock may have finished it

        group.main_first(look)
        (is_complete,) = group.any_rank(any(found))
        if not is_complete:
            stage.execute(group)
    runtime.finish()


def _run_stage(stage: "Stage", config: "Config", debug: bool) -> None:
    from alsace_dist.files.layout import Layout
    from alsace_dist.ranks import group as runtime
    from alsace_dist.ranks import launcher

    if stage.is_complete():
        print(f"{stage.name}: complete, skipped", file=sys.stderr)
        return
    if not stage.is_distributed:
        print(f"{stage.name}", file=sys.stderr)
        with runtime.alone(stage.lock, stage.name):
            if not stage.is_complete():  # whoever held the lock may have finished it
                stage.execute(None)
        return
    arguments = [stage.command, str(Layout(Path(config.run_dir)).config), *stage.flags]
    launcher.launch(arguments + (["--debug"] if debug else []), launcher.num_local_processes(config.engine), debug)


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


def _report(config: "Config") -> None:
    from rich.console import Console

    from alsace_dist import pipeline
    from alsace_dist.files import layout
    from alsace_dist.files import manifest as artifacts
    from alsace_dist.reporting import report as reporting

    evaluations = {}
    for name in ("", *config.variants):
        directory = layout.Layout(Path(config.run_dir), name).evaluation
        if (directory / artifacts.MANIFEST).exists():
            artifacts.verify_files(directory, artifacts.load_manifest(directory, "evaluation"))
            evaluations[name or "main"] = artifacts.read_json(directory / "metrics.json")
    if not evaluations:
        raise UserError(f"{config.run_dir}: holds no evaluation yet; `alsace run` makes one")
    own = layout.Layout(Path(config.run_dir))
    maker = pipeline.made_by(config, own, config.rounds)
    details = {
        "report": own.run / "report.html",
        "numbers": own.run / "report.json",
        "model": maker[0] / "model" if maker else config.model.path,
        "config": own.config,
        "TensorBoard": f"tensorboard --logdir {own.run / 'tensorboard'}",
    }
    reporting.write_report(own.run, evaluations, details, alpha=config.evaluate.alpha)
    main_name = next(iter(evaluations))
    console = Console()
    reporting.print_summary(evaluations[main_name], console, alpha=config.evaluate.alpha)
    for name, value in details.items():
        console.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)
