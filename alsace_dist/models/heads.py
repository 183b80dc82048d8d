"""The heads of XLM-R that are trained on labels, as transformers keeps them in files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alsace_dist.config import Pooling

POOLING_KEY = "classifier_pooling"  # of config.json, under the name that ModernBERT's config has for it


@dataclass(frozen=True)
class HeadKind:
    """``name``: for people. ``model``: the end of its class's name in transformers. ``tensors``: part of our module ->
    what its tensors begin with in a checkpoint."""

    name: str
    model: str
    tensors: Mapping[str, str]

    def key(self, parameter: str) -> str:
        """Where a checkpoint keeps a parameter of the head, such as dense.weight."""
        part, _, kind = parameter.rpartition(".")
        return f"{self.tensors[part]}.{kind}"

    @property
    def outputs(self) -> str:
        """The matrix with a row for each output."""
        return self.key("out_proj.weight")


CLASSIFICATION = HeadKind(
    "classification head (classifier.*)",
    "ForSequenceClassification",
    {"dense": "classifier.dense", "out_proj": "classifier.out_proj"},
)
CHOICE = HeadKind(
    "multiple-choice head (classifier.*, roberta.pooler.*)",
    "ForMultipleChoice",
    {"dense": "roberta.pooler.dense", "out_proj": "classifier"},
)


def config_of_head(kind: HeadKind, family: str, labels: Sequence[str], pooling: Pooling) -> dict[str, Any]:
    """What config.json says of a model with such a head. ``family``: the beginning of its class's name."""
    changes: dict[str, Any] = {"architectures": [f"{family}{kind.model}"]}
    if kind is CLASSIFICATION:
        changes["id2label"] = {str(index): label for index, label in enumerate(labels)}
        changes["label2id"] = {label: index for index, label in enumerate(labels)}
    return changes | ({POOLING_KEY: "mean"} if pooling == "mean" else {})


def new_values(shapes: Mapping[str, tuple[int, ...]], deviation: float, seed: int) -> dict[str, Tensor]:
    """Initial values of a head's parameters, as transformers would draw them, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.zeros(shape) if name.endswith(".bias") else torch.randn(shape, generator=generator) * deviation
        for name, shape in shapes.items()
    }
