"""How far one distribution over tokens is from another. PyTorch; positions are rows."""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_IN_CACHE = 4
_ROUNDING = 2.0**-20
"""Of probabilities that were added up in FP32."""


class Comparison(NamedTuple):
    """Two distributions at each of T positions; all [T]."""

    kl: Tensor
    """KL(p ‖ q), nats."""
    tv: Tensor
    """Total variation, ½ Σ |p − q|."""
    ln_p: Tensor
    """ln p of the given token."""
    ln_q: Tensor
    """ln q of it."""
    top_p: Tensor
    """The likeliest token under p; of several as likely, the first."""
    top_q: Tensor
    """Under q."""


def compare(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Comparison:
    """Everything that is asked about two distributions at each position.

    Args:
        p_logits: reference logits, [T, V], float32.
        q_logits: tier logits, [T, V], float32.
        tokens: the given token at each position, [T], int64.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(p_logits, q_logits)
    # A CPU's cache holds a few rows through all that is done with them: four to six times as fast.
    rows = max(1, len(p_logits)) if p_logits.is_cuda else _ROWS_IN_CACHE
    blocks = zip(*(torch.split(each, rows) for each in (p_logits, q_logits, tokens)), strict=True)
    return Comparison(*(torch.cat(column) for column in zip(*(_compare(*each) for each in blocks), strict=True)))


def _compare(p_logits: Tensor, q_logits: Tensor, tokens: Tensor) -> Comparison:
    ln_p, ln_q = torch.log_softmax(p_logits.float(), dim=-1), torch.log_softmax(q_logits.float(), dim=-1)
    p, given = ln_p.exp(), tokens.unsqueeze(-1)
    return Comparison(
        kl=_kl(p, q_logits.float() - p_logits.float()),
        tv=(p - ln_q.exp()).abs().sum(-1) / 2,
        ln_p=ln_p.gather(-1, given).squeeze(-1),
        ln_q=ln_q.gather(-1, given).squeeze(-1),
        top_p=_first_maximum(p_logits),
        top_q=_first_maximum(q_logits),
    )


def _first_maximum(logits: Tensor) -> Tensor:
    # argmax does not promise which of several it returns, and logits in BF16 tie often.
    return (logits == logits.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p ‖ q) per position, in nats.

    Args:
        p_logits: reference logits, [T, V].
        q_logits: tier logits, [T, V].

    Returns:
        [T], float32, never below 0.

    Raises:
        ValueError: the shapes differ.

    With d = q_logits − p_logits, KL = ln Σ p·eᵈ − Σ p·d: differences first, so that nearly equal
    distributions do not cancel.
    """
    _check_shapes(p_logits, q_logits)
    return _kl(torch.softmax(p_logits.float(), dim=-1), q_logits.float() - p_logits.float())


def _kl(p: Tensor, d: Tensor) -> Tensor:
    # Shifting d by a constant shifts both terms alike; its mean under p keeps e^d near 1.
    d = d - (p * d).sum(-1, keepdim=True)
    # What rounding left of that mean is taken off again: p does not sum to 1 exactly.
    return (torch.log1p((p * torch.expm1(d)).sum(-1)) - (p * d).sum(-1)).clamp_min(0)


def _check_shapes(p_logits: Tensor, q_logits: Tensor) -> None:
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"p has shape {tuple(p_logits.shape)} and q {tuple(q_logits.shape)}; they must be equal")


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
