"""Divergence on CPUs, compiled by Numba: a thread takes a row, and walks the vocabulary in blocks.

PyTorch walks the vocabulary once for each operation and writes a matrix down each time; here a row is read, worked
on in vector registers and added up while it is in a core's cache. It is what `kernels.divergence_triton` does, in
three walks: maxima; Σ exp(x − max) of both sides; all that both normalisers are needed for. A block is added up in
FP32 by as many lanes as the processor has, and blocks in float64.

Rows with something in them that is not finite are few, and computed in float64 by the definitions.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.figures import Figures

_BLOCK = 1024
_f = np.float32
_LOG2_E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
_TO_INTEGER = _f(1.5 * 2**23)
"""Added and taken off again, it leaves the nearest integer."""
_LEAST = _f(-87)
"""e to this is as little as FP32 has with all its digits."""
_0, _1 = _f(0), _f(1)
_2, _6, _24, _120, _720, _5040 = (_f(1 / math.factorial(n)) for n in range(2, 8))
"""1 / 2!, 1 / 3! and so on."""
_NEAR = _f(0.25)

_ORDER_IS_FREE = {"reassoc", "contract", "nsz"}
"""What lets a sum be several lanes'; NaN and infinities stay what they are."""


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Numba's compiler; what it makes is kept on disk, where there is a place for it."""

    def compiled(function: Any) -> Any:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's may be written
            return njit(nogil=True, **options)(function)

    return compiled


@_compiled(fastmath={"contract"})
def _exp(x):
    """eˣ for x ≤ 0, within 2 units in the last place: 2ⁿ eʳ with |r| ≤ ½ ln 2 (Cody & Waite, 1980)."""
    x = max(x, _LEAST)  # NaN stays
    n = (x * _LOG2_E + _TO_INTEGER) - _TO_INTEGER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _5040
    series = series * r + _720
    series = series * r + _120
    series = series * r + _24
    series = series * r + _6
    series = series * r + _2
    series = series * r + _1
    series = series * r + _1
    return series * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@_compiled()
def _largest(x):
    """By integers in the order of the numbers, whose maximum is made of vector code; that of numbers is not."""
    bits = x.view(np.int32)
    most = np.int32(-(2**31))
    for i in range(bits.shape[0]):
        value = np.int32(bits[i] ^ (np.int32(bits[i] >> 31) & np.int32(0x7FFFFFFF)))
        most = max(most, value)
    return np.int32(most ^ (np.int32(most >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


@_compiled()
def _first_maximum(x):
    """The maximum and its first place; where there is NaN, anything at all."""
    most, at = x[0], 0
    for begin in range(0, x.shape[0], _BLOCK):
        greatest = _largest(x[begin : begin + _BLOCK])
        if greatest > most:
            most, at = greatest, begin
    while at < x.shape[0] - 1 and x[at] != most:
        at += 1
    return most, at


@_compiled(fastmath=_ORDER_IS_FREE, error_model="numpy")
def _exponentials(x, most, exponentials):
    """Fill in eᵃ; Σ eᵃ and Σ a eᵃ over a block, a = x − max."""
    whole = weighted = _0
    for i in range(x.shape[0]):
        a = x[i] - most
        e_a = _exp(a)
        exponentials[i] = e_a
        whole += e_a
        weighted += a * e_a
    return whole, weighted


@_compiled(fastmath={"contract"})
def _ln_ratio(x, y, most_p, most_q, shift):
    return ((y - most_q) - (x - most_p)) - shift


@_compiled(fastmath=_ORDER_IS_FREE, error_model="numpy")
def _differences(x, y, e_a, e_b, most_p, most_q, shift, one_p, one_q):
    """Over a block: KL, Σ |q − p|, Σ q − p, and Σ ± q by the sign of q − p."""
    kl = tv = off = leaning = _0
    for i in range(x.shape[0]):
        p, q = e_a[i] * one_p, e_b[i] * one_q
        e = _ln_ratio(x[i], y[i], most_p, most_q, shift)
        series = e * e * (_2 + e * (_6 + e * (_24 + e * (_120 + e * _720))))
        is_near = abs(e) < _NEAR
        change = p * (e + series) if is_near else q - p
        kl += p * series if is_near else (q - p) - p * e
        tv += abs(change)
        off += change
        leaning += q if change > _0 else (-q if change < _0 else _0)
    return kl, tv, off, leaning


@_compiled(error_model="numpy")
def _sums(x, exponentials):
    """Maximum, its place, and of all others, or nothing would be left of them beside 1, Σ eᵃ and Σ a eᵃ."""
    most, top = _first_maximum(x)
    exponentials[top] = _1
    rest, weighted = 0.0, 0.0
    for begin, end in ((0, top), (top + 1, x.shape[0])):
        for start in range(begin, end, _BLOCK):
            part = slice(start, min(start + _BLOCK, end))
            more = _exponentials(x[part], most, exponentials[part])
            rest += more[0]
            weighted += more[1]
    return most, top, rest, weighted


@_compiled(error_model="numpy")
def _row(x, y, token, e_a, e_b, numbers, tops):
    """One row: numbers are KL, TV, ln p, ln q, H(p), H(q); tops the likeliest tokens."""
    most_p, top_p, rest_p, weighted_a = _sums(x, e_a)
    most_q, top_q, rest_q, weighted_b = _sums(y, e_b)
    ln_sum_p, ln_sum_q = math.log1p(rest_p), math.log1p(rest_q)
    shift = np.float32(ln_sum_q - ln_sum_p)
    one_p, one_q = np.float32(1.0 / (1.0 + rest_p)), np.float32(1.0 / (1.0 + rest_q))
    kl, tv, off, leaning = 0.0, 0.0, 0.0, 0.0
    for begin in range(0, x.shape[0], _BLOCK):
        part = slice(begin, begin + _BLOCK)
        more = _differences(x[part], y[part], e_a[part], e_b[part], most_p, most_q, shift, one_p, one_q)
        kl += more[0]
        tv += more[1]
        off += more[2]
        leaning += more[3]
    # λ is off by δ = ln(1 + Σ q − p): KL has δ²/2 too much, TV the sum of ± q δ.
    kl, tv = kl - off * off / 2, (tv - off * leaning) / 2
    numbers[0] = 0.0 if kl < 0 else kl
    numbers[1] = 0.0 if tv < 0 else tv
    numbers[2] = np.float64(x[token] - most_p) - ln_sum_p
    numbers[3] = np.float64(y[token] - most_q) - ln_sum_q
    numbers[4] = ln_sum_p - weighted_a / (1.0 + rest_p)
    numbers[5] = ln_sum_q - weighted_b / (1.0 + rest_q)
    tops[0], tops[1] = top_p, top_q


@_compiled()
def _rows(p_logits, q_logits, tokens, numbers, tops, first, step):
    """Every so many rows, one after the other."""
    room = np.empty((2, p_logits.shape[1]), np.float32)
    for row in range(first, p_logits.shape[0], step):
        _row(p_logits[row], q_logits[row], tokens[row], room[0], room[1], numbers[row], tops[row])


@torch.no_grad()
def figures(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Figures:
    """Compare rows.

    Args:
        p_logits: [T, V], a floating type of at most 32 bits.
        q_logits: [T, V], likewise.
        tokens: [T], int64, from 0 to V − 1.
    """
    count = len(tokens)
    p_logits, q_logits = p_logits.float().contiguous(), q_logits.float().contiguous()
    numbers, tops = torch.empty(count, 6, dtype=torch.float64), torch.empty(count, 2, dtype=torch.int64)
    arrays = [each.numpy() for each in (p_logits, q_logits, tokens.contiguous(), numbers, tops)]
    threads = min(torch.get_num_threads(), count)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: _rows(*arrays, first, threads), range(threads)))
    elif threads:
        _rows(*arrays, 0, 1)
    for row in (~numbers.isfinite().all(-1)).nonzero().squeeze(-1).tolist():
        numbers[row], tops[row] = _defined(p_logits[row], q_logits[row], tokens[row])
    kl, tv, ln_p, ln_q, entropy_p, entropy_q = numbers.float().unbind(-1)
    return Figures(kl, tv, ln_p, ln_q, tops[:, 0], tops[:, 1], entropy_p, entropy_q)


def _defined(p_logits: Tensor, q_logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """One row in float64, by the definitions."""
    ln_p, top_p = _distribution(p_logits)
    ln_q, top_q = _distribution(q_logits)
    p, q = ln_p.exp(), ln_q.exp()
    # 0 · ln 0 is 0; and q need not be above 0 where p is not.
    terms = torch.where(ln_p == -torch.inf, 0.0, torch.where(ln_q == -torch.inf, torch.inf, p * (ln_p - ln_q)))
    kl = terms.sum().clamp_min(0) if min(top_p, top_q) >= 0 else torch.tensor(torch.nan)
    numbers = (kl, (p - q).abs().sum() / 2, ln_p[token], ln_q[token], _entropy(p, ln_p), _entropy(q, ln_q))
    return torch.stack([each.double() for each in numbers]), torch.tensor([top_p, top_q])


def _distribution(logits: Tensor) -> tuple[Tensor, int]:
    """ln p and the first of the likeliest; NaN and −1 of what is no distribution."""
    most, top = logits.max(-1)
    if not most.isfinite():
        return torch.full_like(logits, torch.nan, dtype=torch.float64), -1
    return logits.double().log_softmax(-1), int(top)


def _entropy(p: Tensor, ln_p: Tensor) -> Tensor:
    return -torch.where(ln_p == -torch.inf, 0.0, p * ln_p).sum()
