"""Token ids as padded tensors on a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """A batch; the fields are the arguments of the module's ``forward``."""

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    answer_ids: Tensor

    def to(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arguments, on a device."""
        return to_device(device, self.input_ids, self.attention_mask, self.decoder_input_ids, self.answer_ids)

    @property
    def num_candidates(self) -> int:
        """K: most candidates of any row."""
        return self.answer_ids.shape[1]

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Encoder tokens: those that count, and all with padding."""
        return int(self.attention_mask.sum()), self.attention_mask.numel()


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on a device; the copy to an accelerator does not wait for its kernels."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one int64 tensor [rows, longest], filled up at the end."""
    # numpy fills the rows in, because a torch tensor per row takes seven times as long.
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
