"""The one training loop: batch, step, log, save. What is trained, and on what, is the caller's ``Job``."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.data.stream import PASS_COST, REDUCTION_COST, CanonicalOrder, TrainStream, micro_batches
from alsace_dist.errors import Stopped, UserError
from alsace_dist.files import manifest as artifacts
from alsace_dist.monitor.scalars import MetricsWriter, progress
from alsace_dist.ranks.group import LeadCheck, Runtime, note_position
from alsace_dist.ranks.watchdog import Watchdog
from alsace_dist.training import checkpoint
from alsace_dist.training.engine import TrainEngine

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: ``loss(module)`` is the float32 sum of its examples' losses; encoder tokens without and with
    padding."""

    loss: Callable[[nn.Module], Tensor]
    num_tokens: int
    num_padded_tokens: int


@dataclass(frozen=True)
class Job:
    """What to train: a module, where its weights come from, and the stream of its examples.

    ``value(name)``: initial float32 weight of a parameter. ``load(shard)``: all rows of a shard; ``build(row, pass)``:
    the training example; ``length(example)``: encoder tokens; ``collate(examples)``: a micro-batch. ``source``: the
    model directory whose untrained parts the exported model takes over; ``head_rows`` as in ``checkpoint.export``.
    """

    kind: str
    directory: Path
    tensorboard: Path
    section: TrainConfig
    engine: EngineConfig
    seed: int
    fingerprint: dict[str, Any]
    module: nn.Module
    value: Callable[[str], Tensor]
    counts: list[int]
    load: Callable[[int], list[Any]]
    build: Callable[[Any, int], Any]
    length: Callable[[Any], int]
    collate: Callable[[list[Any]], MicroBatch]
    source: Path
    head_rows: list[int] | None


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


def run(job: Job, runtime: Runtime) -> None:
    """Train to the end, or until a stop is agreed; then the model directory and, last, the manifest are written.

    Goes on from the newest checkpoint that verifies. Raises ``Stopped`` after a checkpoint if a rank was asked to stop.
    """
    section = job.section
    order = CanonicalOrder(job.counts, section.global_batch_size, job.seed)
    num_steps = section.num_steps or order.num_steps(section.num_epochs or 0)
    engine = TrainEngine(job.module, job.engine, section, runtime)
    found = checkpoint.newest(job.directory / CHECKPOINTS, job.fingerprint, runtime)
    if found:
        checkpoint.load(found[0], engine, found[1])
    else:
        for name in engine.parameters:  # the float32 copies, which DeepSpeed made from rounded weights
            engine.load_weight(name, job.value(name))
    first = found[1] if found else 0
    if runtime.is_main:
        note_position(f"step {first}")
    stream: TrainStream[Any] = TrainStream(order, job.load, job.build, runtime.rank, runtime.world_size)
    writer = MetricsWriter(job.directory, job.tensorboard, first, runtime.is_main)
    meter, check_lead = _Meter(runtime, section), LeadCheck()
    watchdog = Watchdog(runtime, job.directory, job.engine.hang_limit())
    with progress(job.kind, num_steps, first, runtime.is_main) as advance, watchdog:
        batches = stream.batches(first, num_steps, lambda step, batch: _micro_batches(job, batch, runtime))
        for step in range(first, num_steps):
            begin = time.monotonic()
            watchdog.beat(f"the data of step {step + 1}")
            with meter.waiting():
                parts = next(batches)
            watchdog.beat(f"step {step + 1}")
            parts = _enough_for_the_others(parts, job, partial(stream.example, step, 0), runtime)
            if section.dropout:
                torch.manual_seed(hash((job.seed, step, runtime.rank)))
            rate = learning_rate(section, step, num_steps)
            loss = engine.step([part.loss for part in parts], rate)
            meter.count(parts)
            done = step + 1
            note = ""
            if done % section.log_every_steps == 0 or done == num_steps:
                values = meter.read(loss, engine) | {"learning_rate": rate}
                writer.write(done, values)
                if not math.isfinite(values["loss"]):
                    raise UserError(
                        f"{job.kind}: the loss is {values['loss']} at step {done}; lower {job.kind}.learning_rate, and "
                        f"delete {job.directory}"
                    )
                note = f"loss {values['loss']:.4f}"
            advance(1, note)
            watchdog.beat(f"the checkpoint after step {done}")
            (stop,) = runtime.any_rank(runtime.stop.is_set)
            if done < num_steps and (stop or done % section.checkpoint_every_steps == 0):
                _save(job, engine, done, time.monotonic() - begin, check_lead)
            if stop and done < num_steps:
                writer.close()
                raise Stopped(f"{job.kind}: stopped after step {done} of {num_steps}; a checkpoint is written")
    writer.close()
    _finish(job, engine, num_steps)


def _save(job: Job, engine: TrainEngine, step: int, step_seconds: float, check_lead: LeadCheck) -> None:
    begin = time.monotonic()
    checkpoint.save(job.directory / CHECKPOINTS, engine, step, job.fingerprint, job.section.keep_checkpoints)
    if engine.runtime.is_main:
        note_position(f"step {step}")
        seconds = time.monotonic() - begin
        check_lead(
            step_seconds + seconds, f"{job.kind}: a step ({step_seconds:.1f} s) and a checkpoint ({seconds:.1f} s)"
        )


def _micro_batches(job: Job, batch: list[Any], runtime: Runtime) -> list[MicroBatch]:
    """This rank's share of a step in micro-batches."""
    lengths = [job.length(example) for example in batch]
    kind = runtime.device.type
    cost = PASS_COST[kind] + (REDUCTION_COST[kind] if job.engine.zero_stage >= 2 and runtime.world_size > 1 else 0)
    cut = micro_batches(lengths, job.section.micro_batch_size, cost)
    return [job.collate([batch[index] for index in indices]) for indices in cut]


def _enough_for_the_others(
    parts: list[MicroBatch], job: Job, stand_in: Callable[[], Any], runtime: Runtime
) -> list[MicroBatch]:
    """Micro-batches filled up with ones without effect: from ZeRO-2 on to as many as another rank has, for there every
    pass is collective; below it to one, for the last pass of a step is. Collective."""
    most = round(runtime.max(len(parts))) if job.engine.zero_stage >= 2 else 1
    if len(parts) < most:
        extra = parts[-1] if parts else job.collate([stand_in()])
        parts = parts + [MicroBatch(_without_effect(extra.loss), 0, extra.num_padded_tokens)] * (most - len(parts))
    return parts


def _without_effect(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda module: loss(module) * 0.0


def _finish(job: Job, engine: TrainEngine, num_steps: int) -> None:
    runtime = engine.runtime
    model = job.directory / "model"
    if runtime.is_main:
        shutil.rmtree(model, ignore_errors=True)  # of an attempt that was killed while it exported
    checkpoint.export(model, engine, job.source, job.head_rows)

    def write() -> None:
        files = sorted(path for path in model.iterdir() if path.is_file())
        artifacts.write_manifest(job.directory, job.kind, job.fingerprint, files, {"num_steps": num_steps})
        shutil.rmtree(job.directory / CHECKPOINTS, ignore_errors=True)

    runtime.main_first(write)


class _Meter:
    """Sums since the last reading, turned into rates; the loss is that of the last step alone.

    A mean over the steps since the last reading would depend on where a run was interrupted.
    """

    def __init__(self, runtime: Runtime, section: TrainConfig) -> None:
        self.runtime, self.section = runtime, section
        self._reset()

    def _reset(self) -> None:
        self.start = time.monotonic()
        self.wait_seconds = 0.0
        self.num_steps = self.num_tokens = self.num_padded = 0

    def waiting(self) -> "_Waiting":
        return _Waiting(self)

    def count(self, parts: list[MicroBatch]) -> None:
        self.num_steps += 1
        self.num_tokens += sum(part.num_tokens for part in parts)
        self.num_padded += sum(part.num_padded_tokens for part in parts)

    def read(self, loss: Tensor, engine: TrainEngine) -> dict[str, float]:
        total, tokens, padded, waited = self.runtime.sum(
            float(loss), self.num_tokens, self.num_padded, self.wait_seconds
        )
        seconds = time.monotonic() - self.start
        values = {
            "loss": total / self.section.global_batch_size,
            "gradient_norm": engine.gradient_norm(),
            "sequences_per_second": self.num_steps * self.section.global_batch_size / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / max(1.0, padded),
            "data_wait_share": waited / self.runtime.world_size / seconds,
        }
        self._reset()
        return {key: value for key, value in values.items() if math.isfinite(value) or key == "loss"}


class _Waiting:
    def __init__(self, meter: _Meter) -> None:
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.meter.wait_seconds += time.monotonic() - self.start
