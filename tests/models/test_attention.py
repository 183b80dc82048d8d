"""mT5's attention with its bias made once, against transformers' own: values, gradients, and that it is once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MT5Config, MT5Model

from alsace_dist.models.attention import ALIGNMENT
from alsace_dist.models.batches import attention_over
from alsace_dist.models.mt5 import make_body

GEOMETRY = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
LENGTHS = (13, 1, 7)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and their mask, [3, 13], and what the decoder reads, [3, length]."""
    torch.manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(3, 50, mask.shape), mask.long(), torch.randint(3, 50, (len(LENGTHS), length))


def gradients(model: Any, mask: Tensor, ids: Tensor, decoder_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states, and the gradient of every parameter."""
    hidden = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).last_hidden_state
    torch.manual_seed(2)
    (hidden * torch.randn_like(hidden)).sum().backward()
    return hidden.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_values_and_gradients_are_those_of_transformers(length: int, saving: bool) -> None:
    theirs, ours = MT5Model(MT5Config(**GEOMETRY, dropout_rate=0.0)), make_body(MT5Config(**GEOMETRY), 0.0)
    for one in theirs.parameters():
        nn.init.normal_(one, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    if saving:
        ours.activation_checkpointing_enable({"use_reentrant": False})
        ours.train()
    ids, mask, decoder_ids = inputs(length)
    expected, plain = gradients(theirs, mask, ids, decoder_ids)
    found, own = gradients(ours, attention_over(mask), ids, decoder_ids)
    assert torch.allclose(found, expected, atol=1e-5)
    assert own.keys() == plain.keys() and any("relative_attention_bias" in name for name in own)
    for name, gradient in plain.items():
        assert torch.allclose(own[name], gradient, atol=2e-5, rtol=1e-4), name


def test_over_a_single_position_queries_and_keys_have_a_gradient_of_exactly_0() -> None:
    """Also where the bias is frozen, as beside adapters: PyTorch's kernels leave rounding there."""
    model = make_body(MT5Config(**GEOMETRY), 0.0)
    for name, one in model.named_parameters():
        nn.init.normal_(one, std=0.5)
        one.requires_grad_("relative_attention_bias" not in name)
    ids, mask, decoder_ids = inputs(1)
    _, found = gradients(model, attention_over(mask), ids, decoder_ids)
    attention = {name: one for name, one in found.items() if name.startswith("decoder") and "SelfAttention" in name}
    assert len(attention) == 3 * 4
    assert all((one == 0).all() == name.endswith(("q.weight", "k.weight")) for name, one in attention.items())


@pytest.mark.parametrize("length", [5, 8])
def test_all_layers_read_one_bias_in_rows_that_a_kernel_need_not_copy(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    seen: list[Tensor] = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
        seen.append(attn_mask)
        return attention(*tensors, attn_mask=attn_mask, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    ids, mask, decoder_ids = inputs(length)
    make_body(MT5Config(**GEOMETRY), 0.0)(
        input_ids=ids, attention_mask=attention_over(mask), decoder_input_ids=decoder_ids
    )
    encoder, decoder, prompt = seen[:3], seen[3::2], seen[4::2]
    assert [len(one) for one in (encoder, decoder, prompt)] == [3, 3, 3]
    for one in (encoder, decoder):
        assert len({mask.data_ptr() for mask in one}) == 1
        assert all(stride % ALIGNMENT == 0 for stride in one[0].stride()[:-1]) and one[0].stride(-1) == 1
    assert encoder[0].shape == (3, 2, 13, 13) and decoder[0].shape == (1, 2, length, length)
    assert all(one.dtype == torch.bool and one.shape == (3, 1, 1, 13) for one in prompt)
