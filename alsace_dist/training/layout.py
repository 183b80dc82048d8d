"""How a model's weights lie over the ranks while it scores, which is not how they lie while it is trained."""

import os

import torch

from alsace_dist.config import EngineConfig, Sharding
from alsace_dist.models.family import TrainableModel
from alsace_dist.models.weights import DTYPES
from alsace_dist.ranks.group import Ranks

# Of a GPU's memory, or of a machine's: the rest is for activations, and on a machine without GPUs for the files' pages.
WEIGHTS_SHARE = 0.5


def weight_bytes(model: TrainableModel, dtype: str) -> int:
    """Bytes of all weights of a model in memory."""
    with torch.device("meta"):
        module = model.build(0.0, gradient_checkpointing=False)
    return sum(parameter.numel() for parameter in module.parameters()) * DTYPES[dtype].itemsize


def memory_of_a_rank(ranks: Ranks) -> int:
    """Bytes of a rank's GPU, or without one its part of this machine's memory. Collective."""
    hosts = ranks.gather(os.uname().nodename)
    if ranks.device.type == "cuda":
        return int(torch.cuda.get_device_properties(ranks.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // hosts.count(os.uname().nodename)


def scoring_engine(sharding: Sharding, engine: EngineConfig, model: TrainableModel, ranks: Ranks) -> EngineConfig:
    """The engine section with which a model scores: ZeRO stage 0, every rank has all weights, or 3. Collective."""
    if sharding == "auto":
        too_large = weight_bytes(model, engine.dtype) > WEIGHTS_SHARE * memory_of_a_rank(ranks)
        sharding = "zero3" if ranks.any_rank(too_large)[0] else "replicated"
    # What the section says of another ZeRO stage's training means nothing here, and no quantised weights score.
    raw = engine.deepspeed if sharding == "zero3" and engine.zero_stage == 3 else {}
    zero = {key: value for key, value in raw.get("zero_optimization", {}).items() if "quantized" not in key}
    update = {"zero_stage": 3 if sharding == "zero3" else 0, "offload_optimizer": False}
    return engine.model_copy(update=update | {"deepspeed": {**raw, "zero_optimization": zero}})
