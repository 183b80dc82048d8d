"""T5's attention, its bias of positions made once a pass.

All layers of a stack share the first one's bias. transformers lays the mask over it in every layer, [batch, heads,
queries, keys], which that layer then keeps for the backward pass: a sixth of what mT5-XL keeps at 256 tokens. Here the
first layer does it for all. Attention to the prompt has no bias: there it makes one of zeros, and here is only a mask.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "masked_bias"
# PyTorch's memory-efficient kernel copies a bias whose rows do not begin at multiples of this many numbers.
ALIGNMENT = 8


def register() -> str:
    """Make this attention known to transformers. Returns its name in an ``MT5Config``, ``_attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def share_bias(body: Any) -> None:
    """Let the first layers of an ``MT5Model`` lay the mask over the bias that they make."""
    for stack in (body.encoder, body.decoder):
        first = stack.block[0].layer[0].SelfAttention
        first.__class__ = _masking(type(first))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor,
    **given: Any,
) -> tuple[Tensor, None]:
    """query: [batch, heads, queries, width]; key, value: [batch, heads, keys, width]; attention_mask: bool
    [batch, 1, 1, keys]; position_bias: that of ``_masked``, but for a decoder that looks at the prompt. Returns
    [batch, queries, heads, width], and None for the probabilities."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    reads_the_prompt = module.is_decoder and not module.is_causal
    mask = attention_mask if reads_the_prompt else position_bias
    if key.shape[2] == 1 and not reads_the_prompt:
        return _over_one(query, key, value, mask, given.get("dropout", 0.0)), None
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **given)
    return found


def _over_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention to a single position, which has all of it whatever queries and keys are: their gradient is exactly 0.

    PyTorch's kernels leave rounding errors instead where no bias is trained, which Adam makes whole steps of.
    """
    scores = query @ key.transpose(2, 3)
    shares = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (nn.functional.dropout(shares, dropout) @ value).transpose(1, 2)


def _masking(attention: Any) -> Any:
    """transformers' attention with a bias, of which ``compute_bias`` gives [batch or 1, heads, queries, keys]."""

    class Masking(attention):
        def forward(self, hidden_states: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
            self._mask = mask
            try:
                return super().forward(hidden_states, mask=mask, **given)
            finally:
                del self._mask

        def compute_bias(self, *given: Any, **named: Any) -> Tensor:
            return _masked(super().compute_bias(*given, **named), self._mask, self.is_causal)

    return Masking


def _masked(bias: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """A bias where a mask, or what comes before, lets look, and the lowest number elsewhere."""
    num_queries, num_keys = bias.shape[-2:]
    if mask is None and is_causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=bias.device).tril()
    if mask is not None:
        bias = torch.where(mask, bias, torch.finfo(bias.dtype).min)
    bias = bias.contiguous()  # the embedding's numbers come with the heads last
    missing = -num_keys % ALIGNMENT
    return nn.functional.pad(bias, (0, missing))[..., :num_keys] if missing else bias
