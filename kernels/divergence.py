"""How far one distribution over tokens is from another. Positions are rows.

One function, `compare`, for whatever there is to say of two distributions; beneath it one implementation for CPUs
(`kernels.divergence_cpu`) and one for NVIDIA GPUs (`kernels.divergence_triton`), held to the same definitions by
the same tests. `kernels/README.md` has these definitions, what accuracy is promised, and figures.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.figures import Figures
from kernels.head import Projected, first_likeliest, fp32_logits, ln_others, rows_at_once

_LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = 2.0**-20
"""Of probabilities that were added up in FP32."""


class Comparison(NamedTuple):
    """Two distributions at each of T positions; [T] but for the likeliest tokens.

    A row with NaN, with +inf, or with −inf alone is no distribution: its own figures, and those of both together,
    are NaN there, and its likeliest tokens −1. The other side's figures stand.
    """

    kl: Tensor
    """KL(p ‖ q), nats, never below 0; inf where q rules out (logit −inf) what p does not."""
    tv: Tensor
    """Total variation, ½ Σ |p − q|, from 0 to 1."""
    ln_p: Tensor
    """ln p of the given token."""
    ln_q: Tensor
    """ln q of it."""
    top_p: Tensor
    """The likeliest token under p, int64; of several as likely, the first."""
    top_q: Tensor
    """Under q."""
    entropy_p: Tensor
    """−Σ p ln p, nats."""
    entropy_q: Tensor
    """−Σ q ln q, nats."""
    likeliest: Tensor
    """The k likeliest tokens under p, [T, k], int64, the likeliest first; of several as likely, the first."""
    ln_p_likeliest: Tensor
    """ln p of them, [T, k]."""
    ln_q_likeliest: Tensor
    """ln q of them, [T, k]."""
    ln_p_rest: Tensor
    """ln of p of all other tokens together; −inf where nothing is left."""
    ln_q_rest: Tensor
    """ln of q of all other tokens together."""


def compare(p: Tensor | Projected, q_logits: Tensor, tokens: Tensor, k: int = 0) -> Comparison:
    """Everything that is asked about two distributions at each position, in FP32.

    The reference's T × V logits are never held whole where ``p`` is `Projected`: a run of rows at a time.

    Args:
        p: reference logits, [T, V], float32, bfloat16 or float16; or what they are made of.
        q_logits: tier logits, [T, V], likewise.
        tokens: the given token at each position, [T], integers.
        k: how many of the reference's likeliest tokens are wanted; all of them if there are fewer.

    Raises:
        ValueError: shapes, types or devices do not go together, or a given token is not in the vocabulary.
    """
    _check(p, q_logits, tokens, k)
    parts = []
    for part in rows_at_once(*q_logits.shape, is_cuda=q_logits.is_cuda):
        p_logits = fp32_logits(p.hidden[part], p.head) if isinstance(p, Projected) else p[part]
        parts.append(_compare(p_logits, q_logits[part], tokens[part].long(), k))
    return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))


def warm_up(device: torch.device | str) -> None:
    """Compile what `compare` needs there, for it takes seconds which no caller of an engine should wait for."""
    logits = torch.zeros(1, 2, device=device)
    for q_logits in (logits, logits.bfloat16()):
        compare(logits, q_logits, torch.zeros(1, dtype=torch.int64, device=device))


def _compare(p_logits: Tensor, q_logits: Tensor, tokens: Tensor, k: int) -> Comparison:
    figures = _figures(p_logits, q_logits, tokens)
    if not k:
        none, all_of_it = figures.kl.new_empty(len(tokens), 0), torch.zeros_like(figures.kl)
        return Comparison(*figures, none.long(), none, none, all_of_it, all_of_it)
    top = first_likeliest(p_logits.float(), k)
    columns = []
    no_p, no_q = figures.top_p < 0, figures.top_q < 0
    for logits, is_none in ((p_logits.float(), no_p), (q_logits.float(), no_p | no_q)):
        whole = logits.logsumexp(-1).masked_fill(is_none, torch.nan)
        columns.append((logits.gather(-1, top) - whole.unsqueeze(-1), ln_others(logits, top, whole)))
    (ln_p, ln_p_rest), (ln_q, ln_q_rest) = columns
    return Comparison(*figures, top.masked_fill(no_p.unsqueeze(-1), -1), ln_p, ln_q, ln_p_rest, ln_q_rest)


def _figures(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Figures:
    # Each loads a compiler, and one of them may not be there: Triton is where GPUs are.
    if q_logits.is_cuda:
        from kernels.divergence_triton import figures
    else:
        from kernels.divergence_cpu import figures
    return figures(p_logits, q_logits, tokens)


def _check(p: Tensor | Projected, q_logits: Tensor, tokens: Tensor, k: int) -> None:
    if isinstance(p, Projected):
        if p.hidden.ndim != 2 or p.head.ndim != 2 or p.hidden.shape[1] != p.head.shape[1]:
            raise ValueError(
                f"p has hidden states of shape {tuple(p.hidden.shape)} and a head of {tuple(p.head.shape)}; they "
                "must be [T, H] and [V, H]"
            )
        shape = torch.Size([len(p.hidden), len(p.head)])
    else:
        shape = p.shape
    given = {"p": p.hidden if isinstance(p, Projected) else p, "q": q_logits}
    if shape != q_logits.shape:
        raise ValueError(f"p has shape {tuple(shape)} and q {tuple(q_logits.shape)}; they must be equal")
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"logits have shape {tuple(shape)}; they must be [T, V] with at least one token")
    for name, each in given.items():
        if each.dtype not in _LOGITS:
            raise ValueError(f"{name} is {each.dtype}; it must be float32, bfloat16 or float16")
    if tokens.shape != shape[:1] or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(
            f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; they must be integers, [{shape[0]}]"
        )
    devices = {each.device for each in (*given.values(), tokens, *(p if isinstance(p, Projected) else ()))}
    if len(devices) > 1:
        raise ValueError(f"p, q and tokens are on {sorted(map(str, devices))}; they must be on one device")
    if k < 0:
        raise ValueError(f"k is {k}; it must be 0 or more")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < shape[1]:
        raise ValueError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())} are given; the vocabulary has {shape[1]}"
        )


def kl_lower_bound(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """A lower bound of KL(p ‖ q) per position, in nats, from some tokens' log-probabilities and the rest as one.

    Merging outcomes can only lower KL (the data-processing inequality; Cover & Thomas, Elements of
    Information Theory, 2nd ed., section 2.8), so this holds for whatever tokens are given.

    Args:
        p_logprobs: the reference's log-probabilities of k distinct tokens, [T, k]; −inf pads a short row.
        q_logprobs: the tier's of the same tokens, [T, k].

    Returns:
        [T], float64, never below 0.

    Raises:
        ValueError: the shapes differ.
    """
    if p_logprobs.shape != q_logprobs.shape:
        raise ValueError(
            f"p has shape {tuple(p_logprobs.shape)} and q {tuple(q_logprobs.shape)}; they must be equal"
        )
    # What rounding may have left of q's rest: a smaller one would make of it more than a lower bound.
    p, q = _with_rest(p_logprobs.double(), 0.0), _with_rest(q_logprobs.double(), _ROUNDING)
    terms = torch.where(p > 0, p * (p.log() - q.log()), 0.0)
    return terms.sum(-1).clamp_min(0)


def _with_rest(logprobs: Tensor, least: float) -> Tensor:
    """Probabilities with the remaining mass as a last column: [T, k] → [T, k + 1]."""
    probabilities = logprobs.exp()
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp_min(least)
    return torch.cat([probabilities, rest], dim=-1)
