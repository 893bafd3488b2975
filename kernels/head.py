"""What a model's head, its last matrix, makes of final hidden states: logits, and the likeliest tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

_VOCABULARY_AT_ONCE = 16_384
_ROWS_AT_ONCE = 256


class Likeliest(NamedTuple):
    """The k likeliest tokens at each of T positions, what is left, and the token given; all on the CPU."""

    top: Tensor
    """Tokens, [T, k], int32, the likeliest first."""
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


def likeliest(hidden: Tensor, head: Tensor, given: Tensor, k: int) -> Likeliest:
    """What is kept of distributions for whoever holds bounds against them without the head.

    Args:
        hidden: final hidden states, [T, H]; T is at least 1.
        head: [V, H].
        given: the token at each position, [T], int64.
        k: how many tokens; all of them if there are fewer.
    """
    parts = []
    for rows, tokens in zip(torch.split(hidden, _ROWS_AT_ONCE), torch.split(given, _ROWS_AT_ONCE), strict=True):
        logits = fp32_logits(rows, head)
        whole = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(-1, tokens.unsqueeze(-1)) - whole
        values, top = logits.topk(min(k, len(head)), dim=-1)
        # From the others themselves: 1 less nearly 1 has no digits left.
        others = logits.scatter_(-1, top, -torch.inf).logsumexp(-1)
        found = (top.int(), values - whole, others - whole.squeeze(-1), own.squeeze(-1))
        parts.append([column.cpu() for column in found])
    return Likeliest(*(torch.cat(column) for column in zip(*parts, strict=True)))
