"""What passes and steps cost: computing, bytes between GPUs, seconds.

Computing: a forward pass takes F FLOPs (``Family.forward_flops``), the backward pass twice that (with adapters, LoRA,
once), and with gradient checkpointing the forward pass once more. Its time is that of the products and of the memory
traffic beside them, or of starting its operations where these are too small.

Bytes: with P trained and P' held parameters, w bytes each (bf16: 2), and gradients that travel in float32
(``communication_data_type`` in training/settings.py):

- ZeRO-0: an all-reduce of the gradients (4 P) once a step.
- ZeRO-1: the same, and an all-gather of the new weights (w P).
- ZeRO-2: an all-reduce of the gradients in every pass, for DeepSpeed reduces its buckets over all ranks at once; and
  the all-gather once a step.
- ZeRO-3: in every pass an all-gather of the weights (w P') forward and one backward, with gradient checkpointing one
  more, and a reduce-scatter of the gradients (4 P). With ``zero_hpz_partition_size`` only the first gather leaves the
  node (Wang et al. 2023, ZeRO++, section 3.2).
- Scoring: an all-gather of the weights in every batch if they are sharded, else nothing.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.plan import assumptions as given
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.memory import REDUCE_BUCKET_SIZE, WEIGHT_BYTES

if TYPE_CHECKING:
    from alsace_dist.models.family import Parameters
    from alsace_dist.models.footprint import Activations


@dataclass(frozen=True)
class Collective:
    """All-gathers or reduce-scatters of ``num_bytes`` in all, whole tensors, in ``num_calls`` calls.

    ``within_node``: only among the GPUs of a node.
    """

    num_bytes: float
    num_calls: int
    within_node: bool = False

    def moved(self, cluster: Cluster) -> float:
        """Bytes that each GPU sends, and receives: all but its own part."""
        num_ranks = cluster.gpus_per_node if self.within_node else cluster.num_ranks
        return self.num_bytes * (num_ranks - 1) / num_ranks

    def seconds(self, cluster: Cluster) -> float:
        """Time of a ring.

        Every byte enters a node once, through the adapters of all its GPUs together, and passes each of them.
        """
        num_nodes = 1 if self.within_node else cluster.num_nodes
        gpus = cluster.gpus_per_node
        num_ranks = num_nodes * gpus
        within = self.moved(cluster) / given.NODE_BANDWIDTH if gpus > 1 else 0.0
        between = self.num_bytes * (num_nodes - 1) / num_nodes / (gpus * cluster.bandwidth)
        num_between = min(num_nodes, num_ranks - 1) if num_nodes > 1 else 0
        hops = (num_ranks - 1 - num_between) * given.HOP_SECONDS + num_between * given.NETWORK_HOP_SECONDS
        return max(within, between) + self.num_calls * hops


@dataclass(frozen=True)
class Traffic:
    """Collectives of every pass, and of every step."""

    each_pass: tuple[Collective, ...] = ()
    each_step: tuple[Collective, ...] = ()


def hpz_size(engine: EngineConfig) -> int:
    """Ranks that share a second copy of the weights (hpZ); 1: there is none."""
    return int(engine.deepspeed.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))


def training_traffic(parameters: "Parameters", section: TrainConfig, engine: EngineConfig) -> Traffic:
    """What a training sends between its ranks."""
    trained, weight = parameters.trained(section), WEIGHT_BYTES[engine.dtype]
    num_buckets = math.ceil(trained / REDUCE_BUCKET_SIZE)
    scatter = Collective(4.0 * trained, num_buckets)
    all_reduce = (scatter, scatter)  # a reduce-scatter and an all-gather, of as many bytes
    update = Collective(float(weight * trained), num_buckets)
    if engine.zero_stage < 3:
        each_step = all_reduce if engine.zero_stage < 2 else ()
        return Traffic(
            all_reduce if engine.zero_stage == 2 else (), each_step + ((update,) if engine.zero_stage else ())
        )
    first = gather(parameters, engine)
    again = Collective(first.num_bytes, first.num_calls, within_node=hpz_size(engine) > 1)
    return Traffic((first, *[again] * (2 if engine.gradient_checkpointing else 1), scatter))


def gather(parameters: "Parameters", engine: EngineConfig) -> Collective:
    """All weights, as ZeRO-3 gathers them for a pass."""
    num_calls = math.ceil(parameters.kept / given.GATHER_ELEMENTS)
    return Collective(float(WEIGHT_BYTES[engine.dtype] * parameters.kept), num_calls)


def forward_seconds(flops: float, activations: "Activations", is_sharded: bool, cluster: Cluster) -> float:
    """Time of computing a forward pass of so many FLOPs; ``is_sharded``: of weights that ZeRO-3 gathers."""
    launches = activations.num_layers * given.FORWARD_OPERATIONS * _launch_seconds(is_sharded)
    return max(_kernel_seconds(flops, activations, cluster), launches)


def backward_share(section: TrainConfig) -> int:
    """FLOPs of a backward pass as a multiple of a forward pass's: gradients of activations and of weights, and beside
    adapters, which are small, of activations alone."""
    return 1 if section.lora else 2


def pass_seconds(
    flops: float, activations: "Activations", engine: EngineConfig, cluster: Cluster, backward: int = 2
) -> float:
    """Time of computing a forward and a backward pass; ``flops``: of the forward pass; ``backward``: as
    ``backward_share``."""
    is_sharded = engine.zero_stage == 3
    launches = activations.num_layers * given.BACKWARD_OPERATIONS * _launch_seconds(is_sharded)
    going_back = max(backward * _kernel_seconds(flops, activations, cluster), launches)
    num_forwards = 2 if engine.gradient_checkpointing else 1
    return num_forwards * forward_seconds(flops, activations, is_sharded, cluster) + going_back


def _launch_seconds(is_sharded: bool) -> float:
    return given.LAUNCH_SECONDS * (given.ZERO_3_LAUNCHES if is_sharded else 1)


def _kernel_seconds(flops: float, activations: "Activations", cluster: Cluster) -> float:
    """Time that a device takes for a forward pass, were it never kept waiting."""
    traffic = given.TRAFFIC_PER_KEPT_BYTE * activations.kept(gradient_checkpointing=False)
    return flops / (cluster.flops * given.PRODUCT_EFFICIENCY) + traffic / given.MEMORY_BANDWIDTH


def update_seconds(parameters: "Parameters", section: TrainConfig, engine: EngineConfig, num_ranks: int) -> float:
    """Time in which a rank updates its own parameters, on its device or in its host's memory."""
    own = parameters.trained(section) / (num_ranks if engine.zero_stage else 1)
    if not engine.offload_optimizer:
        return own * given.OPTIMIZER_TRAFFIC / given.MEMORY_BANDWIDTH
    travel = own * (4 + WEIGHT_BYTES[engine.dtype]) / given.HOST_BANDWIDTH
    num_threads = given.HOST_THREADS if engine.num_threads == "auto" else engine.num_threads
    return travel + own / (given.HOST_ADAM_RATE * num_threads)
