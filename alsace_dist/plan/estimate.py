"""A stage on a cluster: bytes on the device and the host, passes, seconds, node-hours."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from alsace_dist.config import Config, EngineConfig, Sharding, TrainConfig
from alsace_dist.errors import UserError
from alsace_dist.plan import assumptions as given
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.cost import (
    Collective,
    backward_share,
    forward_seconds,
    gather,
    hpz_size,
    pass_seconds,
    training_traffic,
    update_seconds,
)
from alsace_dist.plan.memory import WEIGHT_BYTES, Memory, checkpoint_bytes, scoring_memory, training_memory
from alsace_dist.plan.model import PlannedModel
from alsace_dist.plan.work import Work

if TYPE_CHECKING:
    from alsace_dist.models.family import Parameters
    from alsace_dist.models.footprint import Activations

TOKEN_BUDGETS = tuple(2**power for power in range(8, 20))  # of micro-batches


class Forecast(NamedTuple):
    """What estimates are made from. ``average_length``: tokens of a prompt; ``max_tokens``: of the longest one."""

    model: PlannedModel
    parameters: "Parameters"
    cluster: Cluster
    tokens_per_batch: int
    sharding: Sharding
    max_tokens: int
    average_length: int
    num_sequences: int
    num_positions: int

    def activations(self, num_prompts: float, length: int, engine: EngineConfig) -> "Activations":
        """Of a pass over so many prompts of this length. Raises ``UserError`` if the family has no formula."""
        from alsace_dist.models.footprint import Kernels, PassShape

        rows = self.model.num_head_rows
        shape = PassShape(
            num_prompts=max(1, math.ceil(num_prompts)),
            length=length,
            num_sequences=self.num_sequences,
            num_positions=self.num_positions,
            num_head_rows=self.model.config.vocab_size if rows is None else rows,
        )
        found = self.model.family.activations(self.model.config, shape, WEIGHT_BYTES[engine.dtype], Kernels())
        if found is None:
            raise UserError(f"--nodes: no formula for activations of {self.model.family.name} is there; leave it out")
        return found

    def flops(self, num_prompts: float) -> float:
        """Of a forward pass over so many prompts of average length."""
        one = self.model.family.forward_flops(
            self.model.config, [self.average_length], self.num_sequences * self.num_positions
        )
        return one * num_prompts


def forecast(config: Config, model: PlannedModel, cluster: Cluster, average_length: int | None) -> Forecast:
    """What estimates for a run are made from. ``average_length``: None for the usual one."""
    parameters = model.family.count_parameters(model.config, model.num_head_rows, model.mode)
    length = min(average_length or given.AVERAGE_LENGTH, config.task.max_tokens)
    is_single = model.num_head_rows is not None
    num_candidates = config.task.num_candidates or 2
    return Forecast(
        model=model,
        parameters=parameters,
        cluster=cluster,
        tokens_per_batch=config.score.tokens_per_batch,
        sharding=config.score.sharding,
        max_tokens=config.task.max_tokens,
        average_length=length,
        num_sequences=1 if is_single else num_candidates,
        num_positions=2 if is_single else 1 + given.ANSWER_TOKENS,
    )


def most_prompts(section: TrainConfig, length: int) -> int:
    """Most prompts of this length in a micro-batch, whose budget of tokens is given."""
    assert section.tokens_per_micro_batch != "auto"
    most = max(1, section.tokens_per_micro_batch // length)
    return min(most, section.micro_batch_size or most)


@dataclass(frozen=True)
class Estimate:
    """One stage. ``memory``: model states and buffers of a rank; ``gathered``: weights that ZeRO-3 gathers, and hpZ's
    copy; ``prompts``: of a pass on a rank, on average; ``moved``: bytes that a GPU receives in a pass, those of a step
    shared out over its passes; seconds are of a step, in scoring of a batch on each rank."""

    work: Work
    cluster: Cluster
    memory: Memory
    activations: int
    gathered: int
    prompts: float
    num_passes: int
    moved: float
    compute_seconds: float
    communication_seconds: float
    step_seconds: float
    num_steps: int
    model_flops: float
    checkpoint: int

    @property
    def device_bytes(self) -> int:
        """Of a GPU, all together: an upper bound, for states peak when activations are gone."""
        return self.memory.states + self.memory.buffers + self.gathered + self.activations

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for it."""
        return self.device_bytes <= self.cluster.usable_memory

    @property
    def host_bytes(self) -> float:
        """Of a node's main memory."""
        return self.cluster.gpus_per_node * (self.memory.host + given.PROCESS_BYTES)

    @property
    def checkpoint_seconds(self) -> float:
        """Time in which the nodes write a checkpoint, each its own part."""
        return self.checkpoint / min(self.cluster.num_nodes * given.NODE_DISK_BANDWIDTH, given.DISK_BANDWIDTH)

    @property
    def seconds(self) -> float:
        """Of the stage, as often as the run has it, checkpoints included."""
        section = self.work.section
        num_checkpoints = self.num_steps // section.checkpoint_every_steps if section else 0
        return self.work.times * (self.num_steps * self.step_seconds + num_checkpoints * self.checkpoint_seconds)

    @property
    def node_hours(self) -> float:
        """Of all nodes together."""
        return self.seconds / 3600 * self.cluster.num_nodes

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that goes into the model's FLOPs (three forward passes in training)."""
        return self.model_flops / (self.step_seconds * self.cluster.flops * self.cluster.num_ranks)


def estimate_training(about: Forecast, work: Work, section: TrainConfig, engine: EngineConfig) -> Estimate:
    """A training in this layout.

    The prompts of a step are shared out evenly; where ranks outnumber them, some ranks have none, and wait.
    """
    cluster, parameters = about.cluster, about.parameters
    per_rank = max(1.0, section.global_batch_size * work.rows_per_example / cluster.num_ranks)
    num_passes = math.ceil(per_rank / most_prompts(section, about.average_length))
    prompts = per_rank / num_passes
    at_most = min(most_prompts(section, about.max_tokens), math.ceil(per_rank))
    longest = about.activations(at_most, about.max_tokens, engine)
    usual = about.activations(prompts, about.average_length, engine)
    flops = about.flops(prompts)
    traffic = training_traffic(parameters, section, engine)
    backward = backward_share(section)
    compute = num_passes * pass_seconds(flops, usual, engine, cluster, backward)
    in_passes = num_passes * _seconds(traffic.each_pass, cluster)
    in_step = _seconds(traffic.each_step, cluster)
    # ZeRO-3 gathers and reduces while it computes.
    passing = max(compute, in_passes) if engine.zero_stage == 3 else compute + in_passes
    moved = sum(one.moved(cluster) for one in traffic.each_pass)
    moved += sum(one.moved(cluster) for one in traffic.each_step) / num_passes
    num_prompts = section.global_batch_size * work.rows_per_example
    return Estimate(
        work=work,
        cluster=cluster,
        memory=training_memory(parameters, section, engine, cluster.num_ranks),
        activations=longest.most(engine.gradient_checkpointing, section.freeze_vocabulary or bool(section.lora)),
        gathered=gathered_bytes(parameters, engine) if engine.zero_stage == 3 else 0,
        prompts=prompts,
        num_passes=num_passes,
        moved=moved,
        compute_seconds=compute,
        communication_seconds=in_passes + in_step,
        step_seconds=passing + in_step + update_seconds(parameters, section, engine, cluster.num_ranks),
        num_steps=work.num_steps,
        model_flops=(1 + backward) * about.flops(num_prompts),
        checkpoint=checkpoint_bytes(parameters, section),
    )


def training_that_fits(about: Forecast, work: Work, section: TrainConfig) -> Estimate | None:
    """The fastest training that fits, of all budgets of tokens; None if none fits."""
    best = None
    for tokens in TOKEN_BUDGETS:
        given_section = section.model_copy(update={"tokens_per_micro_batch": tokens})
        one = estimate_training(about, replace(work, section=given_section), given_section, work.engine)
        if not one.fits:
            break
        if best is None or one.seconds < 0.999 * best.seconds:
            best = one
        if one.num_passes == 1:
            break
    return best


def num_sharing(about: Forecast, engine: EngineConfig, sharding: Sharding) -> int:
    """How many ranks share out the weights while they score, as ``training.layout`` decides it: 1, those of a node, or
    all."""
    from alsace_dist.training.layout import WEIGHTS_SHARE

    cluster = about.cluster
    weights = WEIGHT_BYTES[engine.dtype] * about.parameters.kept
    room = WEIGHTS_SHARE * cluster.gpu_memory
    if sharding == "replicated" or (sharding == "auto" and weights <= room):
        return 1
    return cluster.gpus_per_node if weights <= room * cluster.gpus_per_node else cluster.num_ranks


def estimate_scoring(about: Forecast, work: Work, engine: EngineConfig, sharding: Sharding) -> Estimate:
    """A scoring pass, every rank a share of the rows in batches of ``score.tokens_per_batch``."""
    cluster, parameters = about.cluster, about.parameters
    sharing = num_sharing(about, engine, sharding)
    near = replace(cluster, num_nodes=1) if sharing <= cluster.gpus_per_node else cluster
    per_rank = max(1.0, work.num_examples * work.rows_per_example / cluster.num_ranks)
    most = max(1.0, about.tokens_per_batch / about.average_length)
    num_batches = math.ceil(per_rank / most)
    prompts = per_rank / num_batches
    longest = about.activations(about.tokens_per_batch / about.max_tokens, about.max_tokens, engine)
    traffic = (gather(parameters, engine),) if sharing > 1 else ()
    usual = about.activations(prompts, about.average_length, engine)
    compute = forward_seconds(about.flops(prompts), usual, sharing > 1, cluster)
    communication = _seconds(traffic, near)
    return Estimate(
        work=work,
        cluster=cluster,
        memory=Memory(scoring_memory(parameters, engine.dtype, sharing), 0, 0, 0, 0),
        activations=longest.largest_layer + longest.working,
        gathered=gathered_bytes(parameters, engine) if sharing > 1 else 0,
        prompts=prompts,
        num_passes=1,
        moved=sum(one.moved(near) for one in traffic),
        compute_seconds=compute,
        communication_seconds=communication,
        step_seconds=max(compute, communication),
        num_steps=num_batches,
        model_flops=about.flops(prompts * cluster.num_ranks),
        checkpoint=0,
    )


def estimate(about: Forecast, work: Work) -> Estimate:
    """A stage as its config has it; ``tokens_per_micro_batch: auto`` is taken for the fastest budget that fits, or for
    the smallest if none does."""
    section = work.section
    if section is None:
        return estimate_scoring(about, work, work.engine, about.sharding)
    if section.tokens_per_micro_batch == "auto":
        if found := training_that_fits(about, work, section):
            return found
        section = section.model_copy(update={"tokens_per_micro_batch": TOKEN_BUDGETS[0]})
    return estimate_training(about, replace(work, section=section), section, work.engine)


def gathered_bytes(parameters: "Parameters", engine: EngineConfig) -> int:
    """Whole weights that a rank holds at a time under ZeRO-3, at most; and its part of hpZ's second copy.

    DeepSpeed keeps as many alive as ``stage3_max_live_parameters``, the embedding whole if that is larger, and gathers
    the next ones beside them.
    """
    zero = engine.deepspeed.get("zero_optimization", {})
    alive = max(int(zero.get("stage3_max_live_parameters", given.MAX_LIVE_ELEMENTS)), parameters.embedding)
    ahead = int(zero.get("stage3_prefetch_bucket_size", given.GATHER_ELEMENTS))
    size = hpz_size(engine)
    copy = math.ceil(parameters.kept / size) if size > 1 else 0
    return WEIGHT_BYTES[engine.dtype] * (min(parameters.kept, alive + ahead) + copy)


def _seconds(collectives: tuple[Collective, ...], cluster: Cluster) -> float:
    return sum(one.seconds(cluster) for one in collectives)
