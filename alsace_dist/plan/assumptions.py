"""What a forecast takes for granted, all in one place: [measured], [published] by makers, or [estimated].

Times are seconds, rates a second, sizes bytes.
"""

# --- the device ----------------------------------------------------------------------------------------------------

# Dense bf16 products a second of an H100 or H200 [published].
PEAK_FLOPS = 989e12
# Share of the peak that large matrix products reach [estimated].
PRODUCT_EFFICIENCY = 0.65
# What kernels read and write of a device's memory, of 3.35e12 that an H100 is said to have [estimated].
MEMORY_BANDWIDTH = 2.8e12
# A forward pass reads and writes this many bytes beside the products for each byte that it keeps for the backward pass,
# which moves twice as many: 1.5 and 3.6 in mT5-large, XL and XXL [counted, benchmarks/operations.py].
TRAFFIC_PER_KEPT_BYTE = 1.7
# Starting an operation from Python [estimated], and operations per layer, whatever the size of the batch [counted].
LAUNCH_SECONDS = 5e-6
FORWARD_OPERATIONS = 60
BACKWARD_OPERATIONS = 112
# ZeRO-3 takes this many times as long to start them, for its hooks run before and after every module [estimated].
ZERO_3_LAUNCHES = 2.0
# Bytes of memory traffic for each parameter that Adam updates: weight, moments and gradient in float32 [derived].
OPTIMIZER_TRAFFIC = 30
# Parameters a second that Adam updates in host memory, per thread, and what a device and its host exchange [estimated].
HOST_ADAM_RATE = 0.3e9
HOST_THREADS = 12  # cores of a node for each of its GPUs
HOST_BANDWIDTH = 25e9
# Held by the CUDA context, NCCL and cuBLAS; and the share of a device's memory lost between tensors [estimated].
CONTEXT_BYTES = 2e9
MEMORY_MARGIN = 0.1

# --- the network ---------------------------------------------------------------------------------------------------

# Of a GPU to the GPUs of its node, and of a GPU's share of its node's adapters (400 Gb/s) to other nodes [estimated].
NODE_BANDWIDTH = 300e9
NETWORK_BANDWIDTH = 40e9
# A step of a ring from GPU to GPU, within a node and between nodes [estimated].
HOP_SECONDS = 1.5e-6
NETWORK_HOP_SECONDS = 5e-6
# DeepSpeed's defaults, in elements: weights that ZeRO-3 gathers at a time, and that are alive at a time.
GATHER_ELEMENTS = 50_000_000
MAX_LIVE_ELEMENTS = 1_000_000_000

# --- disks and hosts -----------------------------------------------------------------------------------------------

# What a node writes to a shared file system, and what the file system takes from all nodes [estimated].
NODE_DISK_BANDWIDTH = 2e9
DISK_BANDWIDTH = 20e9
# A rank's process with its libraries, data and pinned buffers [estimated].
PROCESS_BYTES = 4e9

# --- the work ------------------------------------------------------------------------------------------------------

AVERAGE_LENGTH = 64  # tokens of a prompt, as XNLI's; longer than task.max_tokens it cannot be
NUM_GROUPS = 1000  # of each split that is not prepared
NUM_LANGUAGES = 15
ANSWER_TOKENS = 3  # of an answer of several tokens

LINES = (
    f"Products run at {PRODUCT_EFFICIENCY:.0%} of the peak; beside them a pass moves {TRAFFIC_PER_KEPT_BYTE:g} bytes "
    f"for each that it keeps, at {MEMORY_BANDWIDTH / 1e12:g} TB/s; at least it takes {FORWARD_OPERATIONS} launches a "
    f"layer forward and {BACKWARD_OPERATIONS} backward, {LAUNCH_SECONDS * 1e6:g} us each, with ZeRO-3 "
    f"{ZERO_3_LAUNCHES:g} times as long.",
    f"Collectives are rings: {NODE_BANDWIDTH / 1e9:g} GB/s to a GPU within a node, and between nodes what all GPUs of "
    f"a node have together; a hop takes {HOP_SECONDS * 1e6:g} us, between nodes {NETWORK_HOP_SECONDS * 1e6:g} us. "
    "ZeRO-3 overlaps them with computing, ZeRO-0 to 2 wait for them.",
    f"Memory: {CONTEXT_BYTES / 1e9:g} GB and {MEMORY_MARGIN:.0%} of a GPU are left free. Activations are those of "
    "prompts of full length, with PyTorch's memory-efficient attention and RMSNorm in one kernel, or the gradients of "
    "a trained embedding where these are larger.",
    f"Disk: {NODE_DISK_BANDWIDTH / 1e9:g} GB/s a node, {DISK_BANDWIDTH / 1e9:g} GB/s in all. Starting, reading the "
    "model and exporting it are left out.",
)
