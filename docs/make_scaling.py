"""Write docs/scaling.md: what ``alsace plan --nodes`` says of mT5-XL and XXL on 1 to 512 GPUs:

    python docs/make_scaling.py

A test (tests/plan/test_scaling.py) holds the file against this program.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from alsace_dist.config import Config
from alsace_dist.config_file import load_config
from alsace_dist.plan import assumptions
from alsace_dist.plan.cluster import Cluster
from alsace_dist.plan.cost import hpz_size
from alsace_dist.plan.estimate import Estimate, Forecast, estimate_scoring, forecast
from alsace_dist.plan.model import planned_model
from alsace_dist.plan.search import Choice, choices
from alsace_dist.plan.work import Counts, Work, work_of

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "configs" / "xnli-mt5-xxl.yaml"
MODELS = {"mT5-XL": "google/mt5-xl", "mT5-XXL": "google/mt5-xxl"}
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 8
GPU_MEMORY = 80e9
COUNTS = Counts(num_groups=10_000, num_languages=15)
PER_GPU = 64  # prompts of a step, where the batch grows with the GPUs

HEAD = """# Scaling

<!-- Made by docs/make_scaling.py from alsace_dist/plan/. Change it there, then run that script. -->

What `alsace plan CONFIG --nodes=...` says before anybody waits in a queue, how it comes to it, and its tables for
mT5-XL and XXL. **All times, rates and node-hours here are predicted, not measured**: no GPU has run them.

```bash
alsace plan configs/xnli-mt5-xxl.yaml --nodes=4 --gpus-per-node=8 --gpu-memory=80GB
alsace plan configs/xnli-mt5-xxl.yaml --nodes=4 --gpu-memory=80GB --bandwidth=25 --flops=312 --groups=10000 \\
    --languages=15 --write=planned.yaml          # the cheapest choice as a config; --choice=2: the next one
alsace run planned.yaml --dry-run
```

It needs no network and no weights: the geometries of mT5, mT0 and XLM-R are built in by name, those of other models are
read from their `config.json`. It prints, for every stage, the memory of a GPU by parts, that of a node's host, the
checkpoint and how long it takes to write, the tokens that a GPU computes in a pass and the bytes that it receives, how
long it computes and how long it waits for other GPUs, the time of a step and of the stage, node-hours and MFU; then the
settings that fit, cheapest first; then what helps where GPUs wait longer than they compute.

## What is checked, and what is not

| Part | Held against |
|---|---|
| weights, gradients, optimizer, buffers, host | all live tensors of DeepSpeed on two ranks, every ZeRO stage \
(`tests/test_plan.py`, within 2 %) |
| activations of mT5 and XLM-R | all live tensors of real passes, nano to the layers of mT5-large, with and without \
gradient checkpointing (`tests/models/test_footprint.py`: what is kept within 3 %, the peak within 10 %) |
| parameters | published sizes (`tests/plan/test_model.py`) |
| bytes between GPUs, arithmetic of times | worked out by hand (`tests/plan/test_cost.py`) |
| a GPU's own peak (`max_memory_allocated`), step times, MFU | **nothing yet**: `benchmarks/gpu.py` measures them \
where there is a GPU |

Activations are those of PyTorch's memory-efficient attention, which GPUs use; their formula and its derivation are in
`alsace_dist/models/footprint.py`, the bytes that ZeRO moves in `alsace_dist/plan/cost.py`, all constants in
`alsace_dist/plan/assumptions.py`. The sum per GPU is an upper bound: the states are largest when the optimizer steps,
when activations are gone.

Optimizer states in host memory are there whole (`engine.offload_optimizer`). Not offered: a part of them
(`offload_optimizer.ratio`), for DeepSpeed 0.19 updates what stays on the GPU with an optimizer of its own, which the
schedule of the learning rate does not reach; and NVMe, whose files no checkpoint here can be written from. XXL's states
are 200 GB, which the hosts of GPU nodes have.

## Assumptions

"""


class Setup(NamedTuple):
    """A model on some GPUs. ``distill``, ``score``: the stages."""

    about: Forecast
    distill: Work
    score: Work
    config: Config


def make_page() -> str:
    """The whole of docs/scaling.md."""
    lines = [HEAD.rstrip("\n"), "", *(f"- {line}" for line in assumptions.LINES)]
    lines += [
        f"- GPUs of {GPU_MEMORY / 1e9:g} GB with {assumptions.PEAK_FLOPS / 1e12:g} TFLOPS, {GPUS_PER_NODE} a node, "
        f"each with {assumptions.NETWORK_BANDWIDTH / 1e9:g} GB/s to other nodes. Prompts of "
        f"{assumptions.AVERAGE_LENGTH} tokens, {COUNTS.num_groups:,} groups in {COUNTS.num_languages} languages, three "
        "epochs; otherwise `configs/xnli-mt5-xxl.yaml`.",
        "- For every number of GPUs the cheapest settings that fit: the ZeRO stage; c: with gradient checkpointing; "
        "o: optimizer in host memory; h: hpZ over the node; and the micro-batch.",
    ]
    for name, path in MODELS.items():
        lines += ["", f"## {name} (predicted)", "", "### Scoring", "", *_scoring(path)]
        lines += ["", "### Distilling, 1,024 prompts a step", "", *_distilling(path, None)]
        lines += ["", f"### Distilling, {PER_GPU} prompts a step for each GPU", "", *_distilling(path, PER_GPU)]
    return "\n".join([*lines, "", *TAIL]) + "\n"


TAIL = [
    "## What to read from it",
    "",
    "- Scoring needs no communication where the weights fit a GPU, and then scales with the GPUs. Sharded, it gathers",
    "  them for every batch, which goes on behind the computing until the rings are long.",
    "- A fixed batch is soon too small: at 512 GPUs a batch of 1,024 leaves two prompts for each, whose weights travel",
    "  all the same. More nodes then cost node-hours and save no time: a larger batch, or fewer nodes, is the remedy.",
    "- Where several settings fit, more prompts in a micro-batch are worth more than what saves memory for them.",
]


def setup(path: str, num_gpus: int, batch: int | None) -> Setup:
    """The XXL preset with another model, on some GPUs; ``batch``: of a step, None: as the preset has it."""
    about, works, config = _on_one_node(path)
    nodes = max(1, num_gpus // GPUS_PER_NODE)
    about = about._replace(cluster=Cluster(nodes, num_gpus // nodes, GPU_MEMORY))
    distill = works["distill"]
    assert distill.section is not None
    if batch:
        distill = replace(distill, section=distill.section.model_copy(update={"global_batch_size": batch}))
    return Setup(about, distill, works["score unlabeled"], config)


@cache
def _on_one_node(path: str) -> tuple[Forecast, dict[str, Work], Config]:
    config = load_config(PRESET, {"model.path": path})
    model = planned_model(config)
    works = {work.name: work for work in work_of(config, model.mode, COUNTS)}
    return forecast(config, model, Cluster(1, GPUS_PER_NODE, GPU_MEMORY), None), works, config


def _scoring(path: str) -> Iterator[str]:
    yield "| GPUs | whole weights: GB per GPU | prompts/s | MFU | sharded: GB per GPU | prompts/s | MFU |"
    yield "|---|---|---|---|---|---|---|"
    for number in NUM_GPUS:
        about, _, work, config = setup(path, number, None)
        cells = [f"{number}"]
        for sharding in ("replicated", "zero3"):
            one = estimate_scoring(about, work, config.engine, sharding)
            cells += [*([_gigabytes(one), _rate(one), f"{one.mfu:.0%}"] if one.fits else ["does not fit", "", ""])]
        yield f"| {' | '.join(cells)} |"


def _distilling(path: str, per_gpu: int | None) -> Iterator[str]:
    head = ["GPUs", "settings", "GB per GPU", "prompts a pass", "GB received a pass", "compute : wait", "s a step"]
    yield f"| {' | '.join([*head, 'prompts/s', 'MFU', 'hours', 'node-hours'])} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for number in NUM_GPUS:
        about, work, _, config = setup(path, number, per_gpu and per_gpu * number)
        best = next(iter(choices(about, [work], config.engine)), None)
        yield f"| {number} | {' | '.join(_cells(best)) if best else 'nothing fits' + ' |' * 9} |"


def _cells(choice: Choice) -> list[str]:
    (one,), engine = choice.estimates, choice.engine
    marks = "c" * engine.gradient_checkpointing + "o" * engine.offload_optimizer + "h" * (hpz_size(engine) > 1)
    size = choice.budgets["distill"]
    wait = one.communication_seconds / one.compute_seconds
    measures = [_gigabytes(one), f"{one.prompts:.3g}", f"{one.moved / 1e9:.0f}", f"1 : {wait:.2g}"]
    rates = [f"{one.step_seconds:.2g}", _rate(one), f"{one.mfu:.1%}", f"{one.seconds / 3600:.2g}"]
    hours = one.node_hours * one.cluster.gpus_per_node / GPUS_PER_NODE  # some GPUs of a node are a part of it
    return [f"ZeRO-{engine.zero_stage}{f' {marks}' if marks else ''}, {size:,}", *measures, *rates, f"{hours:.2g}"]


def _gigabytes(one: Estimate) -> str:
    return f"{one.device_bytes / 1e9:.0f}"


def _rate(one: Estimate) -> str:
    """Prompts a second over all GPUs."""
    section, ranks = one.work.section, one.cluster.num_ranks
    prompts = section.global_batch_size if section else one.prompts * ranks
    return f"{float(f'{prompts / one.step_seconds:.2g}'):,.0f}"


if __name__ == "__main__":
    file = Path(__file__).with_name("scaling.md")
    file.write_text(make_page(), encoding="utf-8")
    print(f"wrote {file.name}")
