"""The nodes that a forecast is for, as flags of ``alsace plan`` say them."""

import re
from dataclasses import dataclass

from alsace_dist.errors import UserError
from alsace_dist.plan import assumptions as given
from alsace_dist.reading import shorten

_AMOUNT = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z/]*)\s*")
_BYTES = {"": 1e9, "b": 1.0, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_RATES = {"": 1e9, "gb": 1e9, "gb/s": 1e9, "gib/s": 2.0**30, "tb/s": 1e12, "gbit/s": 1e9 / 8, "gb/sec": 1e9}
_FLOPS = {"": 1e12, "tflops": 1e12, "tflop/s": 1e12, "pflops": 1e15, "pflop/s": 1e15}
MOST_RANKS = 1 << 20
LEAST, MOST = 1e6, 1e21  # of bytes, or operations, and of either a second


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. ``gpu_memory``: bytes; ``bandwidth``: bytes a second that each GPU has to other nodes; ``flops``:
    dense bf16 peak of a GPU, a second."""

    num_nodes: int
    gpus_per_node: int
    gpu_memory: float
    bandwidth: float = given.NETWORK_BANDWIDTH
    flops: float = given.PEAK_FLOPS

    @property
    def num_ranks(self) -> int:
        """GPUs in all."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.gpu_memory * (1 - given.MEMORY_MARGIN) - given.CONTEXT_BYTES


def read_cluster(nodes: int, gpus_per_node: int, gpu_memory: str, bandwidth: str = "", flops: str = "") -> Cluster:
    """The cluster that flags of the command line describe. Raises ``UserError`` that names the flag."""
    for flag, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"--{flag}={value}: must be 1 or more")
    if nodes * gpus_per_node > MOST_RANKS:
        raise UserError(f"--nodes={nodes}: are {nodes * gpus_per_node:,} GPUs with --gpus-per-node; lower one of them")
    memory = _amount("gpu-memory", gpu_memory, _BYTES, "80GB or 80GiB")
    network = _amount("bandwidth", bandwidth, _RATES, "50, in GB/s for each GPU") if bandwidth else 0.0
    peak = _amount("flops", flops, _FLOPS, "989, in TFLOPS of dense bf16") if flops else 0.0
    found = Cluster(nodes, gpus_per_node, memory, network or given.NETWORK_BANDWIDTH, peak or given.PEAK_FLOPS)
    if found.usable_memory <= 0:
        raise UserError(
            f"--gpu-memory={gpu_memory}: {given.CONTEXT_BYTES / 1e9:g} GB are taken before any model is there; give "
            "the memory of a whole GPU, such as 80GB"
        )
    return found


def _amount(flag: str, text: str, units: dict[str, float], example: str) -> float:
    match = _AMOUNT.fullmatch(text)
    factor = units.get(match["unit"].lower()) if match else None
    if match is None or factor is None or not LEAST <= float(match["number"]) * factor <= MOST:
        raise UserError(f"--{flag}={shorten(text)}: give an amount such as {example}")
    return float(match["number"]) * factor
