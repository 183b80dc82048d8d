"""The command ``alsace``: one thin function per command. ``alsace COMMAND --help`` shows what a command takes."""

import os
import signal
import sys
import traceback
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from alsace_dist import streams
from alsace_dist.arguments import Command, parse
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
    path = Path(__file__).parent / "presets/demo.yaml"
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
    from alsace_dist.cluster.submit import write_config
    from alsace_dist.ranks import failures

    if failures.in_group():
        raise UserError("run starts its ranks itself: call it without torchrun, or unset RANK and WORLD_SIZE")
    loaded = _load(config, overrides)
    found = pipeline.stages(loaded)
    if dry_run:
        for stage in found:
            print(f"{stage.state():<9} {stage.name}")
        return
    write_config(loaded, Path(config), found)
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


def plan(config: str, *, num_processes: int = 0, debug: bool = False, **overrides: Any) -> None:
    """Say how many parameters the model has and what memory its states take per rank, without loading it.

    Args:
        config: the run's YAML.
        num_processes: ranks over all nodes; default: as many as would run here.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    from alsace_dist import plan as planning

    planning.print_plan(_load(config, overrides), num_processes or None)


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
    after: str = "",
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
        after: ids of Slurm jobs, comma-separated, that must have succeeded before the first one starts.
        dry_run: write the job scripts and submit nothing.
        debug: show tracebacks.
        overrides: settings of the config by dotted name.
    """
    from alsace_dist.cluster.submit import submit as submit_run

    submit_run(_load(config, overrides), Path(config), cluster, nodes, stages, dry_run, after)


def status(run: str, *, lines: int = 5, debug: bool = False) -> None:
    """Say of every stage of a run whether it waits, runs, is done or has failed, and how far it is.

    Args:
        run: the run's directory.
        lines: how many last lines to show of the log of what runs or has failed.
        debug: show tracebacks.
    """
    from alsace_dist.cluster.status import print_status

    print_status(_of_run(run), lines)


def init(task: str) -> None:
    """Print a commented config to start from.

    Args:
        task: classification, xnli or demo; for yours: > my.yaml, then change what is marked.
    """
    found = {"classification": "classification", "xnli": "xnli-mt5-large", "xnli-xxl": "xnli-mt5-xxl", "demo": "demo"}
    if task not in found:
        raise UserError(f"init: {task!r} is not there; there are {', '.join(found)}")
    print((resources.files("alsace_dist.presets") / f"{found[task]}.yaml").read_text(encoding="utf-8"), end="")


def cancel(run: str, *, debug: bool = False) -> None:
    """Cancel what a run has in Slurm's queue.

    Args:
        run: the run's directory.
        debug: show tracebacks.
    """
    from alsace_dist.cluster.submit import cancel as cancel_run

    cancel_run(Path(run))


def completion(shell: str) -> None:
    """Print a script that completes commands and flags: eval "$(alsace completion bash)", or zsh.

    Args:
        shell: bash or zsh.
    """
    from fire import completion as fire_completion

    if shell not in ("bash", "zsh"):
        raise UserError(f"completion: {shell!r} is not supported; use bash or zsh")
    script = fire_completion.Script("alsace", {name: {} for name in COMMANDS}, shell="bash")
    print(("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script)


_CLUSTER = "--cluster=slurm/clusters/generic.yaml"
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("demo", demo, "alsace demo"),
        Command("init", init, "alsace init xnli > xnli.yaml"),
        Command("run", run, "alsace run configs/classification.yaml"),
        Command("prepare", prepare, "alsace prepare CONFIG.yaml --on-bad=skip"),
        Command("pretrain-nano", pretrain_nano, "alsace pretrain-nano configs/demo.yaml"),
        Command("finetune", finetune, "alsace finetune CONFIG.yaml --finetune.num_epochs=5"),
        Command("score", score, "alsace score CONFIG.yaml --round=0"),
        Command("select", select, "alsace select CONFIG.yaml --round=1"),
        Command("distill", distill, "alsace distill CONFIG.yaml --round=1 --variant=paper"),
        Command("calibrate", calibrate, "alsace calibrate CONFIG.yaml"),
        Command("evaluate", evaluate, "alsace evaluate CONFIG.yaml"),
        Command("report", report, "alsace report runs/demo"),
        Command("submit", submit, f"alsace submit CONFIG.yaml {_CLUSTER} --nodes=4"),
        Command("status", status, "alsace status runs/xnli"),
        Command("cancel", cancel, "alsace cancel runs/xnli"),
        Command("plan", plan, "alsace plan configs/xnli-mt5-large.yaml --num-processes=8"),
        Command("doctor", doctor, f"alsace doctor CONFIG.yaml {_CLUSTER} --nodes=4"),
        Command("completion", completion, "alsace completion bash"),
    )
}


def main() -> None:
    """Entry point. A person's mistake ends with one line on stderr and a non-zero exit code."""
    streams.make_steady()
    words = sys.argv[1:]
    debug = any(word in ("--debug", "--debug=True", "--debug=true") for word in words)
    _stop_on_signals()
    error: BaseException | None = None
    try:
        parse(words, COMMANDS, _settings)()
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    _leave(error, debug)


def _settings() -> list[str]:
    """Names of the config's keys and sections."""
    from alsace_dist.config import Config

    return list(Config.model_fields)


def _stop_on_signals() -> None:
    """The signals that stop a rank between two steps (ranks/group.py) stop any other process at once, like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup lets SIGHUP be ignored
            signal.signal(number, interrupt)


def _leave(error: BaseException | None, debug: bool) -> None:
    """End the process: exit code 0, or what is to be said of the error and its exit code."""
    from alsace_dist.ranks import failures

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # one more Ctrl-C must not cut off the last words and the exit code
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
            print(f"{prefix}{' '.join(str(shown).split())}", file=sys.stderr)  # one line, whatever a name holds
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
    from alsace_dist.cluster.submit import write_config
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
    write_config(config, Path(path), found)
    for stage in matching:
        runner.run_stage(stage, debug)
