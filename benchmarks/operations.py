"""What a pass of mT5 starts and moves on a GPU, counted on the meta device: assumptions of ``alsace plan``.

    python benchmarks/operations.py [--prompts=256] [--length=64]

For mT5-large, XL and XXL in bf16, forward and backward: operations per layer, those among them that run a kernel, and
bytes that kernels beside matrix products read and write. With RMSNorm in one kernel, as PyTorch has it on GPUs, and in
transformers' operations one by one; attention is one kernel in both. Nothing is computed, and no GPU is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import fire
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alsace_dist.models.decoding import CandidateForm
from alsace_dist.models.footprint import Kernels, PassShape
from alsace_dist.models.mt5 import MT5, make_scorer
from alsace_dist.plan.model import known_config, load_known

MODELS = ("google/mt5-large", "google/mt5-xl", "google/mt5-xxl")
FORM = CandidateForm(True, (5, 6, 7), (0, 4), 0, 3)
PRODUCTS = ("aten.mm.", "aten.bmm.", "aten.addmm.", "aten.baddbmm.")
WITHOUT_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift")


class Counter(TorchDispatchMode):
    """``operations`` that are called, ``kernels`` that are started; ``traffic``: bytes that kernels beside matrix
    products move."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.kernels = self.traffic = 0
        self._is_within_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_within_one:
            return result
        self.operations += 1
        if not (func.is_view or str(func).startswith(WITHOUT_KERNEL)):
            self.kernels += 1
            if not str(func).startswith(PRODUCTS):
                self.traffic += _bytes((args, kwargs, result))
        return result

    @contextmanager
    def one(self, moved: Any, kernels: int = 1) -> Iterator[None]:
        """What is done within is one kernel (or a few), which reads and writes these tensors."""
        self.operations += 1
        self.kernels += kernels
        self.traffic += _bytes(moved)
        self._is_within_one = True
        yield
        self._is_within_one = False


def _bytes(tree: Any) -> int:
    return sum(one.numel() * one.itemsize for one in tree_leaves(tree) if isinstance(one, Tensor))


def as_on_a_gpu(counter: Counter, one_norm: bool) -> Any:
    """Replaces attention, and norms if they are to be one kernel, by stand-ins of the same shapes."""

    class Norm(torch.autograd.Function):
        """Backward are two kernels: of the input, and of the weight."""

        @staticmethod
        def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
            context.save_for_backward(x, weight)
            with counter.one((x, x)):
                return torch.empty_like(x)

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = context.saved_tensors
            with counter.one((x, gradients[0], x, x, gradients[0]), kernels=2):
                return torch.empty_like(x), torch.empty_like(weight)

    class Attention(torch.autograd.Function):
        """Of queries, keys, values and a bias."""

        @staticmethod
        def forward(context: Any, *tensors: Tensor) -> Tensor:
            context.save_for_backward(*tensors)
            with counter.one((*tensors, tensors[0])):
                return torch.empty_like(tensors[0])

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            tensors: tuple[Tensor, ...] = context.saved_tensors
            with counter.one((*tensors, tensors[0], gradients[0], *tensors), kernels=2):
                return tuple(torch.empty_like(one) for one in tensors)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any) -> Any:
        return Attention.apply(query, key, value, attn_mask)

    def norm(self: nn.RMSNorm, x: Tensor) -> Any:
        if one_norm:
            return Norm.apply(x, self.weight)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale).to(x.dtype)

    return patch.multiple(nn.functional, scaled_dot_product_attention=attention), patch.object(
        nn.RMSNorm, "forward", norm
    )


def count(name: str, num_prompts: int, length: int, one_norm: bool) -> str:
    """A row of the table."""
    _, config = load_known(known_config(name) or {})
    with torch.device("meta"):
        module = make_scorer(config, FORM, 0.0, False).to(torch.bfloat16)
        ids = torch.full((num_prompts, length), 9)
        answers = torch.zeros(num_prompts, 2, dtype=torch.long), torch.zeros(num_prompts, 3, dtype=torch.long)
    counter = Counter()
    attention, norm = as_on_a_gpu(counter, one_norm)
    with attention, norm, counter:
        loss = module(ids, torch.ones_like(ids), *answers)[:, 0].sum()
        operations, kernels, traffic = counter.operations, counter.kernels, counter.traffic
        loss.backward()
    shape = PassShape(num_prompts, length, 1, 2, len(FORM.vocabulary))
    kept = MT5.activations(config, shape, 2, Kernels(norm="fused" if one_norm else "composite")).kept(False)
    layers = config.num_layers + config.num_decoder_layers
    cells = (
        f"{name.removeprefix('google/'):<10} {'fused' if one_norm else 'separate':<10}",
        f"{operations / layers:>8.0f} {(counter.operations - operations) / layers:>8.0f}",
        f"{kernels / layers:>8.0f} {(counter.kernels - kernels) / layers:>8.0f}",
        f"{traffic / 1e9:>8.0f} {(counter.traffic - traffic) / 1e9:>8.0f} {kept / 1e9:>8.0f}",
        f"{traffic / kept:>8.1f} {(counter.traffic - traffic) / kept:>8.1f}",
    )
    return " ".join(cells)


def main(prompts: int = 256, length: int = 64) -> None:
    """Count, and print the table."""
    pair = f"{'forward':>8} {'backward':>8}"
    heads = ("called in a layer", "kernels in a layer", "GB moved")
    print(f"{'':<21} {' '.join(f'{head:>17}' for head in heads)} {'GB':>8} {'moved per GB kept':>17}")
    print(f"{'model':<10} {'RMSNorm':<10} {pair} {pair} {pair} {'kept':>8} {pair}")
    for name in MODELS:
        for one_norm in (True, False):
            print(count(name, prompts, length, one_norm), flush=True)


if __name__ == "__main__":
    fire.Fire(main)
