"""The plan for nodes that are only wished for, as it is printed: memory, time, choices, warnings, assumptions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from alsace_dist.config import Config, EngineConfig
from alsace_dist.errors import UserError
from alsace_dist.plan import assumptions, search
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.cost import hpz_size
from alsace_dist.plan.estimate import Estimate, Forecast, estimate, forecast
from alsace_dist.plan.model import planned_model
from alsace_dist.plan.output import amount, gigabytes, print_notes, print_table
from alsace_dist.plan.search import Choice
from alsace_dist.plan.wish import Wish
from alsace_dist.plan.work import Counts, Work, work_of

if TYPE_CHECKING:
    from rich.console import Console

MOST_CHOICES = 8


def print_forecast(config: Config, wish: Wish) -> None:
    """Print what the run takes on a cluster, and the settings that fit it; write one of them if that is wished.

    Raises ``UserError`` if nothing is known of the model, or there is no such choice.
    """
    from rich.console import Console

    console = Console(highlight=False, width=200)
    model = planned_model(config)
    about = forecast(config, model, wish.cluster, wish.average_length)
    works = work_of(config, model.mode, wish.counts)
    cluster = wish.cluster
    lines = [
        f"{model.family.describe(model.config)}: {amount(about.parameters.total)} parameters",
        f"{cluster.num_nodes} nodes of {cluster.gpus_per_node} GPUs with {gigabytes(cluster.gpu_memory)} GB, "
        f"{cluster.flops / 1e12:g} TFLOPS and {cluster.bandwidth / 1e9:g} GB/s to other nodes.",
        "All that follows is predicted, not measured.",
        *model.notes,
        *(["Pretraining the nano model is left out: it is made for one machine."] if config.model.nano else []),
    ]
    print_notes(console, lines)
    estimates = [estimate(about, work) for work in works]
    _print_memory(estimates, console)
    _print_time(estimates, about, console)
    found = search.choices(about, works, config.engine)
    _print_choices(found, cluster, console)
    _print_fewer(about, works, config.engine, console)
    print_notes(console, [*warnings(estimates, found), *_assumptions(about, works, wish)])
    if wish.file:
        if not 1 <= wish.choice <= len(found):
            raise UserError(f"--choice={wish.choice}: {len(found)} choices fit; give a number from 1 on, or more nodes")
        search.write(config, found[wish.choice - 1], wish.file)
        print_notes(console, [f"Choice {wish.choice} is written to {wish.file}."])


def _print_memory(estimates: list[Estimate], console: "Console") -> None:
    rows = []
    for one in estimates:
        memory = one.memory
        sizes = [memory.weights, memory.gradients, memory.optimizer, one.activations, memory.buffers + one.gathered]
        cells = [gigabytes(size) for size in (*sizes, one.device_bytes)]
        checkpoint = [gigabytes(one.checkpoint), f"{one.checkpoint_seconds:.0f} s" if one.checkpoint else "-"]
        fits = "yes" if one.fits else "NO"
        rows.append([one.work.name, *cells, fits, gigabytes(one.host_bytes), *checkpoint])
    header = ["GB per GPU, as configured", "weights", "gradients", "optimizer", "activations", "buffers", "sum", "fits"]
    print_table(console, "Memory", [*header, "host, per node", "checkpoint", "written in"], rows)
    console.print()


def _print_time(estimates: list[Estimate], about: Forecast, console: "Console") -> None:
    rows = []
    for one in estimates:
        tokens = one.prompts * about.average_length
        ratio = f"1 : {one.communication_seconds / one.compute_seconds:.2g}" if one.compute_seconds else "-"
        cells = [f"{one.prompts:.3g}", f"{tokens:,.0f}", f"{one.num_passes}", gigabytes(one.moved), ratio]
        times = [f"{one.step_seconds:.3g}", f"{one.num_steps:,} x {one.work.times}", _duration(one.seconds)]
        rows.append([one.work.name, *cells, *times, f"{one.node_hours:.3g}", f"{one.mfu:.1%}"])
    header = ["GPU and pass", "prompts", "tokens", "passes a step", "GB received", "compute : wait"]
    print_table(console, "Time", [*header, "s a step", "steps x times", "time", "node-hours", "MFU"], rows)
    console.print()


def _print_choices(found: list[Choice], cluster: Cluster, console: "Console") -> None:
    if not found:
        line = f"Nothing fits {gigabytes(cluster.gpu_memory)} GB on these nodes; give more of them, or larger GPUs."
        print_notes(console, [line])
        return
    rows = [[f"{number}", *_choice_cells(one)] for number, one in enumerate(found[:MOST_CHOICES], 1)]
    print_table(console, "Choices that fit, cheapest first", ["", *CHOICE_HEADER], rows)
    console.print()


CHOICE_HEADER = ["ZeRO", "checkpointing", "offload", "hpZ", "micro-batches", "GB per GPU", "time", "node-hours"]


def _choice_cells(one: Choice) -> list[str]:
    engine, size = one.engine, hpz_size(one.engine)
    yes = ["yes" if flag else "-" for flag in (engine.gradient_checkpointing, engine.offload_optimizer)]
    sizes = ", ".join(f"{name} {tokens:,}" for name, tokens in one.budgets.items())
    measures = [gigabytes(one.device_bytes), _duration(one.seconds), f"{one.node_hours:.3g}"]
    return [f"{engine.zero_stage}", *yes, f"{size}" if size > 1 else "-", sizes, *measures]


def _print_fewer(about: Forecast, works: list[Work], engine: EngineConfig, console: "Console") -> None:
    """The cheapest choice on fewer nodes."""
    most = about.cluster.num_nodes
    rows = []
    for number in [2**power for power in range(most.bit_length()) if 2**power < most]:
        best = cheapest(about, works, engine, number)
        rows.append([f"{number}", *(_choice_cells(best) if best else ["nothing fits"])])
    if rows:
        print_table(console, "The cheapest choice on fewer nodes", ["nodes", *CHOICE_HEADER], rows)
        console.print()


def cheapest(about: Forecast, works: list[Work], engine: EngineConfig, num_nodes: int) -> Choice | None:
    """The cheapest choice on so many nodes of the same kind; None if nothing fits."""
    fewer = about._replace(cluster=replace(about.cluster, num_nodes=num_nodes))
    return next(iter(search.choices(fewer, works, engine)), None)


def warnings(estimates: list[Estimate], found: list[Choice]) -> Iterator[str]:
    """What is wrong with the settings as they are, and what would help."""
    for one in estimates:
        name = one.work.name
        if not one.fits:
            need, room = gigabytes(one.device_bytes), gigabytes(one.cluster.usable_memory)
            cheap = f"; choice 1 is ZeRO-{found[0].engine.zero_stage}" if found else ""
            yield f"WARNING: {name}: {need} GB on a GPU, of which {room} GB are free to use{cheap}."
        if one.communication_seconds > one.compute_seconds:
            ratio = one.communication_seconds / one.compute_seconds
            help_ = "; or ".join(search.remedies(one, found))
            yield f"WARNING: {name}: GPUs communicate {ratio:.3g} times as long as they compute. What helps: {help_}."


def _assumptions(about: Forecast, works: list[Work], wish: Wish) -> Iterator[str]:
    yield "Assumed:"
    yield f"- Prompts are {about.average_length} tokens long on average (--average-length), {about.max_tokens} at most."
    if not all(work.is_counted for work in works):
        counts = wish.counts
        yield (
            f"- Splits that are not prepared have {_groups(counts)} in {counts.num_languages} languages (--groups, "
            "--languages)."
        )
    yield from (f"- {line}" for line in assumptions.LINES)


def _groups(counts: Counts) -> str:
    """How many groups the splits have."""
    told = [f"{number:,} {split}" for split, number in counts.splits.items()]
    return f"{', '.join(told)} and otherwise {counts.num_groups:,} groups" if told else f"{counts.num_groups:,} groups"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
