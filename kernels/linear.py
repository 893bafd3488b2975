"""Linear layers as they are stored: what BF16, FP8 and INT4 weights mean, and what their products are, in float64.

T is tokens, K inputs, N outputs. Weights lie as checkpoints hold them, [N, K].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MOST = 448.0
"""The largest finite E4M3 number (Micikevicius et al., FP8 Formats for Deep Learning, 2022, table 1)."""
BLOCK = 128
"""Rows and columns of a block, and values of a token, that share a scale in block FP8."""
_INT4_OFFSET = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x Wᵀ: [T, K] and [N, K] → [T, N]. The head is one too: final hidden states → logits."""
    return x.double() @ weight.double().T


def to_fp8(x: Tensor) -> Tensor:
    """The E4M3 number nearest to each value, of two equally near ones the even; beyond 448 it is ±448.

    Four bits of significand, exponents from −6, below them steps of 2⁻⁹ (FP8 Formats, section 3).
    """
    x = x.double()
    exponent = torch.frexp(x.abs().clamp_min(2.0**-6)).exponent - 1
    step = torch.exp2((exponent - 3).double())
    return (torch.round(x / step) * step).clamp(-FP8_MOST, FP8_MOST)


def token_scales(x: Tensor) -> Tensor:
    """What FP8 values of each row are multiplied by, so that the largest is 448: [T, K] → [T, 1].

    The dynamic per-token scheme of compressed-tensors. A row of zeros has 1.
    """
    most = x.double().abs().amax(-1, keepdim=True)
    return torch.where(most > 0, most / FP8_MOST, 1.0)


def block_token_scales(x: Tensor) -> Tensor:
    """The same for each 128 values of a row: [T, K] → [T, K], each scale 128 times; 128 divides K."""
    grouped = x.reshape(-1, BLOCK)
    return token_scales(grouped).expand_as(grouped).reshape(x.shape)


def block_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Values of a weight in blocks: FP8 [N, K] and [N/128, K/128] → float64 [N, K].

    DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, section 3.3.2.
    """
    every = scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.double() * every[: weight.shape[0], : weight.shape[1]]


@dataclass(frozen=True)
class QuantizedInput:
    """A linear layer's input as FP8 means it, and where its rounding may go either way."""

    values: Tensor
    """[T, K]: E4M3 numbers times scales."""
    either: Tensor
    """[T, K]: 0 where rounding is certain, else the step between the two numbers that the value lies between."""


def quantized_input(x: Tensor, scales: Tensor, tolerance: float) -> QuantizedInput:
    """Round x / scale to E4M3.

    Args:
        x: [T, K].
        scales: [T, 1] or [T, K].
        tolerance: relative error that x / scale may have in an engine; a value that is as near as this to the
            middle between two E4M3 numbers may become either.
    """
    scaled = x.double() / scales
    low, high = to_fp8(scaled * (1 - tolerance)), to_fp8(scaled * (1 + tolerance))
    return QuantizedInput(to_fp8(scaled) * scales, (high - low).abs() * scales)


@dataclass(frozen=True)
class PackedInt4:
    """A layer as compressed-tensors' ``pack-quantized`` lays it on disk."""

    weight: Tensor
    """[N, K/8], int32: eight values a word along K, the first in the lowest four bits, each with 8 added."""
    scales: Tensor
    """[N, K/group], one for each group of neighbours along K."""
    zero_points: Tensor | None = None
    """[N/8, K/group], int32, packed alike along N; None for symmetric weights, whose zero is 0."""

    def values(self) -> Tensor:
        """w = (q − z) · s: [N, K], float64.

        Jacob et al., Quantization and Training of Neural Networks, 2018, eq. 1; the packing as
        ``unpack_from_int32`` of compressed-tensors undoes it.
        """
        numbers = unpack_int4(self.weight)
        group = numbers.shape[1] // self.scales.shape[1]
        zeros = 0 if self.zero_points is None else unpack_int4(self.zero_points.T).T.repeat_interleave(group, 1)
        return (numbers - zeros).double() * self.scales.double().repeat_interleave(group, 1)


def unpack_int4(words: Tensor) -> Tensor:
    """Numbers from −8 to 7 out of int32 words: [R, C] → [R, 8C], int64."""
    shifts = torch.arange(0, 32, 4)
    return (((words.long()[..., None] >> shifts) & 0xF) - _INT4_OFFSET).flatten(-2)
