"""From the scores of each unit to a table: what it costs, and what it saves. Plain data."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from tiers.conformance.findings import Estimate
from tiers.conformance.scores import Phase
from tiers.conformance.statistics import measure
from tiers.sensitivity.study import Measured
from tiers.sensitivity.units import By, FormatName, Unit


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Plain):
    """One unit in one phase."""

    unit: str
    phase: Phase
    is_of_both: bool
    """Whether the other phase computes every token alike, and was not measured."""
    kl: Estimate
    """Mean KL from the reference per token, nats, its interval a 95% bootstrap over prompts."""
    rejection: Estimate
    p99: float
    """Of the tokens' KL."""
    saves: int
    """Bytes of weights, from BF16."""
    saves_per_token: int
    """Bytes of KV cache."""

    @property
    def per_megabyte(self) -> float | None:
        """KL for each MB of weights that is saved; None where none is."""
        return self.kl.value / (self.saves / 1e6) if self.saves > 0 else None


class Step(_Plain):
    """What a level adds to the one before, prompt by prompt: narrower than the intervals of both."""

    unit: str
    after: str
    phase: Phase
    kl: Estimate
    """The mean difference."""

    @property
    def rises(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.kl.low > 0

    @property
    def is_same(self) -> bool:
        """Whether no token differs: what was added takes no part in this phase."""
        return self.kl.value == self.kl.low == self.kl.high == 0


class Findings(_Plain):
    """All that was measured of one model."""

    model: str
    checkpoint: str
    """The reference checkpoint's digest."""
    format: FormatName
    format_text: str
    by: By
    answers_by: str
    """Who answered: a reference pack, or Transformers."""
    prompts: int
    tokens: int
    rows: tuple[Row, ...]
    steps: tuple[Step, ...] = ()
    """Of levels."""


def rows_of(units: Sequence[Unit], measured: Measured) -> tuple[Row, ...]:
    """A row for each unit in each of its phases.

    Raises:
        ValueError: a score is not a finite number.
    """
    rows = []
    for unit in units:
        for phase in unit.phases:
            found = measure(measured[unit.name, phase])
            rows.append(
                Row(
                    unit=unit.name,
                    phase=phase,
                    is_of_both=len(unit.phases) == 1 and not unit.kv_cache and not unit.attention,
                    kl=found.kl,
                    rejection=found.rejection,
                    p99=found.kl_tails.p99,
                    saves=unit.saves,
                    saves_per_token=unit.saves_per_token,
                )
            )
    return tuple(rows)


def steps_of(units: Sequence[Unit], measured: Measured) -> tuple[Step, ...]:
    """What each unit adds to the one before it, over the same tokens, in each phase."""
    return tuple(
        Step(unit=unit.name, after=before.name, phase=phase, kl=_added(measured, before, unit, phase))
        for before, unit in pairwise(units)
        for phase in unit.phases
    )


def _added(measured: Measured, before: Unit, unit: Unit, phase: Phase) -> Estimate:
    scores, earlier = measured[unit.name, phase], measured[before.name, phase]
    # The same bootstrap as for any mean over tokens: of the differences.
    return measure(replace(scores, kl=scores.kl - earlier.kl)).kl
