"""Divergence on NVIDIA GPUs, in Triton: a program takes a row, and walks the vocabulary in blocks, twice.

The first walk finds, of both sides at once, maximum, first place of it and Σ exp(x − max), each lane of a block by
itself (online softmax: Milakov & Gimelshein, 2018, arXiv 1805.02867) and all lanes together at the end. Then both
normalisers are known, and the second walk sums up what is made of p, q and

    e = ln(q/p) = (y − max y) − (x − max x) − λ,   λ = ln Σ exp(y − max y) − ln Σ exp(x − max x)

    KL = Σ p (eᵉ − 1 − e),   TV = ½ Σ p |eᵉ − 1|,   H(p) = −Σ p ln p,   H(q) = −Σ q ln q.

No term of KL is below 0, and an error of λ counts by its square. In TV it counts once, so Σ p (eᵉ − 1), 0 but for
that error, is taken off again. Where |e| is not small p (eᵉ − 1) is q − p, and a series elsewhere.

The second walk goes backwards, for the end of the row is what the L2 cache still has; and there is one program
for each multiprocessor, for the same reason.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.figures import Figures

_BLOCK = 2048
_STAGES = 3
"""Blocks on their way from memory at once: one program has to keep a multiprocessor busy."""
_WARPS = 16
"""Four lanes of a block to a thread, whose numbers all stay in registers."""


_LOG2_E, _LN2_HIGH, _LN2_LOW = (tl.constexpr(x) for x in (1.4426950408889634, 0.693359375, -2.12194440e-4))
_LEAST = tl.constexpr(-87.0)
"""e to less than this is beyond the numbers that FP32 has with all their digits: 0."""


@triton.jit
def _exp(x):
    """eˣ for x ≤ 0: 2ⁿ eʳ with |r| ≤ ½ ln 2 (Cody & Waite, 1980).

    A GPU's own is 2 to the rounded x log₂ e, which at −80 is 30 units in the last place off.
    """
    n = tl.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _LEAST, 0.0, tl.exp(r) * power)  # NaN stays


@triton.jit
def _seen(most, rest, place, values, columns):
    """Lanes' maximum, Σ exp(x − max) − 1 and first place of the maximum, after one value more to each."""
    away = values - most
    is_more = away > 0
    scale = _exp(-tl.abs(away))
    rest = tl.where(is_more, (rest + 1.0) * scale, rest + scale)
    return tl.where(is_more, values, most), rest, tl.where(is_more, columns, place)


@triton.jit
def _together(most, rest, place, vocabulary):
    """Of all lanes: their maximum, its first place, and Σ exp(x − max) − 1 in float64."""
    # By max a lane of NaN would pass unseen; in the sum it is not.
    greatest = tl.max(most, 0)
    first = tl.min(tl.where(most == greatest, place, vocabulary), 0)
    weighted = tl.where(place == first, rest, (rest + 1.0) * _exp(most - greatest))
    return greatest, first, tl.sum(weighted, 0).to(tl.float64)


@triton.jit
def _row(
    p_logits,
    q_logits,
    given,
    numbers,
    tops,
    vocabulary,
    lowest: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """One row: numbers are KL, TV, ln p, ln q, H(p), H(q); tops the likeliest tokens."""
    lanes = tl.arange(0, block)
    most_p = tl.full([block], lowest, tl.float32)
    most_q = tl.full([block], lowest, tl.float32)
    rest_p = tl.full([block], -1.0, tl.float32)  # nothing yet, not even the maximum
    rest_q = tl.full([block], -1.0, tl.float32)
    place_p = lanes
    place_q = lanes
    for begin in tl.range(0, vocabulary, block, num_stages=stages):
        columns = begin + lanes
        inside = columns < vocabulary
        x = tl.load(p_logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.load(q_logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        most_p, rest_p, place_p = _seen(most_p, rest_p, place_p, x, columns)
        most_q, rest_q, place_q = _seen(most_q, rest_q, place_q, y, columns)
    max_p, top_p, others_p = _together(most_p, rest_p, place_p, vocabulary)
    max_q, top_q, others_q = _together(most_q, rest_q, place_q, vocabulary)
    sum_p, sum_q = 1.0 + others_p, 1.0 + others_q
    # Not so with NaN, with +inf, and where there is nothing else than −inf.
    is_p = (sum_p > 0) & (max_p < float("inf"))
    is_q = (sum_q > 0) & (max_q < float("inf"))
    ln_sum_p, ln_sum_q = tl.log(sum_p), tl.log(sum_q)
    shift = (ln_sum_q - ln_sum_p).to(tl.float32)
    ln_z_p, ln_z_q = ln_sum_p.to(tl.float32), ln_sum_q.to(tl.float32)
    one_p, one_q = (1.0 / sum_p).to(tl.float32), (1.0 / sum_q).to(tl.float32)

    kl = tl.zeros([block], tl.float32)
    tv = tl.zeros([block], tl.float32)
    off = tl.zeros([block], tl.float32)
    leaning = tl.zeros([block], tl.float32)
    entropy_p = tl.zeros([block], tl.float32)
    entropy_q = tl.zeros([block], tl.float32)
    blocks = tl.cdiv(vocabulary, block)
    for number in tl.range(0, blocks, num_stages=stages):
        columns = (blocks - 1 - number) * block + lanes
        inside = columns < vocabulary
        x = tl.load(p_logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.load(q_logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        a, b = x - max_p, y - max_q
        p, q = _exp(a) * one_p, _exp(b) * one_q
        e = (b - a) - shift
        p_e = tl.where(p > 0, p * e, 0.0)
        series = e * e * (0.5 + e * (1 / 6 + e * (1 / 24 + e * (1 / 120 + e * (1 / 720)))))
        is_near = tl.abs(e) < 0.25
        change = tl.where(is_near, p * (e + series), q - p)
        term = tl.where(is_near, p * series, (q - p) - p_e)
        term = tl.where((y == -float("inf")) & (x > -float("inf")), float("inf"), term)
        kl += tl.where(x == -float("inf"), q, term)
        tv += tl.abs(change)
        off += change
        leaning += tl.where(change > 0, q, tl.where(change < 0, -q, 0.0))
        entropy_p += tl.where(p > 0, p * (ln_z_p - a), 0.0)
        entropy_q += tl.where(q > 0, q * (ln_z_q - b), 0.0)

    nothing = float("nan")
    is_both = is_p & is_q
    all_off = tl.sum(off, 0).to(tl.float64)
    # Of λ's error δ = ln(1 + Σ p (eᵉ − 1)): KL has δ²/2 too much, TV the sum of ± q δ.
    total_kl = tl.maximum(tl.sum(kl, 0).to(tl.float64) - all_off * all_off / 2, 0.0)
    total_tv = tl.sum(tv, 0).to(tl.float64) - all_off * tl.sum(leaning, 0).to(tl.float64)
    tl.store(numbers, tl.where(is_both, total_kl, nothing).to(tl.float32))
    tl.store(numbers + 1, tl.where(is_both, tl.maximum(total_tv / 2, 0.0), nothing).to(tl.float32))
    token = tl.load(given)
    ln_p = tl.load(p_logits + token).to(tl.float32) - max_p
    ln_q = tl.load(q_logits + token).to(tl.float32) - max_q
    tl.store(numbers + 2, tl.where(is_p, ln_p - ln_sum_p, nothing).to(tl.float32))
    tl.store(numbers + 3, tl.where(is_q, ln_q - ln_sum_q, nothing).to(tl.float32))
    tl.store(numbers + 4, tl.where(is_p, tl.sum(entropy_p, 0), nothing))
    tl.store(numbers + 5, tl.where(is_q, tl.sum(entropy_q, 0), nothing))
    tl.store(tops, tl.where(is_p, top_p, -1).to(tl.int64))
    tl.store(tops + 1, tl.where(is_q, top_q, -1).to(tl.int64))


@triton.jit(do_not_specialize=["count"])  # else compiled anew for 1, for multiples of 16, and for others
def _rows(
    p_logits,
    q_logits,
    given,
    numbers,
    tops,
    count,
    vocabulary,
    p_stride,
    q_stride,
    lowest: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Every so many rows, one after the other."""
    for row in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):  # T × V is beyond 32 bits
        p_row, q_row = p_logits + row * p_stride, q_logits + row * q_stride
        _row(p_row, q_row, given + row, numbers + row * 6, tops + row * 2, vocabulary, lowest, block, stages)


def figures(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Figures:
    """Compare rows.

    Args:
        p_logits: [T, V], a floating type of at most 32 bits.
        q_logits: [T, V], likewise.
        tokens: [T], int64, from 0 to V − 1.
    """
    count, vocabulary = p_logits.shape
    p_logits, q_logits = (each if each.stride(-1) == 1 else each.contiguous() for each in (p_logits, q_logits))
    numbers = p_logits.new_empty((count, 6), dtype=torch.float32)
    tops = p_logits.new_empty((count, 2), dtype=torch.int64)
    if count:
        _rows[(min(count, _programs(p_logits)),)](
            p_logits,
            q_logits,
            tokens.contiguous(),
            numbers,
            tops,
            count,
            vocabulary,
            p_logits.stride(0),
            q_logits.stride(0),
            lowest=torch.finfo(torch.float32).min,
            block=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            stages=_STAGES,
            num_warps=_WARPS,
        )
    kl, tv, ln_p, ln_q, entropy_p, entropy_q = numbers.unbind(-1)
    return Figures(kl, tv, ln_p, ln_q, tops[:, 0], tops[:, 1], entropy_p, entropy_q)


def _programs(logits: Tensor) -> int:
    if not logits.is_cuda:  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(logits.device).multi_processor_count
