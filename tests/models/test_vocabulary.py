"""Log-probabilities of tokens, a chunk of the vocabulary at a time, against the whole softmax: values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alsace_dist.models import vocabulary


@pytest.fixture(params=[7, 50, 64])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks that do not divide the 50 rows, that are all of them, that are more."""
    monkeypatch.setattr(vocabulary, "CHUNK_ROWS", request.param)
    return int(request.param)


def whole(
    hidden: Tensor, weight: Tensor, tokens: Tensor, places: Tensor | None, bias: Tensor | None, cap: float | None
) -> Tensor:
    logits = nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    log_probs = torch.log_softmax(logits, dim=-1)
    return log_probs[torch.arange(len(tokens)) if places is None else places, tokens]


def gradients(function: Callable[..., Tensor], tensors: list[Tensor | None], *others: object) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of them."""
    hidden, weight, bias = (None if one is None else one.detach().clone().requires_grad_() for one in tensors)
    tokens, places, cap = others
    values = function(hidden, weight, tokens, places, bias, cap)
    (values * torch.linspace(0.3, 1.7, values.numel()).view(values.shape)).sum().backward()
    return [values.detach(), *(one.grad for one in (hidden, weight, bias) if one is not None and one.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("has_places", [False, True])
def test_chunks_give_the_whole_softmax_and_its_gradient(
    chunk_rows: int, dtype: torch.dtype, cap: float | None, has_places: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(size, 12, generator=generator).to(dtype) for size in (9, 50))
    bias = torch.randn(50, generator=generator).to(dtype) if has_places else None
    if has_places:  # of each row of candidates, where its tokens stand; a token may be read at several places
        places = torch.randint(0, 9, (4, 3, 2), generator=generator)
        tokens = torch.randint(0, 50, (4, 3, 2), generator=generator)
    else:
        places, tokens = None, torch.randint(0, 50, (9,), generator=generator)
    found = gradients(vocabulary.token_log_probs, [hidden, weight, bias], tokens, places, cap)
    expected = gradients(whole, [hidden, weight, bias], tokens, places, cap)
    assert len(found) == len(expected) == (4 if has_places else 3)
    assert found[0].dtype == torch.float32 and found[0].shape == tokens.shape
    for one, other in zip(found, expected, strict=True):
        tolerance = 2e-6 if dtype == torch.float32 or one is found[0] else 2e-2  # gradients are rounded to bf16
        assert one.dtype == other.dtype
        assert float((one.float() - other.float()).abs().max()) <= tolerance * float(other.float().abs().max())


def test_no_tensor_of_the_whole_vocabulary_is_kept() -> None:
    """Of 60 positions and 40,000 pieces: 9.6 MB of logits alone, of which backward would keep several copies."""
    hidden, weight = torch.randn(60, 8, requires_grad=True), torch.randn(40_000, 8, requires_grad=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vocabulary.token_log_probs(hidden, weight, torch.arange(60)).sum().backward()
    assert max(kept) == weight.numel() < 60 * 40_000
