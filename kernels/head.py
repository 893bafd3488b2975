"""What a model's head, its last matrix, makes of final hidden states: logits, and the likeliest tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_VOCABULARY_AT_ONCE = 16_384
_LOGITS_AT_ONCE = 1 << 23
_LOGITS_AT_ONCE_CUDA = 1 << 26
"""256 MiB in FP32, beside an engine that has taken most of the card; rows enough for a product at full speed."""
_TILE = 128


class Projected(NamedTuple):
    """Logits that are not computed yet: final hidden states, and the head that makes logits of them."""

    hidden: Tensor
    """[T, H], any floating type."""
    head: Tensor
    """[V, H], any floating type."""


class Likeliest(NamedTuple):
    """The k likeliest tokens at each of T positions, what is left, and the token given; all on the CPU."""

    top: Tensor
    """Tokens, [T, k], int32, the likeliest first; of several as likely, the first in the vocabulary."""
    ln_top: Tensor
    """Their log-probabilities, [T, k], float32."""
    ln_rest: Tensor
    """ln of the probability of all others together, [T], float32; −inf where nothing is left."""
    ln_given: Tensor
    """ln of the given token's, [T], float32, which may be one of the likeliest or not."""


def fp32_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits in FP32, without an FP32 copy of the head.

    Args:
        hidden: final hidden states, [T, H].
        head: [V, H].

    Returns:
        [T, V], float32.
    """
    if head.is_cuda and hidden.dtype == head.dtype == torch.bfloat16:
        logits: Tensor = torch.mm(hidden, head.t(), out_dtype=torch.float32)  # products of BF16 are exact in FP32
        return logits
    logits = torch.empty(len(hidden), len(head), dtype=torch.float32, device=head.device)
    for begin in range(0, len(head), _VOCABULARY_AT_ONCE):
        part = slice(begin, begin + _VOCABULARY_AT_ONCE)
        logits[:, part] = hidden.float() @ head[part].float().t()
    return logits


def rows_at_once(count: int, vocabulary: int, *, is_cuda: bool) -> Iterator[slice]:
    """Runs of positions, so few that their logits may be held in FP32; one empty run of no positions."""
    rows = max(1, (_LOGITS_AT_ONCE_CUDA if is_cuda else _LOGITS_AT_ONCE) // max(1, vocabulary))
    if rows > _TILE:
        rows -= rows % _TILE  # whole tiles of the product
    for begin in range(0, max(1, count), rows):
        yield slice(begin, begin + rows)


def first_likeliest(logits: Tensor, k: int) -> Tensor:
    """The k likeliest tokens, the likeliest first; of several as likely, the first in the vocabulary.

    Args:
        logits: [T, V], without NaN.
        k: how many; all of them if there are fewer.

    Returns:
        [T, min(k, V)], int64.
    """
    k = min(k, logits.shape[-1])
    if not k or not len(logits):
        return torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    top = logits.topk(k, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(-1, top).sort(dim=-1, descending=True, stable=True)
    top = top.gather(-1, order)
    # Which of several as likely as the last is in, topk does not promise.
    open_rows = ((logits >= values[:, -1:]).sum(-1) > k).nonzero().squeeze(-1)
    for row in open_rows.tolist():
        top[row] = logits[row].sort(descending=True, stable=True).indices[:k]
    return top


def ln_others(logits: Tensor, top: Tensor, ln_whole: Tensor) -> Tensor:
    """ln of the probability of all tokens but some: from the others themselves, for 1 less nearly 1 has no digits.

    Args:
        logits: [T, V].
        top: the tokens that are left out, [T, k], int64.
        ln_whole: ln Σ exp(logits), [T].

    Returns:
        [T], −inf where nothing is left.
    """
    return logits.scatter(-1, top, -torch.inf).logsumexp(-1) - ln_whole


def likeliest(hidden: Tensor, head: Tensor, given: Tensor, k: int) -> Likeliest:
    """What is kept of distributions for whoever holds bounds against them without the head.

    Args:
        hidden: final hidden states, [T, H].
        head: [V, H].
        given: the token at each position, [T], int64.
        k: how many tokens; all of them if there are fewer.
    """
    parts = []
    for part in rows_at_once(len(hidden), len(head), is_cuda=head.is_cuda):
        logits = fp32_logits(hidden[part], head)
        whole = logits.logsumexp(-1, keepdim=True)
        top = first_likeliest(logits, k)
        own = logits.gather(-1, given[part].unsqueeze(-1)) - whole
        rest = ln_others(logits, top, whole.squeeze(-1))
        found = (top.int(), logits.gather(-1, top) - whole, rest, own.squeeze(-1))
        parts.append([column.cpu() for column in found])
    return Likeliest(*(torch.cat(column) for column in zip(*parts, strict=True)))
