"""How a report writes what a certificate states: verdicts in sentences, figures in digits, tokens to be seen.

Knows nothing of the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tiers.conformance.certificate import Certificate
from tiers.conformance.findings import LOWER_BOUNDS, Estimate, Findings, Judgement, Verdict

_LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "it": "Italian",
    "pt": "Portuguese",
    "hi": "Hindi",
    "es": "Spanish",
    "th": "Thai",
}
_NOTHING = 5e-8
"""Less than the seven places that a figure may have."""
_CONTEXT = 180
"""Characters of the text before a token: two lines."""


@dataclass(frozen=True)
class Shown:
    """How a metric is called and its figures are written."""

    name: str
    spoken: str
    explained: str
    unit: Literal["nats", "%", ""]
    is_signed: bool = False

    def figure(self, value: float, estimate: Estimate | None = None, *, bound: bool = False) -> str:
        """A value as the page writes it, as finely as the estimate that it belongs to."""
        sign = "+" if self.is_signed and value > 0 else ""
        if self.unit == "%":
            text = f"{100 * value:.2f}" if estimate else _short(f"{100 * value:.2f}")
            text += "%"
        else:
            text = number(value, estimate)
        return f"{'≥ ' if bound and self.name in LOWER_BOUNDS else ''}{sign}{text}".replace("-", "−")

    def interval(self, estimate: Estimate) -> str:
        """From where to where, if there is one."""
        if not estimate.is_bounded:
            return "too few prompts"
        return f"{self.figure(estimate.low, estimate)} to {self.figure(estimate.high, estimate)}"


METRICS = (
    Shown("kl", "KL divergence", "how far the two distributions are apart, mean per token", "nats"),
    Shown("tv", "Total variation", "the share of probability that lies elsewhere, mean", "%"),
    Shown("rejection", "Rejection rate", "tokens at which another one is the likeliest", "%"),
    Shown("rms_delta_p", "RMS Δp", "how much the probability of the reference's token moves", "%"),
    Shown("delta_nll", "ΔNLL", "above 0 the tier finds the reference's text less likely", "nats", is_signed=True),
    Shown("perplexity_gap", "Perplexity gap", "of the corpus, less the reference's", "", is_signed=True),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def headline(certificate: Certificate) -> str:
    """The verdict in a line."""
    said = {
        Verdict.PASS: "is within its budget",
        Verdict.FAIL: "is over its budget",
        Verdict.INCONCLUSIVE: "cannot be judged yet",
    }
    return f"{certificate.predicate.kind} {said[certificate.verdict]}"


def explanation(findings: Findings) -> list[str]:
    """What the verdict rests on, in sentences."""
    parts: dict[Verdict, list[Judgement]] = {verdict: [] for verdict in Verdict}
    for judgement in findings.judgements:
        parts[judgement.verdict].append(judgement)
    total, over = len(findings.judgements), parts[Verdict.FAIL]
    sentences, confidence = [], percent(findings.confidence)
    if total and len(parts[Verdict.PASS]) == total:
        sentences.append(f"Each of its {total} limits holds, with {confidence} confidence.")
    if over:
        sentences.append(f"{len(over)} of its {total} limits {_are(over)} exceeded, with {confidence} confidence.")
        sentences += [_said(judgement, exact=findings.exact) for judgement in over]
    return [*sentences, *_open(parts[Verdict.INCONCLUSIVE], total, exact=findings.exact), *_in_short(findings)]


def _open(inconclusive: Sequence[Judgement], total: int, *, exact: bool) -> list[str]:
    """Why nothing can be said of these limits, and what would help."""
    close, few, bounds = (
        [each for each in inconclusive if each.why_open == why]
        for why in ("too close", "too few prompts", "lower bound")
    )
    sentences = []
    if few:
        most = max(each.further_prompts or 0 for each in few)
        sentences.append(
            f"{len(few)} of its {total} limits cannot be judged: of so few prompts there is no interval, and at "
            f"least {most:,} more are needed."
        )
    for each in close:
        further = (
            f"about {each.further_prompts:,} further prompts would settle it"
            if each.further_prompts
            else "no number of further prompts would settle it"
        )
        sentences.append(f"{_said(each, exact=exact)} That is too close to tell: {further}.")
    sentences += [_said(each, exact=exact) for each in bounds]
    if bounds:
        sentences.append(
            "A lower bound cannot show that a limit holds: that takes the whole vocabulary, inside the engine."
        )
    return sentences


def _in_short(findings: Findings) -> list[str]:
    """What it means for who reads an answer: of the phase that writes it."""
    found = findings.phases.get("decode")
    if not found:
        return []
    agreement = 100 * (1 - found.overall.rejection.value)
    same = f"The likeliest next token is the reference's at {agreement:.1f}% of tokens"
    # Of two lower bounds the ratio says nothing.
    if not findings.exact or not found.noise_floor or found.noise_floor.overall.kl.value <= 0:
        return [f"{same}."]
    times = found.overall.kl.value / found.noise_floor.overall.kl.value
    how_often = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    return [f"{same}; the KL divergence is {how_often} times the noise floor."]


def _said(judgement: Judgement, *, exact: bool) -> str:
    shown, estimate = BY_NAME[judgement.metric], judgement.estimate
    unit = " nats" if shown.unit == "nats" else ""
    figure = shown.interval(estimate) if estimate.is_bounded else shown.figure(estimate.value)
    at_least = "" if exact or shown.name not in LOWER_BOUNDS else "at least "
    return (
        f"{shown.spoken} in {judgement.phase} is {at_least}{figure}{unit}; "
        f"the limit is {shown.figure(judgement.budget)}."
    )


def _are(several: Sequence[object]) -> str:
    return "is" if len(several) == 1 else "are"


def number(value: float, estimate: Estimate | None = None) -> str:
    """With three digits that count: the value's own, without zeros at the end, or its estimate's."""
    beside = (estimate.low, estimate.value, estimate.high) if estimate else (value,)
    most = max(abs(each) for each in beside if math.isfinite(each))
    if most < _NOTHING:
        return "0"
    text = f"{value:.{min(7, max(0, 2 - math.floor(math.log10(most))))}f}"
    return (text if estimate else _short(text)).replace("-", "−")


def _short(text: str) -> str:
    """Without zeros at the end."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def probability(ln: float) -> str:
    """From its logarithm, in percent."""
    value = math.exp(ln)
    return f"{100 * value:.1f}%" if value >= 0.001 else "<\u202f0.1%"


def chance(p_value: float) -> str:
    """A p-value with its sign of equality, or of less where it is too small to matter."""
    return f"p\u00a0=\u00a0{p_value:.2g}" if p_value >= 0.0001 else "p\u00a0<\u00a00.0001"


def percent(share: float) -> str:
    """A share, such as a confidence."""
    return f"{100 * share:.4g}%"


def duration(seconds: float) -> str:
    """In minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{rest} s"


def language(tag: str) -> str:
    """Its name, or else the tag."""
    return _LANGUAGES.get(tag, tag)


def token(text: str) -> str:
    """A token so that one sees where it begins and ends."""
    seen = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    inner = seen.strip(" ")
    if not inner:
        return "␣" * len(seen) or "∅"
    before, after = len(seen) - len(seen.lstrip(" ")), len(seen) - len(seen.rstrip(" "))
    return "␣" * before + inner + "␣" * after


def context(text: str) -> str:
    """The end of what a token follows."""
    end = text[-_CONTEXT:]
    if len(end) < len(text):
        # From a word's beginning; a text without spaces, such as Thai, from wherever it is.
        end = f"…{end[max(0, end.find(' ', 0, _CONTEXT // 3)) :]}"
    return end.replace("\n", "⏎\n")
