"""Numbers on a coarser grid, computed in a finer one, with gradients that pass straight through the rounding.

The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432) takes the derivative of rounding to be 1, so
that gradient descent can move weights from one grid point to another.
"""

from typing import Any

import torch
from torch import Tensor

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP8_MANTISSA_BITS = 3
_FP8_LEAST_NORMAL = 2.0**-6


class _ThroughInteger(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _ThroughFp8(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        # Without the clamp what lies beyond the largest value becomes NaN.
        return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def to_integers(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest integers between ``low`` and ``high`` (which broadcast to x), in x's dtype."""
    rounded: Tensor = _ThroughInteger.apply(x, low, high)  # type: ignore[no-untyped-call]
    return rounded


def to_fp8(x: Tensor) -> Tensor:
    """The nearest values of FP8 E4M3, saturating at ±448, in x's dtype."""
    rounded: Tensor = _ThroughFp8.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def fp8_spacing(x: Tensor) -> Tensor:
    """The distance between neighbouring values of FP8 E4M3 around each x."""
    exponent = torch.log2(x.abs().clamp_min(_FP8_LEAST_NORMAL)).floor()
    return torch.exp2(exponent - _FP8_MANTISSA_BITS)


def fp8_per_token(x: Tensor) -> Tensor:
    """Activations as an FP8 engine sees them: rows of [..., K], each scaled by its largest magnitude, rounded."""
    scale = (x.detach().abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (to_fp8(x.float() / scale) * scale).to(x.dtype)
