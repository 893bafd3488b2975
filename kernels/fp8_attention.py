"""Causal attention of one sequence, exact or with its operands in FP8. PyTorch; knows no layers and no caches."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fakequant import Scales, Scheme, fake_quantize

PER_TENSOR = Scheme("fp8", "tensor")
"""Of queries, keys and values: a static scale each."""
_LARGEST_NUMERATOR = 256.0
"""The softmax's numerators are at most 1. FlashAttention-3 lifts them by 2⁸ before they become FP8, so that the
small ones keep their digits (``hopper/flash_fwd_kernel_sm90.h``: ``Max_offset``)."""


class OperandScales(NamedTuple):
    """Of what attention multiplies."""

    query: Scales
    key: Scales
    value: Scales


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(q kᵀ · scaling) v, where a query sees the keys up to its own.

    Args:
        query: of the last Q of T positions, [B, H, Q, D].
        key: [B, H / n, T, D], each for n neighbouring heads of queries.
        value: likewise.
        scaling: of the products, 1 / √D.

    Returns:
        [B, H, Q, D].
    """
    whole = query.shape[2] == key.shape[2]
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if whole else _visible(query, key),
        is_causal=whole,
        scale=scaling,
        enable_gqa=True,
    )


def attention_in_fp8(query: Tensor, key: Tensor, value: Tensor, scaling: float, scales: OperandScales) -> Tensor:
    """The same as FlashAttention-3 computes it in FP8: both products have FP8 operands and FP32 sums.

    Queries, keys and values are rounded with their scales, and so are the softmax's numerators,
    e^(s − max s) · 2⁸, while its denominator is summed before they are (arXiv 2407.08608, section 3.3; its
    rotations, "incoherent processing", are none of vLLM's). The kernel's maximum is that of the blocks it has
    seen, ours that of the whole row: some of its numerators are rounded at another place of their range.
    """
    q, k, v = (fake_quantize(each, PER_TENSOR, of) for each, of in zip((query, key, value), scales, strict=True))
    times = query.shape[1] // key.shape[1]
    k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    products = (q @ k.transpose(-1, -2) * scaling).masked_fill(~_visible(query, key), -torch.inf)
    numerators = (products - products.amax(-1, keepdim=True)).exp()
    rounded = (numerators * _LARGEST_NUMERATOR).to(torch.float8_e4m3fn).to(q.dtype) / _LARGEST_NUMERATOR
    out: Tensor = rounded @ v / numerators.sum(-1, keepdim=True)
    return out


def _visible(query: Tensor, key: Tensor) -> Tensor:
    """Which keys each query sees, [Q, T]."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
