"""Bytes of the states of a model, per rank, and of its files on disk."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alsace_dist.config import EngineConfig, ExportType, TrainConfig

if TYPE_CHECKING:
    from alsace_dist.models.family import Parameters

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default, in elements


@dataclass(frozen=True)
class Memory:
    """Bytes per rank: on the device the model states and fixed buffers, and in host memory what is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int

    @property
    def states(self) -> int:
        """Model states on the device."""
        return self.weights + self.gradients + self.optimizer


def training_memory(parameters: "Parameters", section: TrainConfig, engine: EngineConfig, num_ranks: int) -> Memory:
    """Bytes per rank of the model states of a training, at the moment when the optimizer steps.

    After Rajbhandari et al. 2020 (ZeRO, section 3.1: weights, gradients and Adam's states of a mixed-precision
    training; section 5: what each stage divides by the number of ranks), adapted to what training/settings.py makes
    DeepSpeed hold. With P trained parameters, N ranks, and w = 2 (bf16) or 4 (fp32) bytes per weight:

    - weights: w P' (all P' parameters in memory, frozen ones too); ZeRO-3: w P' / N;
    - optimizer: a float32 copy of the weights, 4 P, and Adam's two moments, 8 P; from ZeRO-1 on divided by N. ZeRO-0 in
      fp32 has no copy. Adafactor's factored moments are left out: they are as small as rows and columns;
    - gradients: the paper counts 2 P. Here they are summed over micro-batches and ranks in float32 from ZeRO-1 on
      (``grad_accum_dtype``), and a flattened copy of a rank's part is handed to Adam in places:
      ZeRO-0 (2 + 4) P in bf16, 4 P in fp32; ZeRO-1 4 P in bf16, where each gradient goes into its sum at once, 4 P +
      4 P / N in fp32; ZeRO-2 4 P / N in bf16, 8 P / N in fp32; ZeRO-3 8 P / N.

    With the optimizer offloaded, its states and its gradients (4 P / N) are in host memory, with a staging area for
    the new weights (ZeRO-1 and 2: w P / N; fp32 in ZeRO-2 another 4 P / N) or the flat sums (ZeRO-3: 4 P / N); on the
    device remain the sums of ZeRO-1 (4 P, in bf16 another 4 P / N) and of ZeRO-2 in bf16 (4 P / N).

    ``buffers``: DeepSpeed's reduce bucket, and with offload in ZeRO-1 and 2 one as large as the embedding, the largest
    parameter (and its like in host memory). Not counted: activations, layers that ZeRO-3 has gathered.
    """
    stage, weight = engine.zero_stage, WEIGHT_BYTES[engine.dtype]
    is_bf16 = engine.dtype == "bf16"
    trained = parameters.trained(section)
    own = trained if stage == 0 else math.ceil(trained / num_ranks)
    copy = 0 if stage == 0 and not is_bf16 else 4 * own
    optimizer = copy + (8 * own if section.optimizer == "adamw" else 0)
    weights = weight * (parameters.kept if stage < 3 else math.ceil(parameters.kept / num_ranks))
    buffers, host = _bucket_bytes(engine, trained), 0
    if engine.offload_optimizer and stage > 0:
        gradients = (4 * trained if stage == 1 else 0) + (4 * own if is_bf16 and stage < 3 else 0)
        staging = 4 * own if stage == 3 else weight * own + (4 * own if stage == 2 and not is_bf16 else 0)
        largest = 0 if stage == 3 else weight * parameters.embedding
        host, buffers = optimizer + 4 * own + staging + largest, buffers + largest
        return Memory(weights, gradients, 0, buffers, host)
    gradients = {
        0: (6 if is_bf16 else 4) * trained,
        1: 4 * trained + (0 if is_bf16 else 4 * own),
        2: (4 if is_bf16 else 8) * own,
        3: 8 * own,
    }[stage]
    return Memory(weights, gradients, optimizer, buffers, host)


def _bucket_bytes(engine: EngineConfig, trained: int) -> int:
    """Size of the bucket in which DeepSpeed reduces gradients, no larger than the model: as long as it trains in
    ZeRO-3, else while it goes backward. ZeRO-0, and ZeRO-1 in bf16 without offload, have none of a fixed size."""
    stage = engine.zero_stage
    if stage == 0 or (stage == 1 and engine.dtype == "bf16" and not engine.offload_optimizer):
        return 0
    size = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", min(trained, REDUCE_BUCKET_SIZE))
    return int(size) * (2 if stage == 2 and engine.dtype == "bf16" else 4)


def scoring_memory(parameters: "Parameters", dtype: str, num_sharing: int) -> int:
    """Bytes per rank of the weights while scoring; ``num_sharing``: ranks that share them out (``score.sharding``)."""
    return WEIGHT_BYTES[dtype] * math.ceil(parameters.kept / num_sharing)


def checkpoint_bytes(parameters: "Parameters", section: TrainConfig) -> int:
    """Size of a training checkpoint: per trained parameter the float32 weight and Adam's two moments."""
    return parameters.trained(section) * (12 if section.optimizer == "adamw" else 4)


def model_bytes(parameters: "Parameters", dtype: ExportType = "float32") -> int:
    """Size of an exported model: all parameters, the whole output head included."""
    return (4 if dtype == "float32" else 2) * parameters.total
