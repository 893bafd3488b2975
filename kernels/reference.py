"""What each operator of a Llama 3.1 engine computes: its definition, in float64, to be read as mathematics.

Independent of every implementation that is held against it. Inputs are taken as they are given, in whatever
precision, and nothing is rounded between them and the result; what a number format does to values is an operator
of its own. T is tokens, H hidden width, F feed-forward width, D head width, S positions in a sequence, V
vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = w · x / √(mean(x²) + ε): [T, H] → [T, H].

    Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, eq. 4; ε under the root as in Transformers'
    ``LlamaRMSNorm``.
    """
    x = x.double()
    return weight.double() * x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual stream r' = x + r and its norm, both [T, H]: what stands between two parts of a block.

    Transformers' ``LlamaDecoderLayer.forward``.
    """
    total = x.double() + residual.double()
    return rms_norm(total, weight, epsilon), total


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 slows its rotations for contexts longer than it was first trained on; a config's fields."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(width: int, theta: float, scaling: Llama3Scaling | None = None) -> Tensor:
    """Radians a position of each pair of a head of this width: [D/2].

    fᵢ = θ^(−2i/D) (Su et al., RoFormer, 2021, section 3.2.2). With Llama 3.1's scaling the waves λ = 2π/f that are
    longer than L/low (L is the original context) are slowed by the factor, those shorter than L/high stay, and
    between the two f is the mean of both, weighted by s = (L/λ − low) / (high − low): ``apply_scaling`` of Meta's
    llama-models, ``_compute_llama3_parameters`` of Transformers.
    """
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary position embedding by halves: [T, heads, D] → [T, heads, D].

    Component i and component i + D/2 are a pair, turned by position · fᵢ: (a, b) → (a cos φ − b sin φ,
    b cos φ + a sin φ). RoFormer pairs neighbours instead (its eq. 34); Llama's weights in Hugging Face's layout
    are permuted for halves, ``rotate_half`` of Transformers.

    Args:
        x: queries or keys.
        positions: of the tokens, [T].
        frequencies: [D/2], radians a position.
    """
    angle = (positions.double()[:, None] * frequencies)[:, None, :]
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up with silu(g) = g / (1 + e⁻ᵍ): [T, 2F], gate before up → [T, F].

    Shazeer, GLU Variants Improve Transformer, 2020, eq. 6; Transformers' ``LlamaMLP``.
    """
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def paged(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """A sequence's keys or values from the blocks that hold them: [length, KV heads, D].

    Position s lies in row s mod N of block ``block_table[s // N]`` (Kwon et al., Efficient Memory Management for
    Large Language Model Serving with PagedAttention, 2023, section 4.1).

    Args:
        cache: [blocks, N, KV heads, D].
        block_table: the sequence's blocks in their order, [at least length / N].
        length: of the sequence.
    """
    at = torch.arange(length)
    return cache[block_table.long()[at // cache.shape[1]], at % cache.shape[1]]


@dataclass(frozen=True)
class Attended:
    """What attention gives, and what it was made of, by which its rounding is bounded."""

    output: Tensor
    """[T, heads, D]."""
    weights: Tensor
    """How much each token takes of each position: [heads, T, S], each row sums to 1."""
    keys: Tensor
    """Those of each query head, [S, heads, D]."""
    values: Tensor
    """Likewise."""


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Attended:
    """Causal grouped-query attention of one sequence's last T tokens over all of its S positions.

    o = softmax(scale · q Kᵀ + mask) V for each head (Vaswani et al., Attention Is All You Need, 2017, eq. 1),
    scale being 1/√D. Query heads share keys in groups of neighbours: head h reads KV head h // (heads / KV heads)
    (Ainslie et al., GQA, 2023; ``repeat_kv`` of Transformers). Token t stands at position S − T + t and sees those
    up to its own. T = S is prefill, T = 1 decode.

    Args:
        query: [T, heads, D].
        keys: [S, KV heads, D].
        values: [S, KV heads, D].
        scale: of the products.
    """
    tokens, heads, _ = query.shape
    length = len(keys)
    share = heads // keys.shape[1]
    every_key = keys.double().repeat_interleave(share, dim=1)
    every_value = values.double().repeat_interleave(share, dim=1)
    products = scale * torch.einsum("thd,shd->hts", query.double(), every_key)
    own = torch.arange(length - tokens, length)
    unseen = torch.arange(length) > own[:, None]
    weights = products.masked_fill(unseen, -torch.inf).softmax(-1)
    return Attended(torch.einsum("hts,shd->thd", weights, every_value), weights, every_key, every_value)


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Each token's row of the table: [T] and [V, H] → [T, H], in the table's precision."""
    return table[tokens.long()]
