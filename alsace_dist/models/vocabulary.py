"""Log-probabilities of single pieces of a large vocabulary, without the logits of all pieces in memory at once."""

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ROWS = 16_384  # pieces whose logits are in memory at a time: 64 kB a position, where 250,112 would take 1 MB


class _LogSumExp(torch.autograd.Function):
    """log sum_v exp(logit_v) of each position, a chunk of the vocabulary after the other; the backward pass computes
    the logits again. A plain product would keep logits, their exponentials and their gradient of the whole vocabulary,
    and a float32 copy of the whole weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.cap = cap
        states, total = hidden.float(), hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        for rows in _chunks(weight):
            total = torch.logaddexp(total, _logits(states, weight, bias, cap, rows).logsumexp(dim=-1))
        ctx.total = total
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        states = hidden.float()
        of_hidden = torch.zeros_like(states) if needs_hidden else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = torch.empty_like(bias) if needs_bias else None
        for rows in _chunks(weight):
            logits = _logits(states, weight, bias, ctx.cap, rows)
            of_logits = gradient[:, None] * torch.exp(logits - ctx.total[:, None])
            if ctx.cap is not None:
                of_logits *= 1 - (logits / ctx.cap) ** 2
            if of_hidden is not None:
                of_hidden += of_logits @ weight[rows].float()
            if of_weight is not None:
                of_weight[rows] = of_logits.T @ states
            if of_bias is not None:
                of_bias[rows] = of_logits.sum(dim=0)
        return (None if of_hidden is None else of_hidden.to(hidden.dtype)), of_weight, of_bias, None


def _chunks(weight: Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, len(weight), CHUNK_ROWS)]


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, rows: slice) -> Tensor:
    part = None if bias is None else bias[rows].float()
    return _capped(nn.functional.linear(states, weight[rows].float(), part), cap)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    places: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """float32 log-probabilities of tokens, in the shape of ``tokens``, under the softmax over the whole vocabulary.

    ``hidden``: [positions, width]; ``weight``: [vocabulary, width], ``bias``: [vocabulary], of the output head, in any
    float type; ``tokens``: ids; ``places``: in the shape of ``tokens``, the position that each is read at, by default
    one after the other. ``cap``: logits z become cap * tanh(z / cap), as in Gemma.
    """
    total = _LogSumExp.apply(hidden, weight, bias, cap)
    states = hidden if places is None else hidden[places]
    logits = (states.float() * nn.functional.embedding(tokens, weight).float()).sum(dim=-1)
    if bias is not None:
        logits = logits + bias[tokens].float()
    return _capped(logits, cap) - (total if places is None else total[places])
