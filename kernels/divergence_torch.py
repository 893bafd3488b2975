"""Divergence on CPUs, in PyTorch: a few rows go through all that is done with them while they are in the cache.

With a = ln p − max ln p and b likewise of q, found as differences of logits so that nothing large cancels, and
λ = ln Σ eᵇ − ln Σ eᵃ, ln(q/p) is e = b − a − λ at each token. Where the distributions are far apart

    KL = −Σ p e,   TV = ½ Σ |q − p|.

Both lose digits where p and q are nearly equal, the first by an error of λ, the second by those of p and q. There
all is made of g = eᵉ − 1 instead. S = Σ p g, 0 but for rounding, is what λ is off by, and is taken off again:

    KL = ln(1 + S) − Σ p e,   TV = ½ Σ p |g − S| / (1 + S).

Rows for which this does not hold, above all those with something in them that is not finite, are few, and computed
in float64 by the definitions.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.figures import Figures

_VALUES_AT_ONCE = 1 << 18
"""Of a matrix, in each thread: seven of them are alive, which a core's share of the last cache should hold."""
_APART = 0.05
"""Nats of KL from which p and q may be told apart by their difference."""
_CLOSE = 1e-4
"""Nats of KL below which eᵉ − 1 has too few digits left if it is done in these words."""
_ROUNDING = 5e-8
"""Of S: as much as may be left in TV."""
_LOST = 1e-6
"""Of S, from which it is more than rounding: p is 0 in FP32 where q is not, and p g tells nothing of q there."""
_STRIP = 256
_LOG2_E = 1 / math.log(2)


class _Sums(NamedTuple):
    """What is left of some rows when they leave the cache; all [rows, 1]."""

    rest_p: Tensor
    """Σ eᵃ − 1: the others by themselves, or nothing is left of them beside 1."""
    rest_q: Tensor
    weighted_a: Tensor
    """Σ eᵃ a."""
    weighted_b: Tensor
    kl: Tensor
    tv: Tensor
    given_a: Tensor
    given_b: Tensor
    top_p: Tensor
    top_q: Tensor


@torch.no_grad()
def figures(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Figures:
    """Compare rows.

    Args:
        p_logits: [T, V], a floating type of at most 32 bits.
        q_logits: [T, V], likewise.
        tokens: [T], int64, from 0 to V − 1.
    """
    count, vocabulary = p_logits.shape
    rows = max(1, _VALUES_AT_ONCE // vocabulary)
    blocks = [slice(begin, begin + rows) for begin in range(0, max(1, count), rows)]
    threads = min(torch.get_num_threads(), len(blocks))

    def work(first: int) -> list[_Sums]:
        room = [torch.empty(min(rows, count), vocabulary) for _ in range(5)]
        with torch.no_grad():
            return [
                _summed(p_logits[part].float(), q_logits[part].float(), tokens[part].unsqueeze(-1), *room)
                for part in blocks[first::threads]
            ]

    shares = _side_by_side(work, threads)
    parts = [shares[number % threads][number // threads] for number in range(len(blocks))]
    found = _figures(_Sums(*(torch.cat(column) for column in zip(*parts, strict=True))))
    for row in (~found.kl.isfinite()).nonzero().squeeze(-1).tolist():  # one by one: they take eight times the room
        defined = _defined(p_logits[row].float(), q_logits[row].float(), tokens[row])
        for column, value in zip(found, defined, strict=True):
            column[row] = value
    return found


def _side_by_side(work: Callable[[int], list[_Sums]], threads: int) -> list[list[_Sums]]:
    """Each share in a thread of its own, whose operations are in no other.

    Of operations as short as these are here, which all threads begin and end together, most is waiting: where one
    thread does not get its core at once, and it is never sure to, all the others wait for it each time.
    """
    if threads == 1:
        return [work(0)]
    all_threads = torch.get_num_threads()
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread; and of all that are begun after it, until
        ready.wait()

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        shares = [pool.submit(work, number) for number in range(threads)]
        ready.wait()
        torch.set_num_threads(all_threads)  # here
        return [share.result() for share in shares]


def _figures(sums: _Sums) -> Figures:
    """Of rows in which everything is finite; else KL is not."""
    rest_p, rest_q, weighted_a, weighted_b, kl, tv, given_a, given_b, top_p, top_q = (
        each.squeeze(-1).double() if each.is_floating_point() else each.squeeze(-1) for each in sums
    )
    ln_sum_p, ln_sum_q = rest_p.log1p(), rest_q.log1p()
    return Figures(
        kl=kl.clamp_min(0).float(),
        tv=tv.float(),
        ln_p=(given_a - ln_sum_p).float(),
        ln_q=(given_b - ln_sum_q).float(),
        top_p=top_p,
        top_q=top_q,
        entropy_p=(ln_sum_p - weighted_a / (1 + rest_p)).float(),
        entropy_q=(ln_sum_q - weighted_b / (1 + rest_q)).float(),
    )


def _summed(
    p_logits: Tensor,
    q_logits: Tensor,
    given: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor,
    q: Tensor,
    spare: Tensor,
) -> _Sums:
    """Sums over the vocabulary. p and q are eᵃ and eᵇ here; the last five are room for what their names say."""
    a, b, p, q, spare = (each[: len(given)] for each in (a, b, p, q, spare))
    rest_p, top_p = _exponentials(p_logits, a, p)
    rest_q, top_q = _exponentials(q_logits, b, q)
    given_a, given_b = a.gather(-1, given), b.gather(-1, given)
    weighted_a, weighted_b = _dot(p, a, spare), _dot(q, b, spare)
    exact_shift = rest_q.log1p() - rest_p.log1p()
    shift = exact_shift.float()
    e = b.sub_(a).sub_(shift)
    sum_p = rest_p + 1
    mean_e = _dot(p, e, spare) / sum_p
    kl = (shift - exact_shift) - mean_e
    if (least := float(kl.min()) if len(kl) else 0.0) < _APART:
        off, tv = _near(p, e, sum_p, is_close=least < _CLOSE)
        kl = (off.log1p() - mean_e).masked_fill_(~(off.abs() < _LOST), torch.nan)
    else:
        tv = q.mul_((sum_p / (rest_q + 1)).float()).sub_(p).abs_().sum(-1, keepdim=True) / (2 * sum_p)
    return _Sums(rest_p, rest_q, weighted_a, weighted_b, kl, tv, given_a, given_b, top_p, top_q)


def _exponentials(logits: Tensor, centred: Tensor, exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in x = logits − max and eˣ; Σ eˣ − 1, [T, 1], float64, and where the first maximum is, [T, 1]."""
    most, top = _first_maximum(logits)
    torch.sub(logits, most, out=centred)
    # exp takes three times as long as exp2; what rounding x · log₂ e adds to eˣ is at most its own x · 2⁻²⁴.
    torch.mul(centred, _LOG2_E, out=exponentials).exp2_()
    exponentials.scatter_(-1, top, 0.0)
    rest = exponentials.sum(-1, keepdim=True, dtype=torch.float32).double()
    exponentials.scatter_(-1, top, 1.0)
    return rest, top


def _first_maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    # By strips, for max over a vocabulary takes ten times as long as amax. Of several it returns the first.
    vocabulary = logits.shape[-1]
    width = min(_STRIP, vocabulary)
    whole = vocabulary - vocabulary % width
    strips = logits.unfold(-1, width, width).amax(-1)
    if whole < vocabulary:
        strips = torch.cat([strips, logits[:, whole:].amax(-1, keepdim=True)], dim=-1)
    most, strip = strips.max(-1, keepdim=True)
    inside = (strip * width + torch.arange(width)).clamp_max_(vocabulary - 1)
    return most, inside.gather(-1, logits.gather(-1, inside).max(-1, keepdim=True).indices)


def _dot(weights: Tensor, values: Tensor, spare: Tensor) -> Tensor:
    # A product of vectors would add up in a few long chains; sum does so in a tree.
    return torch.mul(weights, values, out=spare).sum(-1, keepdim=True).double()


def _near(p: Tensor, e: Tensor, sum_p: Tensor, *, is_close: bool) -> tuple[Tensor, Tensor]:
    """S and TV, in place of e."""
    g = e.expm1_() if is_close else e.mul_(_LOG2_E).exp2_().sub_(1)
    change = g.mul_(p)
    off = change.sum(-1, keepdim=True).double() / sum_p
    if not (off.abs() < _ROUNDING).all():
        torch.addcmul(change, p, off.float(), value=-1, out=change)
    return off, change.abs_().sum(-1, keepdim=True) / (2 * sum_p * (1 + off))


def _defined(p_logits: Tensor, q_logits: Tensor, given: Tensor) -> Figures:
    """One row in float64, by the definitions."""
    ln_p, top_p = _distribution(p_logits)
    ln_q, top_q = _distribution(q_logits)
    p, q = ln_p.exp(), ln_q.exp()
    # 0 · ln 0 is 0; and q need not be above 0 where p is not.
    terms = torch.where(ln_p == -torch.inf, 0.0, torch.where(ln_q == -torch.inf, torch.inf, p * (ln_p - ln_q)))
    no_kl = torch.nan if ln_p.isnan().any() or ln_q.isnan().any() else 0.0
    return Figures(
        kl=(terms.sum() + no_kl).clamp_min(0),
        tv=(p - q).abs().sum() / 2,
        ln_p=ln_p[given],
        ln_q=ln_q[given],
        top_p=top_p,
        top_q=top_q,
        entropy_p=_entropy(p, ln_p),
        entropy_q=_entropy(q, ln_q),
    )


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln p and the first of the likeliest; NaN and −1 of what is no distribution."""
    most = logits.amax()
    if not most.isfinite():
        return torch.full_like(logits, torch.nan, dtype=torch.float64), torch.tensor(-1)
    return logits.double().log_softmax(-1), logits.max(-1).indices


def _entropy(p: Tensor, ln_p: Tensor) -> Tensor:
    return -torch.where(ln_p == -torch.inf, 0.0, p * ln_p).sum()
