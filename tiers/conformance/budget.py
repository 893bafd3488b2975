"""How far a tier may be from the reference, and whether it is. Knows figures, not how they were measured."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from tiers.conformance.corpus import load_corpus
from tiers.conformance.findings import (
    FEWEST_PROMPTS,
    LOWER_BOUNDS,
    Estimate,
    Judgement,
    Metrics,
    PhaseFindings,
    Verdict,
    WhyOpen,
)
from tiers.conformance.scores import Phase
from tiers.tier import TierKind

_MOST_FURTHER_PROMPTS = 100_000


class Budget(BaseModel):
    """The limits of one tier, the same in both phases. A metric without one is measured and not judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kl: float | None = Field(default=None, gt=0, description="Most mean KL(p ‖ q) per token, in nats.")
    rejection: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Largest share of tokens at which the likeliest token is another than the reference's.",
    )
    perplexity_gap: float | None = Field(
        default=None,
        gt=0,
        description="By how much the tier's perplexity on the fixed corpus may exceed the reference's.",
    )

    @property
    def limits(self) -> dict[str, float]:
        """Those that there are, by metric."""
        return self.model_dump(exclude_none=True)


PUBLISHED: Mapping[TierKind, Budget] = {
    # Against Transformers, which computes the same numbers in another order.
    TierKind.REFERENCE: Budget(kl=0.002),
    TierKind.TURBO: Budget(kl=0.007, rejection=0.03, perplexity_gap=0.05),
    TierKind.LITE: Budget(kl=0.05, rejection=0.08, perplexity_gap=0.25),
}
"""The budgets of Llama 3.1's tiers. Turbo's are what providers call high quality (KL and rejection: Fireworks,
2024; perplexity: Together, 2024). Lite's leave room for a good INT4 recipe: llama.cpp reports a KL of 0.031 and a
rejection of 7.8% for q4_K_M."""


def judge(found: PhaseFindings, phase: Phase, budget: Budget, *, exact: bool = True) -> list[Judgement]:
    """Each metric that has a budget: PASS with its whole interval below it, FAIL with all of it above.

    Where divergences are not ``exact`` but lower bounds, one above its budget is a FAIL, and one below it says
    nothing. Rejection and perplexity are exact either way: an engine tells its likeliest token, and how likely the
    given one is.
    """
    return [
        _judge(metric, found.judged(metric), phase, limit, is_bound=not exact and metric in LOWER_BOUNDS)
        for metric, limit in budget
        if limit is not None
    ]


def overall(judgements: Sequence[Judgement]) -> Verdict:
    """One FAIL fails all, and only PASS of all is PASS. Nothing judged is nothing known."""
    verdicts = {each.verdict for each in judgements}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.INCONCLUSIVE


def _judge(metric: str, metrics: Metrics, phase: Phase, budget: float, *, is_bound: bool) -> Judgement:
    estimate: Estimate = getattr(metrics, metric)
    why_open: WhyOpen | None = None
    further = None
    if estimate.low > budget:
        verdict = Verdict.FAIL
    elif estimate.high < budget and not is_bound:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.INCONCLUSIVE
        if is_bound and estimate.value < budget:
            why_open = "lower bound"  # which more prompts do not change
        else:
            why_open = "too close" if estimate.is_bounded else "too few prompts"
            further = _further_prompts(estimate, metrics.prompts, budget)
            if metric == "perplexity_gap" and further and metrics.prompts + further > len(load_corpus()):
                further = None  # a passage comes with each prompt, as far as there are any
    return Judgement(
        metric=metric,
        phase=phase,
        estimate=estimate,
        budget=budget,
        verdict=verdict,
        why_open=why_open,
        further_prompts=further,
    )


def _further_prompts(estimate: Estimate, prompts: int, budget: float) -> int | None:
    """How many more until the interval's end on the budget's side reaches it, should the estimate stay.

    That end is at a distance that shrinks as 1/√n. The estimate will move, so with this many the odds are even
    that it is settled, and with four times as many nearly certain.
    """
    distance = abs(budget - estimate.value)
    reach = estimate.high - estimate.value if estimate.value < budget else estimate.value - estimate.low
    if not estimate.is_bounded:
        return FEWEST_PROMPTS - prompts
    if not distance or prompts * (reach / distance) ** 2 > prompts + _MOST_FURTHER_PROMPTS:
        return None
    return math.floor(prompts * (reach / distance) ** 2) - prompts + 1
