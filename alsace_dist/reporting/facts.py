"""What a report says of a run beside its results: what was run, in words, what it cost, and how to run it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alsace_dist.config import Config
from alsace_dist.files.costs import Cost
from alsace_dist.files.warnings import Warned
from alsace_dist.reporting.figures import Picture
from alsace_dist.reporting.tables import Row, Table
from alsace_dist.reporting.verdict import UNDEFINED, printable


@dataclass(frozen=True)
class Facts:
    """``about``: what was run, in sentences; ``details``: what lies where; ``data``: what was found in the data;
    ``pictures``, and ``tables`` with their titles, by the section that they belong to: "selection", "training", "data";
    ``speeds``: how fast trainings were, in words; ``warnings`` with how often each was said; ``again``: what the
    results depend on, and how to run it again."""

    about: Sequence[str] = ()
    details: Mapping[str, object] = field(default_factory=dict)
    data: Sequence[str] = ()
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[tuple[str, Table]]] = field(default_factory=dict)
    speeds: Sequence[str] = ()
    costs: Sequence[Cost] = ()
    warnings: Sequence[tuple[Warned, int]] = ()
    again: Mapping[str, str] = field(default_factory=dict)


def in_words(config: Config, num_groups: Mapping[str, int]) -> list[str]:
    """What was run. ``num_groups``: parallel groups of each split, as far as they are known."""
    model, source = config.model, printable(config.data.source_language)
    name = "A nano mT5, pretrained here" if model.nano else printable(model.path)
    task = "candidates of each example" if not config.task.labels else f"{len(config.task.labels)} labels"
    fields = " and ".join(map(printable, config.task.fields)) if config.task.fields else "its texts"
    found = [f"{name} answers with one of {task}, asked with {fields}; source language {source}."]
    if config.finetune:
        shots = config.finetune.shots
        labels = f"{shots:,} labels of each kind" if shots else "labels"
        if count := config.finetune.num_examples or (None if shots else num_groups.get("labeled")):
            labels = f"{count:,} labels"
        found.append(f"It was finetuned on {labels} in {source}.")
    else:
        found.append("It was taken as it is, without finetuning.")
    if config.rounds:
        groups = num_groups.get("unlabeled")
        on = f"{groups:,} unlabeled parallel groups" if groups else "unlabeled parallel groups"
        rounds = "one round" if config.rounds == 1 else f"{config.rounds} rounds"
        found.append(
            f"Then {rounds} of self-distillation on {on} (method: {config.method}): languages are ranked by "
            f"{config.select.score} and chosen by the rule {config.select.rule}; {config.distill.teachers} teachers, "
            f"targets: {config.distill.targets}."
        )
    if count := num_groups.get("test"):
        found.append(f"Before and after are compared on the same {count:,} test groups.")
    return found


def cost_table(costs: Sequence[Cost]) -> Table:
    """Time by stage, all starts together, and node-hours in all."""
    rows = []
    names = dict.fromkeys(one.stage for one in costs)
    for name in names:
        own = [one for one in costs if one.stage == name]
        seconds = sum(one.seconds for one in own)
        node_hours = sum(one.seconds * one.num_nodes for one in own) / 3600
        ranks = sorted({one.num_ranks for one in own})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        rows.append(Row([printable(name), duration(seconds), f"{len(own)}", shown, _node_hours(node_hours)]))
    total = sum(one.seconds for one in costs)
    node_hours = sum(one.seconds * one.num_nodes for one in costs) / 3600
    rows.append(Row(["in all", duration(total), UNDEFINED, UNDEFINED, _node_hours(node_hours)], "strong"))
    return Table(["Stage", "Time", "Starts", "Ranks", "Node-hours"], rows, minor=frozenset({2, 3}))


def _node_hours(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def warning_lines(warnings: Sequence[tuple[Warned, int]]) -> list[str]:
    """A line for each, the last first."""
    return [
        f"{printable(one.stage)}: {printable(one.text)}" + (f" (said {count} times)" if count > 1 else "")
        for one, count in reversed(warnings)
    ]
