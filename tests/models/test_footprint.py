"""What a pass keeps in memory, by formula, against every tensor that is alive in a real pass.

Operations are watched as they run: ``Meter`` counts the bytes of the storages that they make until these are freed,
which is what a GPU's max_memory_allocated counts. On the meta device tensors have no memory, so that even mT5-large is
measured in seconds; there PyTorch takes its fallback for attention, and on the CPU a fused kernel where no bias is
trained.
"""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MT5Config, XLMRobertaConfig, XLMRobertaXLConfig

from alsace_dist.models.decoding import CandidateForm
from alsace_dist.models.encoder import HeadScorer
from alsace_dist.models.footprint import Kernels, PassShape
from alsace_dist.models.mt5 import MT5, make_scorer
from alsace_dist.models.xlmr import XLMR

SMALL = {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6, "d_kv": 64}
# mT5-large, but for the number of its layers, which are all alike: 24 take ten seconds.
LARGE = {"d_model": 1024, "d_ff": 2816, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 16, "d_kv": 64}
NANO = {"d_model": 128, "d_ff": 256, "num_layers": 3, "num_decoder_layers": 1, "num_heads": 4, "d_kv": 32}
ENCODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
        for storage in (one.untyped_storage() for one in _tensors(result)):
            if storage._cdata not in read and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def measure(module: Any, device: str, dtype: torch.dtype, *arguments: torch.Tensor) -> tuple[int, int]:
    """Bytes at the end of the forward pass, and the most in both passes without the gradients of the weights."""

    def drop(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    module = module.to(dtype).to_empty(device=device).train()
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_("relative_attention_bias" not in name)  # on CPUs a trained one rules out the kernel
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
    with Meter() as meter:
        loss = -module(*arguments)[:, 0].sum()
        kept = meter.live
        loss.backward()
    return kept, meter.peak


def without_gpu(device: str) -> Kernels:
    """What PyTorch computes with on this device."""
    return Kernels("math" if device == "meta" else "fused", norm="composite")


def mt5(geometry: dict[str, int], device: str, dtype: torch.dtype, batch: int, saving: bool, single: bool) -> Any:
    config = MT5Config(vocab_size=1000, **geometry)
    with torch.device("meta"):
        module = make_scorer(config, CandidateForm(single, (5, 6, 7), (0, 4), 0, 3), 0.0, saving)
    ids, mask = torch.full((batch, 64), 9, device=device), torch.ones(batch, 64, dtype=torch.long, device=device)
    if single:
        answers = [torch.full((batch, 2), 4, device=device), torch.zeros(batch, 3, dtype=torch.long, device=device)]
    else:
        answer = torch.full((batch, 3, 4), 8)
        answers = [answer, answer, torch.arange(batch * 12)]
    shape = PassShape(batch, 64, 1, 2, 3) if single else PassShape(batch, 64, 3, 4, 1000)
    planned = MT5.activations(config, shape, dtype.itemsize, without_gpu(device))
    return measure(module, device, dtype, ids, mask, *answers), planned


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize(
    ("geometry", "device", "dtype", "batch", "single"),
    [
        (NANO, "cpu", torch.bfloat16, 4, True),
        (NANO, "cpu", torch.float32, 4, False),
        (SMALL, "meta", torch.float32, 8, True),
        (LARGE, "meta", torch.bfloat16, 80, True),
    ],
)
def test_mt5(geometry: dict[str, int], device: str, dtype: torch.dtype, batch: int, single: bool, saving: bool) -> None:
    (kept, peak), planned = mt5(geometry, device, dtype, batch, saving, single)
    assert planned.kept(saving) == pytest.approx(kept, rel=0.03)
    assert planned.peak(saving) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize(
    ("kind", "device", "dtype"),
    [
        (XLMRobertaConfig, "cpu", torch.float32),
        (XLMRobertaConfig, "meta", torch.bfloat16),
        (XLMRobertaXLConfig, "meta", torch.bfloat16),
    ],
)
def test_xlmr(kind: Any, device: str, dtype: torch.dtype, saving: bool) -> None:
    config = kind(vocab_size=1000, max_position_embeddings=66, type_vocab_size=1, **ENCODER)
    with torch.device("meta"):
        module = HeadScorer(config, 0.0, saving, 3, "first")
    ids = torch.full((8, 64), 9, device=device)
    kept, peak = measure(module, device, dtype, ids, torch.ones_like(ids))
    planned = XLMR.activations(config, PassShape(8, 64, 1, 1, 3), dtype.itemsize, without_gpu(device))
    assert planned is not None
    assert planned.kept(saving) == pytest.approx(kept, rel=0.05)
    assert planned.peak(saving) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("family", ["mt5", "xlmr"])
def test_the_gradients_of_the_embedding_are_what_a_short_pass_takes(family: str) -> None:
    ids = torch.full((1, 4), 9, device="meta")
    mask, two = torch.ones_like(ids), torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.device("meta"):
        if family == "mt5":
            config: Any = MT5Config(vocab_size=250112, **NANO)
            module: Any = make_scorer(config, CandidateForm(True, (5, 6), (0, 4), 0), 0.0, False)
        else:
            config = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=66, type_vocab_size=1, **ENCODER)
            module = HeadScorer(config, 0.0, False, 3, "first")
    _, peak = measure(module, "meta", torch.bfloat16, ids, mask, *([two, two] if family == "mt5" else []))
    activations = (MT5 if family == "mt5" else XLMR).activations(
        config, PassShape(1, 4, 1, 2, 2), 2, without_gpu("meta")
    )
    assert activations is not None
    assert activations.most(False, freeze_vocabulary=False) == pytest.approx(peak, rel=0.02)
    assert activations.most(False, freeze_vocabulary=True) < 0.1 * peak
