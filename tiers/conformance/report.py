"""The page on which a person reads certificates: one HTML file that asks for nothing else.

Says in words and figures what certificates state; pictures.py draws, report.html.jinja lays out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from tiers.conformance import pictures, wording
from tiers.conformance.certificate import Certificate
from tiers.conformance.findings import (
    FEWEST_PROMPTS,
    Estimate,
    Findings,
    Judgement,
    Metrics,
    NoiseFloor,
    PhaseFindings,
    Verdict,
)
from tiers.conformance.scores import PHASES, Phase, Scores

_SYMBOLS = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.INCONCLUSIVE: "?"}
_WORST = 10


@dataclass(frozen=True)
class Measured:
    """A tier's certificate and, where they were kept, the scores behind it, for what figures alone cannot show."""

    certificate: Certificate
    scores: Mapping[Phase, Scores] = field(default_factory=dict)
    noise: Mapping[Phase, Scores] = field(default_factory=dict)
    """Of the reference against itself."""


@dataclass(frozen=True)
class _Track:
    """A line to draw an estimate on: places in percent of its length; no ends where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None
    zero: float | None = None
    limit: float | None = None
    noise: float | None = None

    @classmethod
    def of(
        cls, estimate: Estimate, ends: tuple[float, float], limit: float | None = None, noise: float | None = None
    ) -> "_Track":
        def place(value: float) -> float:
            share = (value - ends[0]) / (ends[1] - ends[0])
            return round(100 * min(1, max(0, share)), 2)

        return cls(
            value=place(estimate.value),
            low=place(estimate.low) if estimate.is_bounded else None,
            high=place(estimate.high) if estimate.is_bounded else None,
            zero=place(0) if ends[0] < 0 else None,
            limit=None if limit is None else place(limit),
            noise=None if noise is None else place(noise),
        )


@dataclass(frozen=True)
class _Row:
    """A metric in a phase."""

    shown: wording.Shown
    estimate: Estimate
    noise: Estimate | None
    judgement: Judgement | None
    track: _Track


@dataclass(frozen=True)
class _Group:
    """Prompts of one kind or language: its KL divergence in each phase."""

    name: str
    prompts: int
    estimates: dict[Phase, Estimate]
    tracks: dict[Phase, _Track]

    @property
    def is_bounded(self) -> bool:
        """Whether each estimate has an interval."""
        return all(estimate.is_bounded for estimate in self.estimates.values())


@dataclass(frozen=True)
class _Section:
    """One tier on the page."""

    anchor: str
    certificate: Certificate
    findings: Findings
    headline: str
    explanation: list[str]
    rows: dict[Phase, list[_Row]]
    floors: dict[Phase, NoiseFloor]
    groups: dict[str, list[_Group]]
    spreads: dict[Phase, Markup]
    by_position: Markup
    by_prompt: Markup | None


def render_report(measured: Sequence[Measured]) -> str:
    """The page of one tier or several, in the order given.

    Raises:
        ValueError: there is none.
    """
    if not measured:
        raise ValueError("a report is of at least one certificate")
    return _template().render(
        sections=[_section(each, f"tier-{place}") for place, each in enumerate(measured, 1)],
        phases=PHASES,
        by_name=wording.BY_NAME,
        symbols=_SYMBOLS,
        worst=_WORST,
        fewest_prompts=FEWEST_PROMPTS,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # a token may be any text, <script> too
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": wording.number,
        "token": wording.token,
        "context": wording.context,
        "language": wording.language,
        "probability": wording.probability,
        "count": lambda value: f"{value:,}",
        "chance": wording.chance,
        "duration": wording.duration,
        "percent": wording.percent,
        "spoken": lambda name: name.replace("_", " "),
    }
    return environment.get_template("report.html.jinja")


def _section(measured: Measured, anchor: str) -> _Section:
    certificate = measured.certificate
    findings = _in_order(certificate.predicate.findings)
    tier = certificate.predicate.tier
    positions = {
        phase: {name: metrics.kl for name, metrics in found.by_position.items()}
        for phase, found in findings.phases.items()
    }
    return _Section(
        anchor=anchor,
        certificate=certificate,
        findings=findings,
        headline=wording.headline(certificate),
        explanation=wording.explanation(findings),
        rows={phase: _rows(findings, phase, found) for phase, found in findings.phases.items()},
        floors={phase: found.noise_floor for phase, found in findings.phases.items() if found.noise_floor},
        groups={
            "kind of prompt": _groups({phase: found.by_kind for phase, found in findings.phases.items()}),
            "language": _groups({phase: found.by_language for phase, found in findings.phases.items()}),
        },
        spreads={
            phase: pictures.spread(
                phase,
                scores,
                measured.noise.get(phase),
                certificate.predicate.budget.get(phase, {}).get("kl"),
                f"Histogram: how many tokens of {tier} have which KL divergence in {phase}",
            )
            for phase, scores in measured.scores.items()
            if phase in findings.phases
        },
        by_position=pictures.by_position(positions, f"KL divergence of {tier} by position in the answer"),
        by_prompt=pictures.by_prompt(
            measured.scores, f"KL divergence of {tier} in decode against prefill, a dot for each prompt"
        )
        if set(measured.scores) == set(PHASES)
        else None,
    )


def _in_order(findings: Findings) -> Findings:
    """With phases and positions as they follow each other: what was signed has its names sorted as text."""

    def start(of_range: str) -> int:
        digits = re.match(r"\d+", of_range)
        return int(digits.group()) if digits else 0

    phases = {}
    for phase in PHASES:
        if found := findings.phases.get(phase):
            positions = {name: found.by_position[name] for name in sorted(found.by_position, key=start)}
            phases[phase] = found.model_copy(update={"by_position": positions})
    return findings.model_copy(update={"phases": phases})


def _rows(findings: Findings, phase: Phase, found: PhaseFindings) -> list[_Row]:
    judged = {each.metric: each for each in findings.judgements if each.phase == phase}
    rows = []
    for shown in wording.METRICS:
        estimate: Estimate = getattr(found.judged(shown.name), shown.name)
        floor = found.noise_floor.judged(shown.name) if found.noise_floor else None
        noise: Estimate | None = getattr(floor, shown.name) if floor else None
        judgement = judged.get(shown.name)
        limit = judgement.budget if judgement else None
        # One scale for both phases, so that one may look from one to the other.
        ends = _ends(
            [
                getattr(measured.judged(shown.name), shown.name)
                for each in findings.phases.values()
                for measured in (each, each.noise_floor)
                if measured
            ],
            [each.budget for each in findings.judgements if each.metric == shown.name],
        )
        track = _Track.of(estimate, ends, limit, noise.value if noise else None)
        rows.append(_Row(shown=shown, estimate=estimate, noise=noise, judgement=judgement, track=track))
    return rows


def _groups(phases: Mapping[Phase, Mapping[str, Metrics]]) -> list[_Group]:
    """Those that differ most first."""
    ends = _ends([metrics.kl for groups in phases.values() for metrics in groups.values()], [])
    names = dict.fromkeys(name for groups in phases.values() for name in groups)
    made = []
    for name in names:
        found = {phase: groups[name] for phase, groups in phases.items() if name in groups}
        made.append(
            _Group(
                name=name,
                prompts=max(metrics.prompts for metrics in found.values()),
                estimates={phase: metrics.kl for phase, metrics in found.items()},
                tracks={phase: _Track.of(metrics.kl, ends) for phase, metrics in found.items()},
            )
        )
    return sorted(made, key=lambda group: -max(estimate.value for estimate in group.estimates.values()))


def _ends(estimates: Sequence[Estimate], limits: Sequence[float]) -> tuple[float, float]:
    """Of a scale that holds all that is drawn of them, and 0."""
    drawn = [end for each in estimates for end in (each.low, each.value, each.high) if math.isfinite(end)]
    low, high = min([0.0, *drawn]), max([0.0, *drawn, *limits])
    room = 0.06 * ((high - low) or 1)
    return (low - room if low < 0 else 0.0, high + room)
