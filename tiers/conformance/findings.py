"""What the scores of a tier say, as a certificate states it and a report shows it. Plain data."""

import math
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from tiers.conformance.scores import Phase

FEWEST_PROMPTS = 6
"""With n prompts all lie on one side of their population's median once in 2ⁿ⁻¹ times. From 6 on that is less than
5%; with fewer, no interval inside the range of the prompts can hold the truth 95% of the time."""
LOWER_BOUNDS: Final = frozenset({"kl", "tv"})
"""The metrics of which only a lower bound is known where an engine gives no more than its likeliest tokens."""
WhyOpen = Literal["too close", "too few prompts", "lower bound"]
"""Why a judgement is inconclusive: the budget lies in its interval, there is no interval, or its figure is a lower
bound below the budget, above which the divergence itself may be."""


class Verdict(StrEnum):
    """How a metric, a phase or a tier stands towards its budget."""

    PASS = "PASS"  # noqa: S105  # no password
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


class _Plain(BaseModel):
    # Every figure is a number. Copies with other fields are checked again where they become part of another model.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always")


def _for_json(bound: float) -> float | str:
    # JSON has no infinity. Its name is read back as one, and JavaScript compares it as one: null it takes for 0.
    if math.isinf(bound):
        return "Infinity" if bound > 0 else "-Infinity"
    return bound


_End = Annotated[float, Field(allow_inf_nan=True), PlainSerializer(_for_json, when_used="json")]


class Estimate(_Plain):
    """A figure with its interval (95%; see `Findings.confidence`), from a bootstrap over prompts: unbounded when
    they are too few for one."""

    value: float
    low: Annotated[_End, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "-Infinity"}]})]
    high: Annotated[_End, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "Infinity"}]})]

    @model_validator(mode="after")
    def _has_ends(self) -> Self:
        # Of no number every comparison is false.
        if not (-math.inf <= self.low < math.inf and -math.inf < self.high <= math.inf):
            raise ValueError("an interval begins at a number or -Infinity and ends at a number or Infinity")
        return self

    @property
    def is_bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


class Tails(_Plain):
    """What a mean hides."""

    median: float
    p90: float
    p99: float
    p999: float
    max: float


class Metrics(_Plain):
    """Of some of the tokens: all, those of one kind of prompt, of one language, of some positions."""

    prompts: int
    tokens: int
    kl: Estimate
    """Mean KL(p ‖ q) per token, nats."""
    kl_tails: Tails
    tv: Estimate
    rejection: Estimate
    """1 − top-1 agreement, a share of tokens."""
    rms_delta_p: Estimate
    """Root mean square of q(t) − p(t)."""
    delta_nll: Estimate
    """Mean of ln p(t) − ln q(t), nats: above 0 the tier finds the reference's own text less likely."""
    perplexity: float
    """Of the tier, over the reference's answers."""
    perplexity_gap: Estimate
    """The tier's perplexity less the reference's."""


class Flips(_Plain):
    """Where one of the two is right and the other is not; right is to hold the reference's token likeliest."""

    right_to_wrong: int
    wrong_to_right: int
    p_value: float
    """McNemar's exact test: how likely a difference as large is when neither direction is favoured."""


class Judgement(_Plain):
    """One metric held against its budget."""

    metric: str
    """A field of `Metrics`: kl, rejection, perplexity_gap, …"""
    phase: Phase
    estimate: Estimate
    budget: float
    verdict: Verdict
    why_open: WhyOpen | None = None
    """Of an inconclusive one, and of no other."""
    further_prompts: int | None = None
    """Of an inconclusive one: about so many more would settle it; None when no number would."""

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if (self.why_open is None) == (self.verdict is Verdict.INCONCLUSIVE):
            raise ValueError("an inconclusive judgement says why, and no other does")
        return self


class WorstToken(_Plain):
    """One of the tokens where the two differ most, in its context."""

    prompt_id: str
    phase: Phase
    position: int
    before: str
    """The text that the token follows, its end."""
    token: str
    """The reference's."""
    top_q: str
    """The tier's likeliest."""
    kl: float
    ln_p: float
    ln_q: float


class NoiseFloor(_Plain):
    """The same figures of the reference against itself: whatever is not above them is not there."""

    overall: Metrics
    corpus: Metrics
    by_condition: dict[str, Metrics]
    """By what was other than when the reference answered: neighbours, cache, process. Each had its own prompts."""

    def judged(self, metric: str) -> Metrics:
        """As `PhaseFindings.judged`."""
        return self.corpus if metric == "perplexity_gap" else self.overall


class PhaseFindings(_Plain):
    """One phase."""

    overall: Metrics
    """Over the reference's answers."""
    corpus: Metrics
    """Over the passages of the fixed corpus, each in the place of a prompt."""
    flips: Flips
    by_kind: dict[str, Metrics]
    by_language: dict[str, Metrics]
    by_position: dict[str, Metrics]
    """By ranges of positions in the answer, such as 0–15, in their order."""
    noise_floor: NoiseFloor | None = None

    def judged(self, metric: str) -> Metrics:
        """Over what a budget limits this metric: the corpus for perplexity, the answers for all else."""
        return self.corpus if metric == "perplexity_gap" else self.overall


class Findings(_Plain):
    """A tier's."""

    exact: bool
    """Whether divergences are of the whole vocabulary; otherwise they are lower bounds."""
    phases: dict[Phase, PhaseFindings]
    judgements: list[Judgement]
    verdict: Verdict
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of each interval. More than 95% where it was looked at more than once, and would have stopped at the first
    verdict: 95% for all looks together."""
    worst: list[WorstToken] = Field(default_factory=list)
    seconds: float
    """How long the measurement took."""
