"""What a forward pass keeps in memory for its backward pass: formulas, of the modules as transformers computes them.

Derivation: autograd keeps what the derivative of each operation reads, once for each tensor however many operations
read it. In an encoder-decoder, per token and layer, with w bytes per number (bf16: 2, fp32: 4), width d, H heads with
an inner width I in all, and feed-forward width f:

- RMSNorm computes in float32. On a GPU it is one kernel, which keeps its input (w d) and the 4 bytes of 1 / rms; its
  operations one by one, as on CPUs, keep a float32 copy of the input and the normed values: 8 d.
- A linear layer keeps its input: w d for queries, keys and values together, w d for the two gated matrices, w I for the
  attention's output, whose tensor a fused kernel keeps anyway.
- A fused attention kernel keeps queries, keys, values and output (4 w I), and the logarithm of the softmax's sum (4 H).
  PyTorch's fallback ("math") keeps float32 queries, keys and values (12 I), the softmax (4 H L for L keys) and the
  output (w I).
- The bias of positions with the mask over it (w H L) is kept once for all layers (models/attention.py).
- The gated feed-forward keeps the input and output of its activation, the other factor and the product: 4 w f.

So an encoder layer keeps 2 norms + 2 w d + attention + 4 w f a token. A decoder layer has another norm, another
input, and a cross-attention whose keys and values are as many as the prompt's tokens: 2 w I for each of these.

An encoder with LayerNorm keeps, before or after its attention and feed-forward alike, the input and the output of each
norm (4 w d, and mean and deviation), the attention (4 w d + 4 H, and a mask of w L), and 2 w f: the activation's input
and output.

The last gradient of a pass is that of the embedding, as large as the vocabulary, when all these are gone. Where encoder
and decoder read the same embedding there are three at once: each one's, and their sum.

With gradient checkpointing only what goes from layer to layer is kept (w d a token and layer), and one layer at a time
is computed again. Dropout is left out: it adds a mask of a byte where it is used.
"""

from dataclasses import dataclass
from typing import Any, Literal

from alsace_dist.models.vocabulary import CHUNK_ROWS


@dataclass(frozen=True)
class Kernels:
    """How PyTorch computes; what is not given, as on GPUs.

    ``attention``: its memory-efficient kernel, or what it falls back to on CPUs where a bias is trained. ``norm``:
    RMSNorm in one kernel, or its operations one by one, as on CPUs.
    """

    attention: Literal["fused", "math"] = "fused"
    norm: Literal["fused", "composite"] = "fused"


@dataclass(frozen=True)
class PassShape:
    """A forward pass over ``num_prompts`` prompts, padded to ``length`` tokens.

    ``num_sequences``: that the decoder reads for each of them, of ``num_positions`` tokens. ``num_head_rows``: rows of
    the output head that score.
    """

    num_prompts: int
    length: int
    num_sequences: int
    num_positions: int
    num_head_rows: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts, padding included."""
        return self.num_prompts * self.length

    @property
    def num_outputs(self) -> int:
        """Tokens that the decoder reads."""
        return self.num_prompts * self.num_sequences * self.num_positions


@dataclass(frozen=True)
class Activations:
    """Bytes, of ``num_layers`` layers. ``layers``: kept within all of them; ``largest_layer``: within the largest one;
    ``working``: gradients of its feed-forward while it goes backward; ``between``: what goes from layer to layer;
    ``ends``: embeddings, biases of positions, the last norms, the head; ``embedding``: gradients of the embedding;
    ``head``: what the head takes while it goes backward."""

    num_layers: int
    layers: int
    largest_layer: int
    working: int
    between: int
    ends: int
    embedding: int = 0
    head: int = 0

    def kept(self, gradient_checkpointing: bool) -> int:
        """Bytes at the end of a forward pass."""
        return self.ends + (self.between if gradient_checkpointing else self.layers)

    def most(self, gradient_checkpointing: bool, freeze_vocabulary: bool) -> int:
        """Most bytes in a pass: of activations, or of what the embedding's gradient is made from."""
        return max(self.peak(gradient_checkpointing), 0 if freeze_vocabulary else self.embedding)

    def peak(self, gradient_checkpointing: bool) -> int:
        """Most bytes in a forward and backward pass, but for the gradients of the weights.

        The last layer goes backward first, when all the layers before it still keep theirs; with gradient checkpointing
        what it keeps has to be computed again, and of its own tensors some are freed when its gradients come.
        """
        if gradient_checkpointing:
            return self.kept(True) + max(self.largest_layer + self.working // 2, self.head)
        return self.kept(False) + max(self.working, self.head)


def _attention(weight: int, inner: int, num_heads: int, num_keys: int, kernels: Kernels) -> int:
    """Per query, in attention to as many keys: queries, keys, values, output, and what the kernel keeps."""
    if kernels.attention == "fused":
        return 4 * weight * inner + 4 * num_heads
    return (12 + weight) * inner + 4 * num_heads * num_keys


def encoder_decoder(config: Any, shape: PassShape, weight_bytes: int, kernels: Kernels) -> Activations:
    """Of T5's module (RMSNorm, gated feed-forward, a bias of positions); ``weight_bytes``: per number."""
    weight, d, inner, heads = weight_bytes, config.d_model, config.num_heads * config.d_kv, config.num_heads
    norm = (weight if kernels.norm == "fused" else 8) * d + 4
    feed_forward = weight * d + 4 * weight * config.d_ff
    tokens, outputs = shape.num_tokens, shape.num_outputs
    read = tokens * shape.num_sequences  # prompts, repeated for every sequence of the decoder

    def self_attention(num_keys: int) -> int:
        return norm + weight * d + _attention(weight, inner, heads, num_keys, kernels)

    # Queries and output are of the decoder, keys and values of the prompts.
    keys_and_values = (2 * weight if kernels.attention == "fused" else 8) * inner
    both = _attention(weight, inner, heads, shape.length, kernels)
    cross = norm + weight * d + both - keys_and_values
    encoder = tokens * (self_attention(shape.length) + norm + feed_forward)
    decoder = outputs * (self_attention(shape.num_positions) + cross + norm + feed_forward) + read * keys_and_values
    ends = (tokens + outputs) * (norm + weight * d + 8) + _repeated(shape, weight * d) + _head(shape, d, weight)
    bias = weight * heads * (tokens * shape.length + outputs * shape.num_positions)
    return Activations(
        num_layers=config.num_layers + config.num_decoder_layers,
        layers=config.num_layers * encoder + config.num_decoder_layers * decoder,
        largest_layer=max(encoder, decoder),
        working=2 * weight * config.d_ff * tokens,
        between=weight * d * (config.num_layers * tokens + config.num_decoder_layers * outputs),
        ends=ends + bias,
        embedding=3 * weight * d * config.vocab_size,
        head=_head_backward(shape, d, weight),
    )


def _repeated(shape: PassShape, width_bytes: int) -> int:
    """Copies of the encoder's last hidden states: each sequence of the decoder reads one, the first counts as them."""
    return shape.num_tokens * (shape.num_sequences - 1) * width_bytes


def _head_backward(shape: PassShape, width: int, weight: int) -> int:
    """Of answers of several tokens: the whole head's gradient twice, of the vocabulary's sum and of the tokens' rows,
    and a chunk of logits and of their gradients."""
    if shape.num_sequences == 1:
        return 0
    return 2 * weight * shape.num_head_rows * width + 8 * shape.num_outputs * min(shape.num_head_rows, CHUNK_ROWS)


def _head(shape: PassShape, width: int, weight: int) -> int:
    """Float32 copies of hidden states and of the head's rows, and log-probabilities over the rows.

    Of answers of several tokens the states and the head's row of each token: the vocabulary goes by in chunks, of which
    nothing is kept.
    """
    if shape.num_sequences > 1:
        return shape.num_outputs * (8 if weight == 2 else 4) * width
    copy = 4 * shape.num_head_rows * width if weight == 2 else 0
    return copy + shape.num_outputs * 4 * (width + shape.num_head_rows)


def encoder(config: Any, shape: PassShape, weight_bytes: int, kernels: Kernels) -> Activations:
    """Of an encoder with LayerNorm, before its attention and feed-forward or behind them."""
    weight, d, heads, num_layers = (
        weight_bytes,
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
    )
    norms = 4 * weight * d + 16
    attention = _attention(weight, d, heads, shape.length, kernels)
    attention += weight * shape.length if kernels.attention == "fused" else 0
    layer = shape.num_tokens * (norms + attention + 2 * weight * config.intermediate_size)
    return Activations(
        num_layers=num_layers,
        layers=num_layers * layer,
        largest_layer=layer,
        working=weight * config.intermediate_size * shape.num_tokens,
        between=weight * d * num_layers * shape.num_tokens,
        ends=shape.num_tokens * (2 * weight * d + 32) + _head(shape, d, weight),
        embedding=weight * d * config.vocab_size,
    )
