"""Token ids as padded tensors on a device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
MOST_KEPT = 4096  # candidates whose tensors a collator keeps


@dataclass(frozen=True)
class Inputs:
    """A batch as the arguments of the module's ``forward``: prompts, and ``further`` tensors that a family has need of.

    ``input_ids``, ``attention_mask``: [sequences, length]. ``num_candidates``: K, most candidates of any row; 0 where
    the module scores none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    further: tuple[Tensor, ...] = ()
    num_candidates: int = 0

    def to(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arguments, on a device."""
        return to_device(device, self.input_ids, self.attention_mask, *self.further)

    def pinned(self, device: torch.device) -> "Inputs":
        """The same in memory from which an accelerator copies without waiting; to be called off the main thread."""
        if device.type == "cpu":
            return self
        ids, mask, *further = (tensor.pin_memory() for tensor in (self.input_ids, self.attention_mask, *self.further))
        return replace(self, input_ids=ids, attention_mask=mask, further=tuple(further))

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Encoder tokens: those that count, and all with padding."""
        return int(self.attention_mask.sum()), self.attention_mask.numel()


def attention_over(attention_mask: Tensor) -> Tensor:
    """[batch, length], 1 where a token stands -> bool [batch, 1, 1, length], which transformers uses unchanged.

    Of a mask of two dimensions transformers asks whether all are 1, for which the host would have to wait for an
    accelerator.
    """
    return attention_mask.bool()[:, None, None, :]


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on a device; the copy to an accelerator does not wait for its kernels."""
    if device.type == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a tensor to the host; a function that waits for the copy and returns it."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return copy.numpy()

    return wait


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one int64 tensor [rows, longest], filled up at the end."""
    # numpy fills the rows in, because a torch tensor per row takes seven times as long.
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def pad_prompts(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor of ids and one that is 1 where a token stands and 0 where padding does."""
    ids = pad(rows, pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def stack(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors of one rank as one, each filled up at its ends with ``value`` to the largest size."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    shape = np.max([tensor.shape for tensor in tensors], axis=0).tolist()
    whole = torch.full((len(tensors), *shape), value, dtype=tensors[0].dtype)
    for row, tensor in zip(whole, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


@dataclass(frozen=True)
class CandidateScore:
    """How the log-likelihoods of a candidate's tokens become its score.

    ``by_token``: their mean instead of their sum. ``less_context_free``: the second half of the rows are those of the
    first without context, and their scores are taken from the first's.
    """

    by_token: bool = False
    less_context_free: bool = False

    def log_probs(self, sums: Tensor, num_tokens: Tensor) -> Tensor:
        """float32 [rows, K] -> log-probabilities of the candidates, [rows, K] or half as many rows.

        ``sums``, ``num_tokens``: of the tokens of each candidate; -inf for a candidate without tokens, which its row
        lacks.
        """
        scores = sums / num_tokens.clamp(min=1) if self.by_token else sums
        lacks = num_tokens == 0
        if self.less_context_free:
            half = len(scores) // 2
            scores, lacks = scores[:half] - scores[half:], lacks[:half]
        return torch.log_softmax(scores.masked_fill(lacks, -torch.inf), dim=-1)


SUM = CandidateScore()
