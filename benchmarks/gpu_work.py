"""What benchmarks/gpu.py times: models of random weights, batches, the project's loops and bare ones, FLOPs."""

import gc
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MT5Config

from alsace_dist.config import DistillConfig, EngineConfig, LoraConfig, TrainConfig
from alsace_dist.data.rows import Candidates, EncodedRow, Example
from alsace_dist.data.stream import micro_batches
from alsace_dist.errors import UserError
from alsace_dist.models.decoding import CandidateForm, Collator
from alsace_dist.models.family import WHOLE, TrainableModel
from alsace_dist.models.footprint import Activations, Kernels, PassShape
from alsace_dist.models.lora import LoraModel
from alsace_dist.models.mt5 import MT5, CandidateScorer, make_scorer
from alsace_dist.ranks.group import Ranks
from alsace_dist.training.budget import usual_rule
from alsace_dist.training.engine import TrainEngine, load_module
from alsace_dist.training.losses import FrozenTargetLoss

CANDIDATES = Candidates(((10,), (11,), (12,)))
FORM = CandidateForm.of([CANDIDATES], decoder_prefix=(0, 3), single_token=True, pad_id=0)
collate = Collator(FORM)
Runs = AbstractContextManager[Callable[[], Any]]  # within it, a function that does the work once


@dataclass(frozen=True)
class Size:
    """A model, as arguments of ``MT5Config``, and the work that is measured with it."""

    geometry: dict[str, int]
    section: TrainConfig
    median_length: int = 45
    num_rows: int = 3840  # a shard of 256 groups in 15 languages
    tokens_per_batch: int = 16384
    block_seconds: float = 4.0
    num_blocks: int = 3

    @property
    def config(self) -> MT5Config:
        """A new one each time: what builds a model writes into it."""
        return MT5Config(**self.geometry)


def _geometry(*values: int) -> dict[str, int]:
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    return dict(zip(names, values, strict=True))


_480 = partial(DistillConfig, num_steps=1, global_batch_size=480, learning_rate=1e-5)  # 32 in each of 15 languages
SIZES = {
    "tiny": Size(
        _geometry(500, 32, 8, 64, 4, 2, 1),
        DistillConfig(num_steps=1, global_batch_size=12, micro_batch_size=4, learning_rate=3e-3),
        *(10, 48, 256, 0.2, 2),
    ),
    "tiny, adapters": Size(
        _geometry(500, 32, 8, 64, 4, 2, 1),
        DistillConfig(num_steps=1, global_batch_size=12, micro_batch_size=4, learning_rate=3e-3, lora=LoraConfig()),
        *(10, 48, 256, 0.2, 2),
    ),
    "large": Size(_geometry(250112, 1024, 64, 2816, 16, 24, 24), _480(micro_batch_size=80)),
    "xl": Size(_geometry(250112, 2048, 64, 5120, 32, 24, 24), _480(micro_batch_size=32, freeze_vocabulary=True)),
    "xxl": Size(_geometry(250112, 4096, 64, 10240, 64, 24, 24), _480(micro_batch_size=16, lora=LoraConfig())),
}


@dataclass
class Row:
    """What was measured of one part: sequences per second of every block, and bytes, which are None without a GPU.

    ``plan_bytes``: of the states, as the plan has them; ``plan_activation_bytes``: what comes on top of them.
    """

    part: str
    settings: str
    num_sequences: int
    tokens_per_sequence: float
    flops_per_sequence: float
    plan_bytes: int
    rates: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    plan_activation_bytes: int = 0
    states_bytes: int | None = None
    collating_seconds: float | None = None

    def summary(self, peak: float | None) -> dict[str, float | None]:
        """Medians and ratios; ``peak``: FLOP/s of the device. MFU is the bare loop's where that ran alone."""
        rate, bare = (statistics.median(self.rates[name]) if name in self.rates else None for name in ("ours", "bare"))
        ratios = [a / b for a, b in zip(self.rates.get("ours", []), self.rates.get("bare", []), strict=False)]
        return {
            "sequences_per_second": rate,
            "tokens_per_second": rate and rate * self.tokens_per_sequence,
            "mfu": (rate or bare or 0.0) * self.flops_per_sequence / peak if peak else None,
            "bare_sequences_per_second": bare,
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_min": min(ratios, default=None),
            "ratio_max": max(ratios, default=None),
            "collating_share": rate and self.collating_seconds and self.collating_seconds * rate / self.num_sequences,
        }


# --- the model and its work ----------------------------------------------------------------------------------------


def encoded(ids: list[int]) -> EncodedRow:
    """A prompt with the three answers."""
    return EncodedRow("", "en", None, ids, CANDIDATES, 0, False)


def make_examples(size: Size, count: int) -> list[Example]:
    """Random prompts with XNLI's distribution of lengths, and random target distributions."""
    rng = np.random.default_rng(count)
    lengths = np.clip(rng.lognormal(math.log(size.median_length), 0.4, count).round().astype(int), 4, 256)
    targets = rng.dirichlet(np.ones(len(CANDIDATES)), count).astype(np.float32)
    ids = [rng.integers(3, size.geometry["vocab_size"], length).tolist() for length in lengths]
    return [Example(encoded(row), target, 1.0, 0.0) for row, target in zip(ids, targets, strict=True)]


def make_prompts(size: Size, count: int) -> list[EncodedRow]:
    """The prompts of ``make_examples``."""
    return [example.row for example in make_examples(size, count)]


def cut_step(lengths: Sequence[int], section: TrainConfig, device: torch.device) -> list[list[int]]:
    """Indices of the prompts in each micro-batch of a step."""
    return micro_batches(lengths, usual_rule(section, EngineConfig(), 1, device.type))


def split(examples: Sequence[Example], section: TrainConfig, device: torch.device) -> list[FrozenTargetLoss]:
    """The micro-batches of a step, as ``loop.run`` and ``TargetExamples`` make them."""
    cut = cut_step([len(one.row.input_ids) for one in examples], section, device)
    chosen = [[examples[index] for index in part] for part in cut]
    return [FrozenTargetLoss(collate([one.row for one in part]), part, device) for part in chosen]


def activations(size: Size, lengths: Sequence[int], batches: list[list[int]]) -> list[Activations]:
    """What the plan says that a bf16 pass over each batch keeps; ``batches``: indices of prompts of these lengths."""
    shapes = [
        PassShape(len(batch), max(lengths[one] for one in batch), 1, 2, len(FORM.vocabulary)) for batch in batches
    ]
    found = [MT5.activations(size.config, shape, 2, Kernels()) for shape in shapes]
    return [one for one in found if one is not None]


def make_row(part: str, size: Size, settings: str, plan_bytes: int, prompts: Sequence[EncodedRow], times: int) -> Row:
    """A row before its measurements; ``times``: FLOPs in forward passes.

    Raises ``UserError`` if the GPU has not even room for what the plan counts.
    """
    if torch.cuda.is_available() and plan_bytes > (total := torch.cuda.get_device_properties(0).total_memory):
        raise UserError(f"left out: it needs {plan_bytes / 1e9:.0f} GB, and the GPU has {total / 1e9:.0f} GB")
    lengths = [len(prompt.input_ids) for prompt in prompts]
    flops = times * MT5.forward_flops(size.config, lengths, len(FORM.decoder_prefix))
    return Row(part, settings, len(lengths), sum(lengths) / len(lengths), flops / len(lengths), plan_bytes)


class RandomWeights(TrainableModel):
    """A ``TrainableModel`` that no file holds: T5's initial values, made on ``device``, the same every time.

    Nothing is ``delicate``, as there is no file to compare with, and nothing is exported, so ``directory`` is nowhere.
    """

    directory = Path()
    config_changes: dict[str, Any] = {}
    vocabulary = MT5.vocabulary
    delicate: tuple[str, ...] = ()

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.parameters = MT5.count_parameters(size.config, len(FORM.vocabulary))
        with torch.device("meta"):
            self.shapes = {name: parameter.shape for name, parameter in self.build(0.0, False).named_parameters()}

    def build(self, dropout: float, gradient_checkpointing: bool) -> CandidateScorer:
        """The module, as the family builds it."""
        return make_scorer(self.size.config, FORM, dropout, gradient_checkpointing)

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """As in ``TrainableModel``, but on ``device``: on the CPU the billions of random numbers take minutes."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)[part]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        scale = 1.0 if name.endswith("shared.weight") else shape[-1] ** -0.5
        if name.endswith(".q.weight"):
            scale *= self.size.geometry["d_kv"] ** -0.5
        return torch.randn(shape, device=self.device, generator=generator).mul_(scale)[part]

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """As in ``TrainableModel``; there is no file whose names it would have to follow."""
        return {name: value}

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``: nothing beside the parameters."""
        return iter(())

    def trained(self, section: TrainConfig) -> TrainableModel:
        """What a training changes: this model, or adapters beside it."""
        return self if section.lora is None else LoraModel(self, section.lora, 0, "distill.lora")

    def load(self, config: EngineConfig, group: Ranks, section: TrainConfig | None = None) -> Any:
        """A module with these weights in the engine's precision, for a training or for scoring."""
        if section is None:
            return load_module(self, 0.0, config, group)
        module: Any = load_module(self.trained(section), 0.0, config, group)
        for name in self.vocabulary if section.freeze_vocabulary else ():
            module.get_parameter(name).requires_grad_(False)
        return module


# --- what is timed -------------------------------------------------------------------------------------------------


def log_probs(module: Any, rows: list[EncodedRow], batches: list[list[int]], device: torch.device) -> np.ndarray:
    """A pass over a shard, as ``score`` makes it: log-probabilities [rows, K]."""
    results = np.empty((len(rows), len(CANDIDATES)), dtype=np.float32)
    with torch.inference_mode():
        for batch in batches:
            results[batch] = module(*collate([rows[index] for index in batch]).to(device)).cpu().numpy()
    return results


def bare_scoring(module: Any, rows: list[EncodedRow], batches: list[list[int]], device: torch.device) -> Runs:
    """The same forwards over batches that lie on the device; nobody takes the results."""
    ready = [collate([rows[index] for index in batch]).to(device) for batch in batches]

    @torch.inference_mode()
    def run() -> None:
        for arguments in ready:
            module(*arguments)

    return nullcontext(run)


@contextmanager
def training(
    weights: RandomWeights,
    examples: list[Example],
    config: EngineConfig,
    section: TrainConfig,
    group: Ranks,
    row: Row | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """Optimizer steps on one global batch, as ``loop.run`` makes them but for reading shards and writing metrics.

    Yields a function that returns a step's summed loss. Into ``row`` goes the peak of a step without activations.
    """
    trained = TrainEngine(weights.load(config, group, section), config, section, group)
    try:
        trained.load_initial(weights.trained(section))
        if row and row.states_bytes is None:
            take_peak(group.device)
            shortest = min(examples, key=lambda example: len(example.row.input_ids))
            trained.step(split([shortest], section, group.device), section.learning_rate)
            row.states_bytes = take_peak(group.device)

        def run() -> Tensor:
            sums = trained.step(split(examples, section, group.device), section.learning_rate)
            group.any_rank(False)  # whether to stop, asked after every step
            return sums["loss"]

        yield run
    finally:
        trained.engine.destroy()


@contextmanager
def bare_training(
    weights: RandomWeights, examples: list[Example], config: EngineConfig, section: TrainConfig, group: Ranks
) -> Iterator[Callable[[], Tensor]]:
    """The same steps in plain PyTorch: float32 copies of the weights, float32 sums of gradients, fused AdamW."""
    config = config.model_copy(update={"zero_stage": 0})
    module = weights.load(config, group, section).train()
    losses = split(examples, section, group.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    copies = [parameter.detach().to(torch.float32, copy=True) for parameter in trained]
    sums: Any = [torch.zeros_like(copy) for copy in copies]
    for copy, total in zip(copies, sums, strict=True):
        copy.grad = total
    is_fused = group.device.type == "cuda"
    optimizer = torch.optim.AdamW(copies, section.learning_rate, weight_decay=section.weight_decay, fused=is_fused)

    def run() -> Tensor:
        torch._foreach_zero_(sums)
        summed = torch.zeros((), device=group.device)
        for loss_of in losses:
            loss = loss_of(module)["loss"]
            (loss / len(examples)).backward()
            torch._foreach_add_(sums, [parameter.grad for parameter in trained])
            module.zero_grad(set_to_none=True)
            summed += loss.detach()
        nn.utils.clip_grad_norm_(copies, section.max_gradient_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(trained, copies)
        return summed

    yield run


def take_peak(device: torch.device) -> int | None:
    """Wait for the device; most bytes in tensors since the last call, None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def release() -> None:
    """Give memory that nobody refers to any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def compare(
    row: Row,
    contestants: dict[str, Callable[[], Runs]],
    collating: Callable[[], Any],
    size: Size,
    device: torch.device,
    deadline: float,
) -> Row:
    """Time blocks of the contestants in turn into ``row``; after ``deadline`` (monotonic) no further round begins.

    ``collating``: makes the batches of one run, which is timed alone.
    """
    for _ in range(size.num_blocks):
        for name, opened in contestants.items():
            with opened() as run:
                for _ in range(2):  # warm-up
                    run()
                take_peak(device)
                start = time.perf_counter()
                num_runs = 0
                while num_runs == 0 or time.perf_counter() - start < size.block_seconds:
                    run()
                    num_runs += 1
                row.peak_bytes[name] = take_peak(device)
                seconds = time.perf_counter() - start
            row.rates.setdefault(name, []).append(num_runs * row.num_sequences / seconds)
            del run
            release()
        if time.monotonic() > deadline:
            break
    start = time.perf_counter()
    collating()
    row.collating_seconds = time.perf_counter() - start
    return row
