"""The commands of ``alsace``, one thin function each, and their table; ``alsace COMMAND --help`` shows a command."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alsace_dist.arguments import Command
from alsace_dist.errors import UserError

if TYPE_CHECKING:
    from alsace_dist.config import Config
    from alsace_dist.stages.base import Stage


def demo(*, run_dir: str = "runs/demo", debug: bool = False, **overrides: Any) -> None:
    """Run the whole method on the embedded corpus: a few minutes on two cores, no network.

    Args:
        run_dir: where everything is written.
        debug: show tracebacks.
        overrides: settings of the demo's config by dotted name, such as --distill.num_epochs=2.
    """
    path = Path(__file__).parent / "presets/demo.yaml"
    run(str(path), debug=debug, **{"run_dir": run_dir} | overrides)
    print(what_next(Path(sys.argv[0]), path, run_dir))


def what_next(tool: Path, preset: Path, run_dir: str) -> str:
    """Commands to go on with after the demo, each to be pasted as it stands. ``tool``: the program as it was called,
    for a virtual environment need not be on the PATH."""
    known = (tool, tool.with_name("tensorboard")) if tool.name == "alsace" else ("alsace", "tensorboard")
    alsace, board, config, curves = (shlex.quote(str(one)) for one in (*known, preset, f"{run_dir}/tensorboard"))
    return f"""
What next:
  {board} --logdir {curves}     the curves
  {alsace} run {config} --run_dir=runs/paper --method=paper     the paper's own rule on the same corpus
  {alsace} run YOUR.yaml     your data and model: start from configs/classification.yaml, see docs/data.md"""


def run(config: str, *, seeds: str | None = None, dry_run: bool = False, debug: bool = False, **overrides: Any) -> None:
    """Run every stage of a config in order; what is complete is skipped.

    Args:
        config: the run's YAML.
        seeds: seeds such as 1,2,3 or 1-5: one run after the other, each in RUN_DIR/seed-N.
        dry_run: only print what would be done.
        debug: show tracebacks.
        overrides: settings by dotted name, such as --distill.learning_rate=3e-5.
    """
    from alsace_dist import pipeline, runner, sweep
    from alsace_dist.cluster.submit import write_config
    from alsace_dist.ranks import failures

    if failures.in_group():
        raise UserError("run starts its ranks itself: call it without torchrun, or unset RANK and WORLD_SIZE")
    loaded = _load(config, overrides)
    wanted = sweep.wanted(seeds, overrides)
    runs = {f"seed {seed}: ": one for seed, one in sweep.configs(loaded, wanted).items()} if wanted else {"": loaded}
    if dry_run:
        for label, one in runs.items():
            for stage in pipeline.stages(one):
                print(f"{label}{stage.state():<9} {stage.name}")
        return
    if wanted:
        _check_sweep(loaded, wanted)
        sweep.claim(Path(loaded.run_dir), wanted)
    for label, one in runs.items():
        if label:
            print(f"== {label}{one.run_dir}", file=sys.stderr)
        found = pipeline.stages(one)
        write_config(one, Path(config), found)
        for stage in found:
            runner.run_stage(stage, debug)
        runner.report(one)
    if wanted:
        _report_sweep(Path(loaded.run_dir))


def prepare(config: str, *, on_bad: str = "", show: bool = False, debug: bool = False, **overrides: Any) -> None:
    """Turn inputs into shards.

    Args:
        config: the run's YAML.
        on_bad: what to do with bad records: stop (and list them all) or skip (and count them); default data.on_bad.
        show: print for every language one prompt and its candidates, as the model will read them.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    settings = overrides | ({"data.on_bad": on_bad} if on_bad else {})
    loaded = _load(config, settings) if show else None
    if loaded is None or loaded.data.directory is None:  # what somebody else prepared can be shown all the same
        _single("prepare", config, settings, debug)
    if loaded is not None:
        from alsace_dist.data.show import prompts

        for line in prompts(loaded):
            print(line)


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


def select(
    config: str, *, round: int = 1, variant: str = "", explain: bool = False, debug: bool = False, **overrides: Any
) -> None:
    """Stage 1: choose the teacher languages of a round from the scores before it.

    Args:
        config: the run's YAML.
        round: the round that they teach in.
        variant: of which variant of the config.
        explain: print why: scores, how stable they are, agreement and, where there are labels, what they say.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("select", config, overrides, debug, round, variant)
    if explain:
        from alsace_dist import runner

        print(runner.explain(_load(config, overrides), round, variant))


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


def replay(
    run: str, *, step: int = 0, stage: str = "distill", round: int = 1, variant: str = "", debug: bool = False
) -> None:
    """Look at the examples of a step of a training that has stopped: their losses, and their part in its gradient.

    Args:
        run: the run's directory.
        step: which step, from 1.
        stage: finetune or distill.
        round: of distill.
        variant: of which variant of the config.
        debug: show tracebacks.
    """
    from dataclasses import replace

    from alsace_dist import pipeline, runner
    from alsace_dist.ranks import failures

    if stage not in ("finetune", "distill"):
        raise UserError(f"--stage={stage}: replay is for finetune and distill")
    if step < 1:
        raise UserError(f"--step={step}: which step? They count from 1, and an error or a warning names one")
    config, number = _of_run(run), round if stage == "distill" else None
    (found,) = _matching(config, pipeline.stages(config), f"{run}/config.yaml", stage, variant, number)
    wanted = replace(found, replay=step)
    if failures.in_group():
        runner.run_as_rank(wanted)
    else:
        runner.replay(wanted, debug)


def evaluate(config: str, *, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Compare the test scores before and after: accuracy per language, average, gap, significance.

    Args:
        config: the run's YAML.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("evaluate", config, overrides, debug, 0, variant)


def report(run: str, *more: str, debug: bool = False) -> None:
    """Write report.md, report.html, report.json and report.svg of a run, and print its summary; or compare several.

    Args:
        run: the run's directory, or that of a sweep of seeds, which gets seeds.md and seeds.json.
        more: other runs: prints one table of all, seeds of one config together; nothing is written.
        debug: show tracebacks.
    """
    from alsace_dist import runner, sweep

    if more:
        from alsace_dist.comparison import compare

        print(compare([_of_run(str(path)) for one in (run, *more) for path in sweep.runs_of(Path(one))]))
    elif sweep.is_sweep(Path(run)):
        _report_sweep(Path(run))
    else:
        runner.report(_of_run(run))


def export(run: str, directory: str, *, variant: str = "", debug: bool = False) -> None:
    """Copy a run's final model to a directory of its own, with a model card for those who use it.

    Args:
        run: the run's directory.
        directory: where to; made by the command.
        variant: of which variant of the config.
        debug: show tracebacks.
    """
    from alsace_dist import exporting

    exporting.export(_of_run(run), Path(directory), variant)
    print(f"wrote {directory}: from_pretrained loads it, README.md tells what it is")


def calibrate(config: str, *, variant: str = "", debug: bool = False, **overrides: Any) -> None:
    """Find the biases of the final model, which evaluate.calibrate adds at inference, from its unlabeled scores.

    Args:
        config: the run's YAML.
        variant: of which variant of the config.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    _single("calibrate", config, overrides, debug, None, variant)


def plan(
    config: str,
    *,
    num_processes: int = 0,
    nodes: int = 0,
    gpus_per_node: int = 0,
    gpu_memory: str = "",
    bandwidth: str = "",
    flops: str = "",
    groups: int = 0,
    languages: int = 0,
    average_length: int = 0,
    write: str = "",
    choice: int = 0,
    debug: bool = False,
    **overrides: Any,
) -> None:
    """Say how many parameters the model has and what memory its states take per rank, without loading it.

    With --nodes: what a run takes on such nodes, memory, time and node-hours, and which settings fit, cheapest first.

    Args:
        config: the run's YAML.
        num_processes: ranks over all nodes; default: as many as would run here.
        nodes: predict for so many nodes, which need not be there.
        gpus_per_node: of each node; default 8.
        gpu_memory: of each GPU, such as 80GB or 80GiB.
        bandwidth: GB/s that each GPU has to other nodes; default 40.
        flops: TFLOPS of dense bf16 that a GPU is said to have; default 989.
        groups: parallel groups of each split that is not prepared; default 1000.
        languages: in which they are; default: data.languages, or 15.
        average_length: tokens of a prompt, on average; default 64, or task.max_tokens if that is less.
        write: a new YAML for the settings that are chosen, which run takes.
        choice: which of the settings that fit; default 1, the cheapest.
        debug: show tracebacks.
        overrides: settings by dotted name.
    """
    from alsace_dist.plan.wish import read_wish

    given: dict[str, int | str] = {
        "gpus-per-node": gpus_per_node,
        "gpu-memory": gpu_memory,
        "bandwidth": bandwidth,
        "flops": flops,
        "groups": groups,
        "languages": languages,
        "average-length": average_length,
        "write": write,
        "choice": choice,
    }
    loaded = _load(config, overrides)
    if wish := read_wish(nodes, given, loaded):
        from alsace_dist.plan.forecast import print_forecast

        if num_processes:
            raise UserError("--num-processes and --nodes: both say how many ranks there are; remove one")
        print_forecast(loaded, wish)
    else:
        from alsace_dist.plan.overview import print_plan

        print_plan(loaded, num_processes or None)


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

        check_cluster(_load(config, overrides), cluster, nodes)
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
    seeds: str | None = None,
    at_once: int = 0,
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
        seeds: seeds such as 1,2,3 or 1-5: a chain of arrays, a task for each seed, whose run is RUN_DIR/seed-N.
        at_once: of each stage of a sweep, so many seeds at the same time; default: all.
        dry_run: write the job scripts and submit nothing.
        debug: show tracebacks.
        overrides: settings of the config by dotted name.
    """
    from alsace_dist import sweep
    from alsace_dist.cluster.submit import submit as submit_run

    loaded, wanted = _load(config, overrides), sweep.wanted(seeds, overrides)
    if wanted:
        _check_sweep(loaded, wanted)
    submit_run(loaded, Path(config), cluster, nodes, stages, dry_run, after, wanted, at_once)


def status(run: str, *, lines: int = 5, watch: bool = False, every: int = 10, debug: bool = False) -> None:
    """Say of every stage of a run whether it waits, runs, is done or has failed, and how far it is; and its warnings.

    Args:
        run: the run's directory, or that of a sweep of seeds.
        lines: how many last lines to show of the log of what runs or has failed, and how many warnings.
        watch: show it again and again, until Ctrl-C.
        every: how often, in seconds, with --watch.
        debug: show tracebacks.
    """
    from alsace_dist import sweep
    from alsace_dist.cluster.status import print_status, print_sweep
    from alsace_dist.cluster.status import watch as watch_status

    def show() -> None:
        if sweep.is_sweep(Path(run)):
            print_sweep(Path(run), lines)
        else:
            print_status(_of_run(run), lines)

    if not watch:
        show()
    elif every < 1:
        raise UserError(f"--every={every}: give a second or more; Slurm is asked each time")
    else:
        watch_status(show, every)


def init(task: str, file: str = "", *, debug: bool = False) -> None:
    """Write a commented config to start from; what is to be changed in it is marked with (*).

    Args:
        task: classification (of texts of your own), xnli, xnli-xxl, pawsx, xcopa, geomlama, sib200 or demo.
        file: where to; without it the config is printed. A file that is there is never written over.
        debug: show tracebacks.
    """
    if task not in PRESETS:
        raise UserError(f"init: {task!r} is not there; there are {', '.join(PRESETS)}")
    text = (resources.files("alsace_dist.presets") / f"{PRESETS[task]}.yaml").read_text(encoding="utf-8")
    if file in ("", "-"):
        print(text, end="")
        return
    if "\0" in file:
        raise UserError(f"init: {file!r} is no name of a file; give another one")
    try:
        with Path(file).open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise UserError(f"init: {file}: is there already; give another name") from None
    print(f"wrote {file}; next: `alsace doctor {shlex.quote(file)}`, `alsace run {shlex.quote(file)}`")


def cancel(run: str, *, debug: bool = False) -> None:
    """Cancel what a run has in Slurm's queue.

    Args:
        run: the run's directory, or that of a sweep of seeds.
        debug: show tracebacks.
    """
    from alsace_dist.cluster.submit import cancel as cancel_run

    cancel_run(Path(run))


def completion(shell: str) -> None:
    """Print a script that completes commands, flags and settings: eval "$(alsace completion bash)", or zsh.

    Args:
        shell: bash or zsh.
    """
    from alsace_dist.completion import script
    from alsace_dist.config import Config

    if shell not in ("bash", "zsh"):
        raise UserError(f"completion: {shell!r} is not supported; use bash or zsh")
    print(script(COMMANDS, Config, shell))


# --- what commands share ---------------------------------------------------------------------------------------------


def _load(path: str, overrides: Mapping[str, Any]) -> "Config":
    from alsace_dist.config_file import parse_value
    from alsace_dist.pipeline import load_run

    values = {key: value if key == "run_dir" else parse_value(value) for key, value in overrides.items()}
    return load_run(path, values)


def _report_sweep(run: Path) -> None:
    """The report over all seeds of a sweep that were begun."""
    from alsace_dist import runner, sweep
    from alsace_dist.files.layout import CONFIG_FILE

    begun = [one for one in sweep.members(run) if (one.run / CONFIG_FILE).exists()]
    found = {one.seed: _of_run(str(one.run)) for one in begun}
    for seed, config in found.items():
        if config.seed != seed:
            raise UserError(
                f"{config.run_dir}/{CONFIG_FILE}: is of seed {config.seed}, not {seed}; move it out of the sweep"
            )
    if found:
        sweep.check_same(list(found.values()))
    runner.report_seeds(run, found)


def _check_sweep(config: "Config", seeds: Sequence[int]) -> None:
    """Raises ``UserError`` if the other seeds of a sweep have another config."""
    from alsace_dist import sweep
    from alsace_dist.files.layout import CONFIG_FILE

    others = [one for one in sweep.members(Path(config.run_dir)) if one.seed not in seeds]
    begun = [_of_run(str(one.run)) for one in others if (one.run / CONFIG_FILE).exists()]
    sweep.check_same([*begun, config])


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
    found = pipeline.stages(config)
    matching = _matching(config, found, path, command, variant, round_)
    if failures.in_group():
        for stage in matching:
            runner.run_as_rank(stage)
        return
    write_config(config, Path(path), found)
    for stage in matching:
        runner.run_stage(stage, debug)


def _matching(
    config: "Config", stages: Iterable["Stage"], path: str, command: str, variant: str, round_: int | None
) -> list["Stage"]:
    """The stages of a run that a command is for. Raises ``UserError`` if there is none."""
    if variant and variant not in config.variants:
        raise UserError(f"--variant={variant}: the config has the variants {', '.join(config.variants) or '(none)'}")
    found = [one for one in stages if (one.command, one.variant) == (command, variant) and round_ in (None, one.round)]
    if not found:
        which = f"{command!r} with round {round_}" if round_ is not None else repr(command)
        raise UserError(f"{path}: has no stage {which}; `alsace run {shlex.quote(path)} --dry-run` lists them")
    return found


# --- the table -----------------------------------------------------------------------------------------------------

# What `alsace init` writes -> its preset.
PRESETS = {
    "classification": "classification",
    "xnli": "xnli-mt5-large",
    "xnli-xxl": "xnli-mt5-xxl",
    "pawsx": "pawsx-mt5-large",
    "xcopa": "xcopa",
    "geomlama": "geomlama",
    "sib200": "sib200-mt5-large",
    "demo": "demo",
}
_CLUSTER = "--cluster=slurm/clusters/generic.yaml"
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("demo", demo, "alsace demo"),
        Command("init", init, "alsace init xnli xnli.yaml"),
        Command("run", run, "alsace run configs/classification.yaml"),
        Command("prepare", prepare, "alsace prepare CONFIG.yaml --on-bad=skip"),
        Command("pretrain-nano", pretrain_nano, "alsace pretrain-nano configs/demo.yaml"),
        Command("finetune", finetune, "alsace finetune CONFIG.yaml --finetune.num_epochs=5"),
        Command("score", score, "alsace score CONFIG.yaml --round=0"),
        Command("select", select, "alsace select CONFIG.yaml --round=1 --explain"),
        Command("distill", distill, "alsace distill CONFIG.yaml --round=1 --variant=paper"),
        Command("replay", replay, "alsace replay runs/xnli --step=1200"),
        Command("calibrate", calibrate, "alsace calibrate CONFIG.yaml"),
        Command("evaluate", evaluate, "alsace evaluate CONFIG.yaml"),
        Command("report", report, "alsace report runs/demo"),
        Command("export", export, "alsace export runs/xnli models/xnli"),
        Command("submit", submit, f"alsace submit CONFIG.yaml {_CLUSTER} --nodes=4"),
        Command("status", status, "alsace status runs/xnli"),
        Command("cancel", cancel, "alsace cancel runs/xnli"),
        Command("plan", plan, "alsace plan configs/xnli-mt5-xxl.yaml --nodes=4 --gpus-per-node=8 --gpu-memory=80GB"),
        Command("doctor", doctor, f"alsace doctor CONFIG.yaml {_CLUSTER} --nodes=4"),
        Command("completion", completion, "alsace completion bash"),
    )
}
