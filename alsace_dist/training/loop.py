"""The one training loop: batch, step, log, save. What is trained, and on what, is a ``Training``."""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from alsace_dist.config import EngineConfig, ExportType, TrainConfig
from alsace_dist.data.stream import CanonicalOrder, CutRule, TrainStream, micro_batches
from alsace_dist.errors import Stopped, UserError
from alsace_dist.files.layout import MODEL
from alsace_dist.files.manifest import FileEntry, read_json, remove_own, write_json
from alsace_dist.models.family import TrainableModel
from alsace_dist.monitor.sinks import Places
from alsace_dist.monitor.training import TrainingMonitor
from alsace_dist.ranks.group import Ranks, keep_memory
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training import checkpoint, tokens
from alsace_dist.training.budget import cut_rule
from alsace_dist.training.engine import TrainEngine, load_module
from alsace_dist.training.evaluator import Best, Evaluator
from alsace_dist.training.examples import Examples
from alsace_dist.training.export import COPIED, WEIGHTS, export
from alsace_dist.training.layout import weight_bytes
from alsace_dist.training.losses import MicroBatch
from alsace_dist.training.saving import Saver
from alsace_dist.training.settings import every_backward_is_collective

CHECKPOINTS = "checkpoints"
TOKENS = "tokens"
NOT_FINITE = "not-finite.json"
MAX_STEPS = 100_000_000


@dataclass(frozen=True)
class Training:
    """What to train: the model, the examples, and the settings of the section. ``kind``: name of the stage; ``places``:
    where it writes; ``replay``: the command that looks at a step once more, but for the step, if there is one."""

    kind: str
    places: Places
    section: TrainConfig
    engine: EngineConfig
    seed: int
    fingerprint: dict[str, Any]
    model: TrainableModel
    examples: Examples
    export_type: ExportType = "float32"
    evaluator: Evaluator | None = None
    replay: str = ""

    @property
    def directory(self) -> Path:
        """Of the stage."""
        return self.places.directory

    @cached_property
    def order(self) -> CanonicalOrder:
        """Which examples each step has."""
        return CanonicalOrder(self.examples.counts, self.section.global_batch_size, self.seed)

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps from the start to the end. Raises ``UserError`` if nobody can mean so many."""
        section, order = self.section, self.order
        if section.global_batch_size > 10 * order.total:
            raise UserError(
                f"global_batch_size: {section.global_batch_size:,} for {order.total:,} examples: a step would hold "
                "each of them more than ten times; lower it"
            )
        num_steps = section.num_steps or order.num_steps(min(section.num_epochs or 0, 1e9))
        if num_steps > MAX_STEPS:
            raise UserError(
                f"num_epochs: {section.num_epochs:g} are {num_steps:,} steps, more than anyone waits for; lower it"
            )
        return num_steps

    @property
    def best_by(self) -> str:
        """The scalar by which the best weights are known; empty: the last are taken."""
        return self.evaluator.best_by if self.evaluator and self.evaluator.patience is not None else ""

    def stream(self, rank: int, world_size: int) -> TrainStream[Any]:
        """A rank's share of the steps."""
        examples = self.examples
        return TrainStream(self.order, examples.load, examples.build, rank, world_size, examples.expect)


def learning_rate(section: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``num_steps``: linear warm-up, then the section's schedule."""
    num_warmup = round(section.warmup_ratio * num_steps)
    if step < num_warmup:
        return section.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if section.schedule == "linear":
        return section.learning_rate * (1 - done)
    if section.schedule == "cosine":
        return section.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return section.learning_rate


def run(training: Training, ranks: Ranks) -> tuple[dict[str, int], dict[str, FileEntry]]:
    """Train to the end, or until a stop is agreed; the result is ``directory/model``. Returns what a manifest says of
    it, the number of steps and, if it is not the last one, that whose weights were exported; and on rank 0 the model's
    files of weights.

    Goes on from the newest checkpoint that verifies. Raises ``Stopped`` after a checkpoint if a rank was asked to stop.
    """
    section, examples, num_steps = training.section, training.examples, training.num_steps
    stream = training.stream(ranks.rank, ranks.world_size)
    shards = training.order.shards_of(num_steps)
    make_ready(training, shards, ranks)
    engine, first, rule = _start(training, stream, ranks)
    keep_memory(ranks, weight_bytes(training.model, training.engine.dtype))
    steps, done = range(first, num_steps), first
    languages = examples.observer.languages if examples.observer else ()
    monitor = TrainingMonitor(training.kind, training.places, section, steps, ranks, engine, languages)
    watchdog = Watchdog(ranks, training.directory, training.engine.hang_limit())
    saver = _saver(training, engine, first, watchdog, monitor)

    def following(step: int) -> list[MicroBatch]:
        watchdog.beat(f"the data of step {step + 1}")
        with monitor.waiting():
            return next(batches, [])  # nothing after the last step

    with monitor, watchdog:
        batches = stream.batches(first, num_steps, lambda step, batch: _micro_batches(training, batch, rule))
        parts = following(first)
        (most,) = ranks.most(len(parts))
        for step in steps:
            if _has_enough(training, saver):
                monitor.end_early(done)
                break
            parts = _enough_for_all_ranks(parts, most, training, partial(stream.stand_in, step))
            torch.manual_seed(hash((training.seed, step, ranks.rank)))  # for dropout
            rate = learning_rate(section, step, num_steps)
            # Ranks agree on what follows this step while they compute it: who is asked to stop meanwhile is heard of
            # after the next one, and nobody waits for a round trip.
            upcoming = following(step + 1)
            agreed = ranks.most_later(ranks.stop.is_set, saver.is_writing, len(upcoming))
            watchdog.beat(f"step {step + 1}")
            sums = engine.step([part.sums for part in parts], rate)
            done = step + 1
            if not engine.is_applied:
                _not_finite(training, done, first, saver, monitor)
            num_tokens = sum(part.num_tokens for part in parts), sum(part.num_padded_tokens for part in parts)
            measured = _measured(training, done, engine, watchdog, monitor)
            is_best = training.best_by in measured and saver.best.see(done, measured[training.best_by])
            monitor.step(done, sums, num_tokens, rate, _flops(training, parts), measured)
            watchdog.beat(f"the checkpoint after step {done}")
            parts, (stop, is_writing, most) = upcoming, agreed()
            if not is_writing:
                saver.finish()
            is_due = is_best or done % section.checkpoint_every_steps == 0
            if done < num_steps and (stop or is_due):
                saver.begin(done)
            if stop and done < num_steps:
                saver.finish()
                raise Stopped(f"{training.kind}: stopped after step {done} of {num_steps}; a checkpoint is written")
        saver.finish()
    details = {"num_steps": done}
    if saver.best.step not in (0, done):
        _load_best(training, engine, saver.best, done)
        details["exported_step"] = saver.best.step
    return details, _export(training, engine)


def make_ready(training: Training, shards: Collection[int], ranks: Ranks) -> None:
    """Do what loading these shards needs once. Collective."""
    with Watchdog(ranks, training.directory, training.engine.hang_limit()) as watchdog:
        training.examples.make_ready(training.directory / TOKENS, training.fingerprint, shards, watchdog)


def _saver(training: Training, engine: TrainEngine, first: int, watchdog: Watchdog, monitor: TrainingMonitor) -> Saver:
    """What saves checkpoints, and knows the best of the steps before ``first``."""
    directory, keep = training.directory / CHECKPOINTS, training.section.keep_checkpoints
    saver = Saver(directory, engine, training.fingerprint, keep, watchdog, monitor.checkpoint)
    if first:
        saver.best = checkpoint.best_of(checkpoint.path_of(directory, first))
    return saver


def _measured(
    training: Training, done: int, engine: TrainEngine, watchdog: Watchdog, monitor: TrainingMonitor
) -> dict[str, float]:
    """What is measured on held-out groups after step ``done``, if that is due; else nothing. Collective."""
    evaluator = training.evaluator
    if evaluator is None or (done % evaluator.every and done != training.num_steps):
        return {}
    watchdog.beat(f"the split dev after step {done}")
    with monitor.apart():
        return evaluator.measure(engine.engine)


def _has_enough(training: Training, saver: Saver) -> bool:
    """Whether what is to rise has not for as long as training is to wait for that."""
    patience = training.evaluator.patience if training.evaluator else None
    return patience is not None and saver.best.num_since >= patience


def _load_best(training: Training, engine: TrainEngine, best: Best, done: int) -> None:
    """Go back to the weights that were best. Raises ``UserError`` if their checkpoint is gone or broken."""
    directory = training.directory / CHECKPOINTS
    found = checkpoint.newest(directory, training.fingerprint, engine.ranks, best.step)
    assert found is not None, "newest raises for one that is asked for"
    checkpoint.load(found[0], engine, best.step)
    if engine.ranks.is_main:
        what = f"{training.best_by} {best.value:.3f}"
        print(
            f"{training.kind}: of {done} steps, the weights after step {best.step} are exported ({what})",
            file=sys.stderr,
        )


def _not_finite(training: Training, step: int, first: int, saver: Saver, monitor: TrainingMonitor) -> None:
    """A step's gradient was not finite, so that it changed nothing: count it, or end with the state before it kept.

    ``first``: the step that this start began with. Collective. Raises ``UserError`` if it is not to be skipped, or if
    steps are skipped again and again.
    """
    is_lasting = monitor.skipped(step)
    if training.section.on_nonfinite == "skip" and not is_lasting:
        return
    saver.engine.num_skipped -= 1  # it is no part of what is kept, and will be met again
    if step - 1 > first:  # of the first there is a checkpoint, or nothing is done yet
        saver.begin(step - 1)
    saver.finish()
    saver.engine.ranks.main_first(lambda: write_keys(training, step))
    look = f", and `{training.replay} --step={step}` shows its examples" if training.replay else ""
    what = "gradients are no finite numbers, step after step" if is_lasting else "the gradient is no finite number"
    remedy = f"a lower {training.kind}.learning_rate means to start over: delete {training.directory}"
    if training.section.on_nonfinite == "stop":
        remedy = f"set {training.kind}.on_nonfinite: skip to go on from there; {remedy}"
    raise UserError(
        f"{training.kind}: {what}, at step {step} (listed in {training.directory / NOT_FINITE}); the state before it "
        f"is kept{look}; {remedy}"
    )


def write_keys(training: Training, step: int) -> None:
    """List the examples of a step (from 1), for whoever wants to look at them. Raises ``UserError`` if a file of that
    name is there that no training wrote."""
    path, remedy = training.directory / NOT_FINITE, "it is not what a training writes: move it away"
    found = read_json(path, remedy) if path.exists() else {}
    if found and not (isinstance(found, dict) and found.keys() == {"step", "examples"}):
        raise UserError(f"{path}: {remedy}")
    batch = training.stream(0, 1).batch(step - 1)
    rows = [[row.key, row.language] for example in batch for row in training.examples.rows(example)]
    write_json(path, {"step": step, "examples": rows})


def _flops(training: Training, parts: Sequence[MicroBatch]) -> float:
    """Model FLOPs of this rank's passes of a step; 0 where nobody knows them."""
    num_rows, num_tokens = sum(part.num_rows for part in parts), sum(part.num_tokens for part in parts)
    forward = training.examples.flops(num_rows, num_tokens) if num_rows else 0.0
    return forward * (2 if training.section.lora else 3)  # the backward pass is twice the forward; of adapters once


def drop_passing(directory: Path) -> None:
    """Delete what a training that is complete has needed: its checkpoints and tokens."""
    checkpoint.drop(directory / CHECKPOINTS)
    tokens.drop(directory / TOKENS)


def other_files(directory: Path, weights: Collection[str]) -> list[Path]:
    """The files of a finished training's model beside those of weights, for its manifest."""
    files = sorted((directory / MODEL).iterdir())
    return [path for path in files if path.suffix in (*COPIED, ".safetensors") and path.name not in weights]


def _start(training: Training, stream: TrainStream[Any], ranks: Ranks) -> tuple[TrainEngine, int, CutRule]:
    """An engine with the state of the newest checkpoint, or with the model's own weights; the next step; how steps are
    cut, found by passes that come before the state."""
    engine = make_engine(training, ranks)
    found = checkpoint.newest(training.directory / CHECKPOINTS, training.fingerprint, ranks)
    example = stream.stand_in(found[1] if found else 0)
    rule = cut_rule(training.kind, training.section, training.engine, training.examples, example, engine)
    first = load_state(training, engine, found)
    if first > training.num_steps:
        raise UserError(
            f"{training.directory / CHECKPOINTS}: holds a checkpoint after step {first:,}, and the training has "
            f"{training.num_steps:,}; it is not of this training: delete it"
        )
    return engine, first, rule


def make_engine(training: Training, ranks: Ranks) -> TrainEngine:
    """An engine whose weights are those of the model. Collective."""
    module = load_module(training.model, training.section.dropout, training.engine, ranks)
    for name in training.model.vocabulary if training.section.freeze_vocabulary else ():
        module.get_parameter(name).requires_grad_(False)
    return TrainEngine(module, training.engine, training.section, ranks)


def load_state(training: Training, engine: TrainEngine, found: tuple[Path, int] | None) -> int:
    """Give an engine the state of a checkpoint, or if there is none the model's own weights; the next step (from 0).
    Collective."""
    if found:
        checkpoint.load(found[0], engine, found[1])
        return found[1]
    engine.load_initial(training.model)
    return 0


def _micro_batches(training: Training, batch: list[Any], rule: CutRule) -> list[MicroBatch]:
    """This rank's share of a step in micro-batches."""
    cut = micro_batches([training.examples.length(example) for example in batch], rule)
    return [training.examples.collate([batch[index] for index in indices]) for indices in cut]


def _enough_for_all_ranks(
    parts: list[MicroBatch], most: float, training: Training, stand_in: Callable[[], Any]
) -> list[MicroBatch]:
    """Pad this rank's micro-batches with zero-loss copies. ``most``: micro-batches of the rank that has most of them.

    From ZeRO-2 on every backward pass is a collective, so all ranks need equally many; below ZeRO-2 only the last pass
    of a step is, so one is enough.
    """
    wanted = round(most) if every_backward_is_collective(training.engine) else 1
    if len(parts) < wanted:
        extra = parts[-1] if parts else training.examples.collate([stand_in()])
        parts = parts + [extra.without_effect()] * (wanted - len(parts))
    return parts


def _export(training: Training, engine: TrainEngine) -> dict[str, FileEntry]:
    model = training.directory / MODEL
    engine.layout.drop_moments()  # the memory is needed: whole tensors come to the ranks that write them
    # A start that was killed while exporting may have left parts.
    engine.ranks.main_first(lambda: remove_own(model, WEIGHTS))
    return export(model, engine, training.model, training.export_type)
