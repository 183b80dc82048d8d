"""Does torch.compile pay? Blocks of mT5 as they are in turns with the same blocks compiled, on a GPU or a CPU.

    python benchmarks/compiled.py [--size=small] [--layers=4] [--dtype=bf16] [--only=scoring]

Random weights in the true geometry but for the number of layers, lengths as in XNLI (benchmarks/gpu_work.py), the
project's own batches, losses and module; no DeepSpeed. Shown: seconds of a scoring pass and of forward and backward
passes, each as a ratio of neighbouring blocks (above 1: compiled is faster), the seconds that compiling took, the
largest difference of log-probabilities, and whether scores depend on the order in which shapes were met: then those of
another number of ranks would be others, in their last bits.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import gpu_work as work
import torch
from torch import nn

from alsace_dist.data.stream import score_batches

SMALL = work._geometry(250112, 512, 64, 1024, 6, 8, 8)
WORK = ("scoring", "training")  # without an optimizer
SIZES = {**work.SIZES, "small": replace(work.SIZES["large"], geometry=SMALL, num_rows=480)}


def main() -> None:
    """Parse the flags, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--layers", type=int, default=4, help="of the encoder and of the decoder")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--blocks", type=int, default=5, help="of each, that are timed")
    parser.add_argument("--only", choices=WORK, help="of what is timed")
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[flags.size]
    layers = {"num_layers": flags.layers, "num_decoder_layers": flags.layers}
    size = replace(size, geometry=size.geometry | layers)
    dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    plain, compiled = (make_module(size, dtype, device) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled)
    print(f"{flags.size} with {flags.layers} layers, {flags.dtype}, {device.type}", file=sys.stderr)
    prompts = work.make_prompts(size, size.num_rows)
    batches = score_batches([len(row.input_ids) for row in prompts], size.tokens_per_batch)
    examples = work.make_examples(size, size.section.micro_batch_size or 64)

    def scoring(module: nn.Module) -> Any:
        return work.log_probs(module, prompts, batches, device)

    def training(module: nn.Module) -> None:
        for loss in work.split(examples, size.section, device):
            loss(module)["loss"].backward()
        module.zero_grad(set_to_none=True)

    for what, run in zip(WORK, (scoring, training), strict=True):
        if flags.only not in (what, None):
            continue
        begin = time.perf_counter()
        found = run(compiled)
        seconds, plains, own = time.perf_counter() - begin, list[float](), list[float]()
        if found is not None:
            difference = abs(found - run(plain)).max()
            print(f"log-probabilities differ by {difference:.2g} at most")
            torch.compiler.reset()
            again = work.log_probs(compiled, prompts, batches[::-1], device)
            print(f"with the batches in the other order {(again != found).mean():.1%} of them are other numbers")
        run(plain)
        for _ in range(flags.blocks):
            plains.append(timed(partial(run, plain), device))
            own.append(timed(partial(run, compiled), device))
        ratios = [a / b for a, b in zip(plains, own, strict=True)]
        print(
            f"{what}: plain {median(plains):.2f} s, compiled {median(own):.2f} s, ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); the first pass took {seconds:.0f} s"
        )


def make_module(size: work.Size, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A scorer with weights of a sensible size."""
    module = work.make_scorer(size.config, work.FORM, 0.0, False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return module.to(device, dtype)


def compile_blocks(module: Any) -> None:
    """Compile each block in place, for any batch and length: names of parameters stay as they are."""
    for stack in (module.body.encoder, module.body.decoder):
        for block in stack.block:
            block.compile(dynamic=True)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the device's included."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
