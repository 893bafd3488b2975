"""How far a computation may be from its definition by rounding alone.

An error has two bounds: how large it can be, and how large it is on average, if roundings are as likely up as down
and know nothing of each other (Higham & Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). u is
the unit roundoff of a precision of p bits, 2⁻ᵖ: 2⁻⁸ for BF16, 2⁻²⁴ for FP32 (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 2.1).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 9.0
"""λ: a sum of n roundings is beyond λ standard deviations once in 10¹⁷ sums."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, the most that rounding to nearest changes a number by, relative to it (Higham, theorem 2.2)."""
    return torch.finfo(dtype).eps / 2


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of this precision where x lies: 2^(⌊log₂|x|⌋ + 1 − p), float64.

    Not below that of the smallest normal number.
    """
    least = torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)
    exponent = torch.frexp(x.double().abs().maximum(least)).exponent - 1
    return torch.exp2(exponent.double()) * torch.finfo(dtype).eps


def ulp_in_its_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit that errors of an operator are told in: the ulp of the exact result, or of its row's root mean
    square where the result is smaller than that.

    A sum that nearly cancels is as wrong as its terms are, and in ulps of what is left it would be wrong without
    bound; relative to its row it is not. [..., N] → [..., N].
    """
    x = x.double()
    return ulp(x.abs().maximum(x.square().mean(-1, keepdim=True).sqrt()), dtype)


@dataclass(frozen=True)
class Allowance:
    """Absolute errors that rounding explains; add one for each place where it happens."""

    most: Tensor
    """At most, for each value."""
    spread: Tensor
    """Its standard deviation, or as much as ``most`` where many values share one rounding."""

    def __add__(self, other: "Allowance") -> "Allowance":
        """Errors add; those that know nothing of each other add as the sides of a right angle."""
        return Allowance(self.most + other.most, torch.hypot(self.spread, other.spread))


def nothing(like: Tensor) -> Allowance:
    """What copies, chooses or counts does not round."""
    return Allowance(torch.zeros_like(like.double()), torch.zeros_like(like.double()))


def rounded(magnitude: Tensor, dtype: torch.dtype, times: float = 1.0) -> Allowance:
    """So many roundings of values of this magnitude on the way: u · |x| each, evenly spread within that."""
    most = magnitude.double().abs() * unit_roundoff(dtype) * times
    return Allowance(most, most / math.sqrt(3))


def shared(most: Tensor) -> Allowance:
    """An error that many values have in common, so that it does not average out among them."""
    return Allowance(most.double(), most.double())


def accumulated(terms: int, total: Tensor, dtype: torch.dtype) -> Allowance:
    """A sum of so many products whose magnitudes sum to ``total``, added up in this precision in whatever order.

    γ̃ₙ(λ) · Σ|xᵢyᵢ| with γ̃ₙ(λ) = exp(λ√n u + n u² / (1 − u)) − 1 (Higham & Mary, theorem 3.1); the certain bound,
    γₙ = nu / (1 − nu) (Higham, eq. 3.5), where that is less.
    """
    u = unit_roundoff(dtype)
    likely = math.expm1(CONFIDENCE * math.sqrt(terms) * u + terms * u * u / (1 - u))
    certain = terms * u / (1 - terms * u) if terms * u < 1 else math.inf
    total = total.double()
    return Allowance(min(likely, certain) * total, min(math.sqrt(terms) * u, certain) * total)


def weighted(magnitudes: Tensor, squares: Tensor, dtype: torch.dtype) -> Allowance:
    """A sum whose terms each have been rounded once to this precision before: to Σ|tᵢ| and Σtᵢ² of the terms.

    At most u·Σ|tᵢ|, and but once in 10¹⁷ sums λ·u·√Σtᵢ² (Hoeffding's inequality).
    """
    u = unit_roundoff(dtype)
    root = squares.double().sqrt()
    most = (u * magnitudes.double()).minimum(CONFIDENCE * u * root)
    return Allowance(most, u / math.sqrt(3) * root)


def stored(exact: Tensor, before: Allowance, dtype: torch.dtype, *, few_bits: bool = False) -> Allowance:
    """The last rounding, to the precision in which the result is kept: half an ulp of what was computed.

    With ``few_bits`` the exact result has hardly more bits than fit, as a sum of two numbers has: often just one,
    and what is rounded off is half an ulp or nothing.
    """
    half = ulp(exact.double().abs() + before.most, dtype) / 2
    return before + Allowance(half, half / math.sqrt(2 if few_bits else 3))
