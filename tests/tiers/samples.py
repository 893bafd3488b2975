"""Made-up measurements that look like real ones: scores, what they say, and the certificate of it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache

import numpy as np

from tests.tiers.budgets import BUDGET
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.conformance.budget import Budget, judge, overall
from tiers.conformance.certificate import (
    Certificate,
    Conformance,
    Hardware,
    Pack,
    Subject,
    SubjectDigest,
    Versions,
)
from tiers.conformance.findings import (
    Estimate,
    Findings,
    Flips,
    Metrics,
    NoiseFloor,
    PhaseFindings,
    Tails,
    WorstToken,
)
from tiers.conformance.scores import Phase, Scores
from tiers.conformance.statistics import phase_findings
from tiers.precision import FP8
from tiers.tier import TierKind
from tiers.verification import verify_precision

KINDS = ("chat", "knowledge", "reasoning", "code", "long_context", "multi_turn", "tool_use", "structured_output")
LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th")
RANGES = {"0–15": (0, 16), "16–31": (16, 32), "32–47": (32, 48), "48–63": (48, 64)}
_BEFORE = (
    "Give the answer and how you found it.\n\nA train leaves at nine and travels 240 km in three hours. Its "
    "average speed is the way divided by the time, which is what was asked for. It is therefore",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)",
    "Die Hauptstadt von Frankreich ist Paris",
    "दिल्ली भारत की राजधानी है और",
)
MODEL = "Llama-3.1-8B-Instruct"


def make_scores(scale: float = 0.0055, prompts: int = 96, answer: int = 64, seed: int = 1) -> Scores:
    """A tier whose mean KL is about ``scale``: most tokens barely differ, a few do much."""
    random = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), answer)
    tokens = len(prompt)
    # The same in every measurement: a prompt that is hard in one phase is hard in the other.
    per_prompt = np.repeat(np.random.default_rng(0).lognormal(0, 0.7, prompts), answer)
    kl = scale * 0.13 * per_prompt * random.lognormal(0, 1.8, tokens)
    ln_p = -random.gamma(0.35, 1.2, tokens)
    ln_q = np.minimum(0, ln_p + random.normal(-scale / 2, 1, tokens) * np.sqrt(2 * kl) * (1 - np.exp(ln_p)))
    top_p = random.integers(0, 128_000, tokens)
    other = random.random(tokens) < np.minimum(0.9, 0.35 * np.sqrt(kl))
    return Scores.of(
        {
            "prompt": prompt,
            "position": np.tile(np.arange(answer), prompts),
            "token": np.where(random.random(tokens) < 0.85, top_p, top_p + 1),
            "kl": kl,
            "tv": np.minimum(1, np.sqrt(kl / 2) * 0.8),
            "ln_p": ln_p,
            "ln_q": ln_q,
            "top_p": top_p,
            "top_q": np.where(other, top_p + 2, top_p),
        }
    )


def _estimate(values: np.ndarray, prompt: np.ndarray) -> Estimate:
    row = np.unique(prompt, return_inverse=True)[1]
    means = np.bincount(row, values) / np.bincount(row)
    error = 1.96 * means.std() / np.sqrt(len(means))
    return Estimate(value=values.mean(), low=values.mean() - error, high=values.mean() + error)


def make_metrics(scores: Scores) -> Metrics:
    """What those scores say, nearly: a normal interval over prompts stands for the bootstrap."""
    tails = np.quantile(scores.kl, [0.5, 0.9, 0.99, 0.999, 1])
    perplexity, reference = np.exp(-scores.ln_q.mean()), np.exp(-scores.ln_p.mean())
    delta_nll = _estimate(scores.ln_p - scores.ln_q, scores.prompt)
    squares = _estimate((np.exp(scores.ln_q) - np.exp(scores.ln_p)) ** 2, scores.prompt)
    return Metrics(
        prompts=len(np.unique(scores.prompt)),
        tokens=len(scores),
        kl=_estimate(scores.kl, scores.prompt),
        kl_tails=Tails(median=tails[0], p90=tails[1], p99=tails[2], p999=tails[3], max=tails[4]),
        tv=_estimate(scores.tv, scores.prompt),
        rejection=_estimate((scores.top_p != scores.top_q).astype(float), scores.prompt),
        rms_delta_p=Estimate(value=squares.value**0.5, low=max(0.0, squares.low) ** 0.5, high=squares.high**0.5),
        delta_nll=delta_nll,
        perplexity=perplexity,
        perplexity_gap=Estimate(
            value=perplexity - reference,
            low=reference * (np.exp(delta_nll.low) - 1),
            high=reference * (np.exp(delta_nll.high) - 1),
        ),
    )


def make_phase(scores: Scores, noise: Scores | None = None) -> PhaseFindings:
    """One phase: the kind and the language of a prompt follow from its place."""
    kinds = {kind: scores.where(scores.prompt % 8 == i) for i, kind in enumerate(KINDS)}
    languages = {name: scores.where(scores.prompt // 8 % 8 == i) for i, name in enumerate(LANGUAGES)}
    ranges = {
        name: scores.where((scores.position >= low) & (scores.position < high))
        for name, (low, high) in RANGES.items()
    }
    return PhaseFindings(
        overall=make_metrics(scores),
        corpus=make_metrics(scores.where(scores.prompt % 3 == 0)),
        flips=Flips(right_to_wrong=71, wrong_to_right=58, p_value=0.292),
        by_kind={name: make_metrics(part) for name, part in kinds.items()},
        by_language={name: make_metrics(part) for name, part in languages.items() if len(part)},
        by_position={name: make_metrics(part) for name, part in ranges.items()},
        noise_floor=make_floor(noise) if noise else None,
    )


def make_floor(noise: Scores) -> NoiseFloor:
    """The same of the reference, each prompt's under one of three conditions."""
    conditions = ("other neighbours", "prefix cache", "restarted")
    parts = {name: noise.where(noise.prompt % 3 == place) for place, name in enumerate(conditions)}
    return NoiseFloor(
        overall=make_metrics(noise),
        corpus=make_metrics(parts["restarted"]),
        by_condition={name: make_metrics(part) for name, part in parts.items()},
    )


def make_findings(
    scores: Mapping[Phase, Scores], noise: Mapping[Phase, Scores], *, exact: bool = True
) -> Findings:
    """All of a tier, judged by `BUDGET`."""
    phases = {phase: make_phase(scores[phase], noise.get(phase)) for phase in scores}
    judgements = [
        each
        for phase, found in phases.items()
        for each in judge(found, phase, Budget(**BUDGET[phase]), exact=exact)
    ]
    worst = [
        WorstToken(
            prompt_id=f"reasoning-{i:02}",
            phase="decode" if i % 3 else "prefill",
            position=7 * i + 3,
            before=_BEFORE[i % len(_BEFORE)],
            token=(" 80", "\n\n", " so", "80", " per", " €", " Ich", " नम", " km", " divided")[i],
            top_q=(" eighty", " ", " and", "8", "/h", " EUR", " Das", " न", " kilometres", " /")[i],
            kl=2.4 / (i + 1),
            ln_p=-0.05 - 0.1 * i,
            ln_q=-3.0 + 0.2 * i,
        )
        for i in range(10)
    ]
    return Findings(
        exact=exact,
        phases=phases,
        judgements=judgements,
        verdict=overall(judgements),
        worst=worst,
        seconds=187.4,
    )


@cache
def make_few_findings(prompts: int = 10, in_group: int = 2, scale: float = 0.0055) -> Findings:
    """Of so few prompts, so many of each kind and language, by the real statistics: groups without intervals."""
    phases: dict[Phase, PhaseFindings] = {}
    names = [place // in_group for place in range(prompts)]
    for phase, scores in make_measurement(scale, prompts)[0].items():
        kinds, languages = [KINDS[each] for each in names], [LANGUAGES[each] for each in names]
        phases[phase] = phase_findings(scores, scores, kinds, languages)
    judgements = [each for phase, found in phases.items() for each in judge(found, phase, Budget(**BUDGET[phase]))]
    return Findings(
        exact=True, phases=phases, judgements=judgements, verdict=overall(judgements), worst=[], seconds=3
    )


def make_measurement(scale: float = 0.0055, prompts: int = 96) -> tuple[dict[Phase, Scores], dict[Phase, Scores]]:
    """Scores of a tier by phase, decode a little worse than prefill, and those of its noise floor."""
    scores: dict[Phase, Scores] = {
        "prefill": make_scores(scale, prompts),
        "decode": make_scores(scale * 1.4, prompts, seed=2),
    }
    noise: dict[Phase, Scores] = {
        "prefill": make_scores(4e-5, prompts, seed=3),
        "decode": make_scores(6e-5, prompts, seed=4),
    }
    return scores, noise


def make_certificate(findings: Findings, kind: TierKind = TierKind.TURBO) -> Certificate:
    """Of an FP8 tier on an H100."""
    verified = verify_precision(FP8, [reading(FP8).model_copy(update={"device": "NVIDIA H100 80GB HBM3"})], SMOL)
    return Certificate(
        subject=(Subject(name=f"{MODEL}/fp8-dynamic", digest=SubjectDigest(sha256="ab" * 32)),),
        predicate=Conformance(
            tier=f"{MODEL}-{kind}",
            kind=kind,
            model=MODEL,
            verified=verified,
            hardware=Hardware(device="NVIDIA H100 80GB HBM3", device_class="sm_90", backend="cuda"),
            versions=Versions(assay="0.1.0", vllm="0.32.0", torch="2.13.0"),
            pack=Pack(
                digest="1f" * 32,
                prompt_set="2e" * 32,
                prompts=findings.phases["decode"].overall.prompts,
                corpus="5b" * 32,
                passages=findings.phases["decode"].corpus.prompts,
            ),
            tokenizer="3d" * 32,
            chat_template="4c" * 32,
            budget=BUDGET,
            findings=findings,
            issued=datetime(2026, 11, 21, 17, 30, tzinfo=UTC),
            method="probe" if findings.exact else "public api",
        ),
    )
