"""Low-rank adapters (LoRA; Hu et al. 2022, section 4.1): of a model only they are trained, and they end in its weights.

A linear layer with weight W computes (W + alpha / rank B A) x, where A [rank, inputs] starts at random and B [outputs,
rank] at zero, so that training starts from the model itself. The layers are those of ``peft``; an exported model has W
+ alpha / rank B A in the place of W, and no trace of the adapters.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alsace_dist.config import LoraConfig
from alsace_dist.errors import UserError
from alsace_dist.files.manifest import digest_bytes
from alsace_dist.models.family import WHOLE, TrainableModel, Unit, linear_layers

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names A and B
BASE = ".base_layer."  # within the names of what an adapted layer had before


class LoraModel(TrainableModel):
    """A model with adapters beside its linear layers; all else is as it was, but for a head that may be new."""

    def __init__(self, model: TrainableModel, lora: LoraConfig, seed: int, key: str) -> None:
        """``seed``: of the adapters' initial values; ``key``: the setting, for errors.

        Raises ``UserError`` if peft is not installed, or the model has no layer of a name that the config gives.
        """
        try:
            import peft  # noqa: F401
        except ImportError:
            raise UserError(f"{key}: needs the package peft; pip install 'alsace_dist[lora]'") from None
        self.model, self.lora, self.seed = model, lora, seed
        self.directory: Path = model.directory
        self.config_changes: Mapping[str, Any] = model.config_changes
        self.vocabulary, self.delicate = model.vocabulary, model.delicate
        self.trained_whole = model.trained_whole
        with torch.device("meta"):
            layers = linear_layers(model.build(0.0, gradient_checkpointing=False))
        known = {name.rpartition(".")[2] for name in layers}
        if unknown := set(lora.modules or ()) - known:
            wrong, right = (", ".join(sorted(names)) for names in (unknown, known))
            raise UserError(f"{key}.modules: the model has no linear layer {wrong}; it has {right}")
        self.adapted = [name for name in layers if lora.adapts(name)]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora.alpha / self.lora.rank

    def build(self, dropout: float, gradient_checkpointing: bool) -> nn.Module:
        """As in ``TrainableModel``; only the adapters, and a head that is trained whole, require a gradient."""
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        module = self.model.build(dropout, gradient_checkpointing)
        settings = PeftConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=self.adapted,
            init_lora_weights=False,  # initial_value says how they start
        )
        inject_adapter_in_model(settings, module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self.trained_whole or name.endswith((DOWN, UP)))
        return module

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            module = self.build(0.0, gradient_checkpointing=False)
        return {name: tuple(value.shape) for name, value in module.named_parameters() if name.endswith((DOWN, UP))}

    def initial_value(self, name: str, part: slice = WHOLE) -> Tensor:
        """As in ``TrainableModel``: B is zero, A uniform as peft draws it (He et al. 2015 with a = sqrt(5)), from the
        seed and the layer's name, so alike on all ranks."""
        if name.endswith(UP):
            return torch.zeros(self._shapes[name])[part]
        if name.endswith(DOWN):
            generator = torch.Generator().manual_seed(int(digest_bytes(f"{self.seed}:{name}".encode())[:15], 16))
            bound = 1 / math.sqrt(self._shapes[name][1])
            return torch.empty(self._shapes[name]).uniform_(-bound, bound, generator=generator)[part]
        return self.model.initial_value(name.replace(BASE, "."), part)

    def units(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Unit]:
        """As in ``TrainableModel``: A and B of a layer make one weight, of outputs x inputs."""
        found = []
        for name, shape in shapes.items():
            if name.endswith(DOWN):
                up = name.removesuffix(DOWN) + UP
                found.append(Unit((name, up), shapes[up][0] * shape[1]))
            elif not name.endswith(UP):
                found.append(Unit((name,), math.prod(shape)))
        return found

    def merged(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As in ``TrainableModel``: a layer's weight with what its adapter has learnt, in float32."""
        first, *others = values
        if not others:
            return values
        base = first.removesuffix(DOWN) + ".weight"
        return {base: self.model.initial_value(base) + self.scale * (values[others[0]] @ values[first])}

    def exported(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """As in ``TrainableModel``."""
        return self.model.exported(name, value)

    def remaining(self, written: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As in ``TrainableModel``."""
        return self.model.remaining(written)
