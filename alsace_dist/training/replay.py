"""A step of a training once more, example by example: what has its gradient, or its loss, come from?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alsace_dist.errors import UserError
from alsace_dist.ranks.group import Ranks
from alsace_dist.training import checkpoint
from alsace_dist.training.loop import CHECKPOINTS, Training, load_state, make_engine, make_ready


@dataclass(frozen=True)
class Replayed:
    """One example of a step. ``where``: its group and language; ``num_tokens``: of its prompts; ``gradient_norm``: of
    its part in the step's gradient."""

    where: str
    num_tokens: int
    loss: float
    gradient_norm: float


def replay(training: Training, step: int, ranks: Ranks) -> tuple[int, list[Replayed]]:
    """Each example of a step (from 1), those that move the weights most first; and after which step the weights were
    written that it is looked at with: the newest checkpoint's, 0 for those that the training starts with. Collective.

    Nothing is trained, and nothing is written but tokens that are missing. Raises ``UserError`` if there is no such
    step.
    """
    if step > training.num_steps:
        raise UserError(f"--step={step:,}: {training.kind} has {training.num_steps:,} steps; they count from 1")
    order, section, examples = training.order, training.section, training.examples
    make_ready(training, order.shards_of(step), ranks)
    engine = make_engine(training, ranks)
    found = checkpoint.newest(training.directory / CHECKPOINTS, training.fingerprint, ranks)
    position = load_state(training, engine, found)
    replayed = []
    for example in training.stream(0, 1).batch(step - 1):
        # All ranks look at the same one: passes are collective, and with a learning rate of 0 no weight changes.
        sums = engine.step([examples.collate([example]).sums], 0.0)
        rows = examples.rows(example)
        where = f"{rows[0].key} {rows[0].language if len(rows) == 1 else f'({len(rows)} languages)'}"
        norm = float(engine.gradient_norm) if engine.is_applied else math.inf  # and the loss may be finite all the same
        norm /= ranks.world_size  # each rank's loss is taken for a share of the batch's
        replayed.append(Replayed(where, examples.length(example), float(sums["loss"]), norm))
    assert len(replayed) == section.global_batch_size
    # DeepSpeed reports no norm at ZeRO-0 in float32: there the loss tells most.
    return position, sorted(
        replayed, key=lambda one: -(one.loss if math.isnan(one.gradient_norm) else one.gradient_norm)
    )


def print_replayed(step: int, position: int, replayed: Sequence[Replayed]) -> None:
    """Show what ``replay`` has found, as a table on stdout."""
    begin = f"after step {position:,}" if position else "at the start"
    table = Table(title=f"Examples of step {step:,}, with the weights {begin}", box=None, title_justify="left")
    table.add_column("group and language")
    for name in ("tokens", "loss", "gradient norm"):
        table.add_column(name, justify="right")
    for one in replayed:
        cells = (one.where, f"{one.num_tokens:,}", f"{one.loss:.4g}", f"{one.gradient_norm:.4g}")
        table.add_row(*map(Text, cells))
    Console(width=120).print(table)
