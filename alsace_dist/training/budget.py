"""How large a micro-batch may be: found, or tried, by passes of the largest shape before the first step.

Too little memory shows there and not at some later step that holds the longest examples.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from alsace_dist.config import EngineConfig, TrainConfig
from alsace_dist.data.stream import PASS_COST, REDUCTION_COST, CutRule
from alsace_dist.errors import UserError
from alsace_dist.ranks.failures import asked_for, is_out_of_memory
from alsace_dist.training.engine import TrainEngine
from alsace_dist.training.settings import every_backward_is_collective

if TYPE_CHECKING:
    from alsace_dist.training.examples import Examples

# Without an accelerator more tokens a pass save little (data/stream.PASS_COST), and take memory.
CPU_TOKENS = 2048
SMALL_TOKENS = (1024, 4096)  # of the passes from which memory and time of larger passes are extrapolated
MEMORY_SHARE = 0.9  # of the accelerator's memory; the rest is for what fragments it and for NCCL


@dataclass(frozen=True)
class Measured:
    """A pass on an accelerator: encoder tokens, padding included; peak bytes; seconds."""

    tokens: int
    peak_bytes: int
    seconds: float


def fitting_tokens(small: Measured, large: Measured, memory_bytes: float) -> int:
    """Tokens of a pass at which the peak would be ``memory_bytes``: activations grow in proportion to the tokens.

    Rounded down to two significant binary digits after the first, so that a rerun on such a device finds the same.
    """
    per_token = max(1.0, (large.peak_bytes - small.peak_bytes) / (large.tokens - small.tokens))
    fitting = int(small.tokens + (memory_bytes - small.peak_bytes) / per_token)
    if fitting < 8:
        return max(1, fitting)
    grain = 1 << (fitting.bit_length() - 3)
    return fitting // grain * grain


def pass_cost(small: Measured, large: Measured) -> int:
    """Fixed overhead of a pass in tokens; a power of two, so that a rerun on such a device finds the same."""
    per_token = max(1e-9, (large.seconds - small.seconds) / (large.tokens - small.tokens))
    overhead = max(1.0, small.seconds / per_token - small.tokens)
    return int(2 ** round(math.log2(min(overhead, 2.0**20))))


class DryPasses:
    """Steps of a training, over copies of one example, before its state is loaded. Collective, as every step.

    ``most_examples``: of a micro-batch.
    """

    def __init__(self, examples: "Examples", example: Any, most_examples: int, engine: TrainEngine) -> None:
        self.examples, self.engine, self.most_examples = examples, engine, most_examples
        self.short, self.long = example, examples.stretched(example)
        self.longest = examples.length(self.long)

    def num_examples(self, example: Any, tokens: int) -> int:
        """How many copies of an example a micro-batch of so many tokens holds."""
        return max(1, min(self.most_examples, tokens // self.examples.length(example)))

    def step(self, example: Any, tokens: int, num_passes: int = 1) -> None:
        """A step of micro-batches of so many tokens, which updates no weight."""
        part = self.examples.collate([example] * self.num_examples(example, tokens))
        self.engine.step([part.sums] * num_passes, 0.0)

    def measure(self, tokens: int) -> Measured:
        """Of one pass on an accelerator: a step of two passes less a step of one, after one that warms up."""
        self.step(self.long, tokens)
        seconds = []
        for num_passes in (1, 2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            self.step(self.long, tokens, num_passes)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        size = self.num_examples(self.long, tokens) * self.longest
        return Measured(size, torch.cuda.max_memory_allocated(), seconds[1] - seconds[0])

    def try_largest(self, tokens: int) -> None:
        """Of the shapes that a micro-batch of so many tokens may have the longest, and one of more and shorter
        examples: each brings candidates of its own. Each rank has another example, and all take as many steps."""
        self.step(self.long, tokens)
        self.step(self.short, tokens)


def usual_rule(section: TrainConfig, settings: EngineConfig, world_size: int, device: str) -> CutRule:
    """How steps are cut where nothing is measured; ``device``: its type."""
    tokens = CPU_TOKENS if section.tokens_per_micro_batch == "auto" else section.tokens_per_micro_batch
    cost = PASS_COST[device]
    if every_backward_is_collective(settings) and world_size > 1:
        cost += REDUCTION_COST[device]
    return CutRule(tokens, section.micro_batch_size, cost)


def cut_rule(
    kind: str, section: TrainConfig, settings: EngineConfig, examples: "Examples", example: Any, engine: TrainEngine
) -> CutRule:
    """How a rank's share of a step is to be cut into micro-batches, after trying the largest. Collective.

    On an accelerator the budget of ``tokens_per_micro_batch: auto`` and the fixed cost of a pass are measured; on CPUs
    both are constants, so that a training's losses do not depend on the clock. The engine's state is as before the
    first step afterwards; the weights are to be loaded. Raises ``UserError`` that says what fits, if memory is short.
    """
    ranks = engine.ranks
    share = math.ceil(section.global_batch_size / ranks.world_size)
    most_examples = min(share, section.micro_batch_size or share)
    passes = DryPasses(examples, example, most_examples, engine)
    rule, fitting = usual_rule(section, settings, ranks.world_size, ranks.device.type), None
    if ranks.device.type == "cuda":
        small, large = (passes.measure(tokens) for tokens in SMALL_TOKENS)
        if large.tokens > small.tokens:  # else a rank's whole share of a step is small
            memory = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            fitting = round(-ranks.max(-fitting_tokens(small, large, MEMORY_SHARE * memory)))
            rule = replace(rule, pass_cost=round(ranks.max(pass_cost(small, large))))
            if section.tokens_per_micro_batch == "auto":
                rule = replace(rule, most_tokens=fitting)
    tokens = rule.most_tokens
    try:
        passes.try_largest(tokens)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_no_memory(kind, passes, tokens, fitting, asked_for(error), ranks.rank)) from error
    engine.forget_steps()
    return rule


def _no_memory(kind: str, passes: DryPasses, tokens: int, fitting: int | None, asked: str, rank: int) -> str:
    """What to read if there is no memory for the largest micro-batch; ``fitting``: tokens that should fit, if known."""
    tried = passes.num_examples(passes.long, tokens)
    if tried > 1:
        remedy = f"lower it: about {min(fitting, tokens // 2):,} should fit" if fitting else "lower it, to half or less"
    else:
        remedy = "lower max_tokens, for that is one example"
    return (
        f"{kind}.tokens_per_micro_batch: rank {rank} has no memory for a pass of {tried * passes.longest:,} tokens, "
        f"{tried:,} times {passes.longest:,}{asked}; {remedy}, or set engine.gradient_checkpointing, raise "
        "engine.zero_stage or take more ranks; `alsace plan` estimates the model's share"
    )
