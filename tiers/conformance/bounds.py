"""Lower bounds of divergence, from the likeliest tokens that a server tells of each position. Knows no HTTP.

The tokens that are known from both sides stay apart and all others become one outcome. Merging outcomes can only
lower KL and TV (the data-processing inequality; Cover & Thomas, Elements of Information Theory, 2nd ed., section
2.8), so what is left of them is a lower bound, whichever tokens these are. How likely a given token is, and which
is the likeliest, is told exactly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiers.conformance.pack import Likeliest
from tiers.conformance.scores import Scores

ROUNDING = 2.0**-20
"""How far, as a share of 1, told probabilities may be from what they are: sums in FP32, and digits."""
_MOST = 1.001
"""What probabilities that are told may add up to; those of several positions, or of logits, add up to more."""


def lower_bounds(
    number: int,
    answer: Sequence[int],
    likeliest: Likeliest,
    told: Mapping[int, Mapping[int, float]],
    otherwise: Mapping[int, float] | None = None,
) -> Scores:
    """What a server's word says of one answer: a row for each position that it tells of, KL and TV from below.

    Args:
        number: the answer's place in its pack.
        answer: the reference's tokens, [A].
        likeliest: the reference's likeliest tokens along them.
        told: by position, from 0, the server's ln q by token: its likeliest and, if it told, the given one.
        otherwise: by position, ln q of the given token where ``told`` lacks it. No bound rests on these.

    Raises:
        ValueError: a position tells of no token, or not how likely the given one is, or ln q is no logarithm of a
            probability, or they add up to more than 1.
    """
    rows = []
    for position in sorted(told):
        ln_q, given = told[position], answer[position]
        _check(ln_q)
        own = ln_q.get(given, (otherwise or {}).get(position))
        if own is None:
            raise ValueError(f"it does not tell how likely token {given} is")
        ln_p, p_rest = _known(likeliest, position, given, ln_q)
        kl, tv = _of_buckets(ln_p, np.array([ln_q[token] for token in ln_p]), p_rest)
        tokens = likeliest.tokens[position].tolist()
        rows.append(
            {
                "prompt": number,
                "position": position,
                "token": given,
                "kl": kl,
                "tv": tv,
                "ln_p": float(likeliest.ln_given[position]),
                "ln_q": min(0.0, own),
                "top_p": _first_maximum(dict(zip(tokens, likeliest.ln_p[position].tolist(), strict=True))),
                "top_q": _first_maximum(ln_q),
            }
        )
    names = rows[0] if rows else Scores.__dataclass_fields__
    return Scores.of({name: [row[name] for row in rows] for name in names})


def _check(ln_q: Mapping[int, float]) -> None:
    """Raises ValueError unless these can be the logarithms of a distribution's probabilities."""
    if not ln_q:
        raise ValueError("it tells of no token")
    if not all(math.isfinite(each) for each in ln_q.values()):
        raise ValueError("a log-probability is no finite number")
    # The largest first, for no exponential of a distribution's is too large to be computed.
    if max(ln_q.values()) > math.log(_MOST) or sum(map(math.exp, ln_q.values())) > _MOST:
        raise ValueError("its probabilities add up to more than 1")


def _known(
    likeliest: Likeliest, position: int, given: int, ln_q: Mapping[int, float]
) -> tuple[dict[int, float], float]:
    """ln p of each token that both sides tell of, and the reference's probability of all others."""
    ln_p = dict(
        zip(likeliest.tokens[position].tolist(), likeliest.ln_p[position].astype(float).tolist(), strict=True)
    )
    # What is left comes from the reference's own sum over the others: 1 less nearly 1 has no digits left.
    rest = math.exp(likeliest.ln_rest[position])
    if given not in ln_p and given in ln_q:
        ln_p[given] = float(likeliest.ln_given[position])
        rest = max(0.0, rest - math.exp(ln_p[given]))
    rest += sum(math.exp(each) for token, each in ln_p.items() if token not in ln_q)
    return {token: each for token, each in ln_p.items() if token in ln_q}, rest


def _of_buckets(ln_p: Mapping[int, float], ln_q: NDArray[np.float64], p_rest: float) -> tuple[float, float]:
    """KL and TV over the known tokens, in the order of ``ln_p``, and the rest.

    Of q no rest is told: it is what is missing to 1, of which rounding may leave anything. So each q is taken to
    be as large as rounding allows, where KL, and what p has more than q, are no larger than they are.
    """
    q_rest = max(0.0, 1 - float(np.exp(ln_q).sum())) + ROUNDING
    every_ln_p = np.array([*ln_p.values(), math.log(p_rest) if p_rest > 0 else -math.inf])
    every_ln_q = np.append(ln_q + math.log1p(ROUNDING), math.log(q_rest))
    p = np.exp(every_ln_p)
    # In logarithms: a q that is told may be too small to be a number.
    terms = np.multiply(p, every_ln_p - every_ln_q, out=np.zeros_like(p), where=p > 0)
    more = np.maximum(p - np.exp(every_ln_q), 0)
    return max(0.0, float(terms.sum())), min(1.0, float(more.sum()))


def _first_maximum(ln: Mapping[int, Any]) -> int:
    """The likeliest; of several as likely the first in the vocabulary, as `kernels.divergence` has it."""
    return min(ln, key=lambda token: (-ln[token], token))
