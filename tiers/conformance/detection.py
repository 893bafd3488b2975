"""Whether an engine is farther from the reference than it was: the test by which a self-test finds faults.

Both times it was walked along the same answers, so each answer is compared with itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiers.conformance.scores import Phase, Scores

ALPHA = 0.001
"""How likely a sound engine may be to be taken for a broken one, over all metrics, phases and looks together."""
MARGIN = 0.05
"""By how much, relative to what it was, a divergence may be larger: an engine computes a little differently with
other neighbours in its steps; the mean KL of an unbroken one moved by less than 1%."""
SLOPE_MARGIN = 0.003
"""By how much an engine may be more or less certain than it was, as a factor of its logits less 1."""
_LOOKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""After how many tokens of each answer the test is made."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """By what a difference was found, and after how much."""

    metric: str
    phase: Phase
    tokens: int
    """Compared until it was found; with all further ones it was found too."""
    p_value: float
    """Of all tokens, for this metric alone."""
    factor: float
    """How many times what it was, over all tokens; infinite if it was 0."""


@dataclass(frozen=True)
class _Compared:
    """One metric at every token, [T] each: what it was, what it is, and how far that is beyond the margin."""

    was: Floats
    now: Floats
    beyond: Floats


def detect(before: Mapping[Phase, Scores], now: Mapping[Phase, Scores]) -> Detection | None:
    """The earliest at which a metric shows that the engine is farther from the reference, by more than a margin.

    One-sided Wilcoxon tests over answers, whose tokens are not independent. `ALPHA` is shared by as many tests as
    there are (Bonferroni). The mean over tokens must be beyond the margin as well: it is what a budget limits.

    Args:
        before: the scores of each phase when nothing was wrong.
        now: those of the same answers.

    Raises:
        ValueError: they are not of the same tokens.
    """
    found = []
    compared = {phase: _compared(before[phase], now[phase]) for phase in before}
    looks = {phase: _looks(before[phase]) for phase in before}
    alpha = ALPHA / sum(len(compared[phase]) * len(looks[phase]) for phase in before)
    for phase, metrics in compared.items():
        for metric, each in metrics.items():
            p_values: list[float] = []
            for mask in reversed(looks[phase]):  # until one does not hold: what comes earlier was by chance
                p_values.append(_p_value(each.beyond[mask], before[phase].prompt[mask]))
                if p_values[-1] >= alpha:
                    break
                tokens = int(mask.sum())
            if p_values[0] < alpha and not each.beyond.mean() <= 0:  # also if it is no number
                found.append(Detection(metric, phase, tokens, p_values[0], _ratio(each)))
    return min(found, key=lambda each: (each.tokens, each.p_value), default=None)


def _looks(scores: Scores) -> list[NDArray[np.bool_]]:
    """Which tokens each look takes: more and more of every answer."""
    place = scores.position - scores.position.min()
    longest = int(place.max()) + 1
    return [place < most for most in (*(look for look in _LOOKS if look < longest), longest)]


def _compared(before: Scores, now: Scores) -> dict[str, _Compared]:
    if not all(
        np.array_equal(getattr(before, name), getattr(now, name)) for name in ("prompt", "position", "token")
    ):
        raise ValueError("the engine was not walked along the same answers as before")
    ours, theirs = _divergences(before), _divergences(now)
    found = {name: _Compared(was, theirs[name], theirs[name] - (1 + MARGIN) * was) for name, was in ours.items()}
    # With logits times c, ln q(t) changes by (c − 1)(ln q(t) − its mean under q), so by c − 1 for each nat that a
    # token is more likely than others: the slope of a line through 0. KL sees the square of c − 1.
    centred = before.ln_q - before.ln_q.mean()
    square, product = centred**2, centred * (now.ln_q - before.ln_q)
    found["sharper"] = _Compared(square, square + product, product - SLOPE_MARGIN * square)
    found["flatter"] = _Compared(square, square + product, -product - SLOPE_MARGIN * square)
    return found


def _divergences(scores: Scores) -> dict[str, Floats]:
    return {
        "kl": scores.kl,
        "tv": scores.tv,
        "rejection": (scores.top_p != scores.top_q).astype(np.float64),
        "delta_p": np.abs(np.exp(scores.ln_q) - np.exp(scores.ln_p)),
    }


def _ratio(compared: _Compared) -> float:
    was, now = compared.was.sum(), compared.now.sum()
    return float(now / was) if was and np.isfinite(now) else np.inf


def _p_value(beyond: Floats, prompt: NDArray[np.int32]) -> float:
    """Of answers that are as likely to be on one side of the margin as on the other."""
    from scipy.stats import wilcoxon  # half a second, and only a self-test needs it

    answers, row = np.unique(prompt, return_inverse=True)
    least = 2.0 ** -len(answers)
    means = np.bincount(row, beyond) / np.bincount(row)
    if not np.isfinite(means).all():
        return least  # what is no number is not near the reference
    if not (means > 0).any():
        return 1.0
    return max(float(wilcoxon(means, alternative="greater").pvalue), least)
