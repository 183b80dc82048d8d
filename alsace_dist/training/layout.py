"""How a model's weights lie over the ranks while it scores, which is not how they lie while it is trained."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from alsace_dist.config import EngineConfig, Sharding
from alsace_dist.models.family import TrainableModel
from alsace_dist.models.weights import DTYPES
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.settings import QUANTIZED

# Of a GPU's memory, or of a machine's: the rest is for activations, and on a machine without GPUs for the files' pages.
WEIGHTS_SHARE = 0.5
# Raw settings of ZeRO-3 that are for training: quantised weights and gradients, and second copies within a node.
TRAINING_ONLY = (*QUANTIZED, "zero_hpz_partition_size")


def weight_bytes(model: TrainableModel, dtype: str) -> int:
    """Bytes of all weights of a model in memory."""
    with torch.device("meta"):
        module = model.build(0.0, gradient_checkpointing=False)
    return sum(parameter.numel() for parameter in module.parameters()) * DTYPES[dtype].itemsize


def memory_of_a_rank(ranks: Ranks, num_local: int) -> int:
    """Bytes of a rank's GPU, or without one its part of this machine's memory, which ``num_local`` ranks share."""
    if ranks.device.type == "cuda":
        return int(torch.cuda.get_device_properties(ranks.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_local


class ScoringLayout(NamedTuple):
    """How a model scores. ``engine``: with ZeRO stage 0, every rank has all weights, or 3; ``together``: then this rank
    among those whose forward passes are one collective."""

    engine: EngineConfig
    together: Ranks


def scoring_layout(
    sharding: Sharding, engine: EngineConfig, model: TrainableModel, ranks: Ranks, hosts: Sequence[str]
) -> ScoringLayout:
    """Where the weights are while a model scores. ``hosts``: the machine of each rank. Collective.

    If they must be divided, then over the ranks of each machine where that is enough: between machines they would
    travel ten times as slowly, in every pass.
    """
    parts: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        parts.setdefault(host, []).append(rank)
    num_local = len(parts[hosts[ranks.rank]])
    room = WEIGHTS_SHARE * memory_of_a_rank(ranks, num_local)
    num_bytes = weight_bytes(model, engine.dtype)
    too_large, too_large_for_a_machine = ranks.any_rank(num_bytes > room, num_bytes > room * num_local)
    if sharding == "replicated" or (sharding == "auto" and not too_large):
        return ScoringLayout(_of_stage(engine, 0), ranks)
    divided = _of_stage(engine, 3)
    if too_large_for_a_machine or len(parts) == 1:
        return ScoringLayout(divided, ranks)
    return ScoringLayout(divided, ranks.among(list(parts.values())))


def _of_stage(engine: EngineConfig, stage: int) -> EngineConfig:
    """The section for scoring: what it says of another ZeRO stage's training means nothing, and no quantised weights
    score."""
    raw = engine.deepspeed if stage == engine.zero_stage == 3 else {}
    zero = {key: value for key, value in raw.get("zero_optimization", {}).items() if key not in TRAINING_ONLY}
    update = {"zero_stage": stage, "offload_optimizer": False, "deepspeed": {**raw, "zero_optimization": zero}}
    return engine.model_copy(update=update)
