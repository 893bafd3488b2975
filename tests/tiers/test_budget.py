"""Verdicts: an interval against a limit, several together, and how many prompts more would settle one."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from tests.tiers.test_statistics import random_scores
from tiers.conformance.budget import PUBLISHED, Budget, judge, overall
from tiers.conformance.corpus import load_corpus
from tiers.conformance.findings import (
    FEWEST_PROMPTS,
    Estimate,
    Flips,
    Judgement,
    Metrics,
    PhaseFindings,
    Tails,
    Verdict,
)
from tiers.conformance.statistics import measure
from tiers.tier import TierKind

NOTHING = Estimate(value=0, low=0, high=0)


def metrics(prompts: int = 100, **estimates: Estimate) -> Metrics:
    names = ("kl", "tv", "rejection", "rms_delta_p", "delta_nll", "perplexity_gap")
    rest = dict.fromkeys(names, NOTHING) | estimates
    tails = Tails(median=0, p90=0, p99=0, p999=0, max=0)
    return Metrics.model_validate({"prompts": prompts, "tokens": 1, "kl_tails": tails, "perplexity": 1, **rest})


def phase_of(found: Metrics, corpus: Metrics | None = None) -> PhaseFindings:
    """A phase of which nothing else is known."""
    flips = Flips(right_to_wrong=0, wrong_to_right=0, p_value=1)
    return PhaseFindings(
        overall=found, corpus=corpus or found, flips=flips, by_kind={}, by_language={}, by_position={}
    )


def judged(
    value: float, low: float, high: float, budget: float, prompts: int = 100, *, exact: bool = True
) -> Judgement:
    estimate = Estimate(value=value, low=low, high=high)
    (only,) = judge(phase_of(metrics(prompts, kl=estimate)), "decode", Budget(kl=budget), exact=exact)
    assert (only.metric, only.phase, only.estimate, only.budget) == ("kl", "decode", estimate, budget)
    return only


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1, 2.9, "PASS"),
        (3.1, 4, "FAIL"),
        (1, 3, "INCONCLUSIVE"),
        (3, 4, "INCONCLUSIVE"),
        (1, 4, "INCONCLUSIVE"),
    ],
)
def test_the_whole_interval_must_lie_on_one_side(low: float, high: float, verdict: str) -> None:
    found = judged((low + high) / 2, low, high, budget=3)
    assert found.verdict == verdict
    assert (found.further_prompts is not None) == (verdict == "INCONCLUSIVE")
    assert found.why_open == ("too close" if verdict == "INCONCLUSIVE" else None)


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "why_open", "is_settled_by_more"),
    [
        (2, 1, 2.9, "INCONCLUSIVE", "lower bound", False),
        (2, 1, 4, "INCONCLUSIVE", "lower bound", False),
        (2, -math.inf, math.inf, "INCONCLUSIVE", "lower bound", False),
        (3.5, 2, 4, "INCONCLUSIVE", "too close", True),
        (3.5, -math.inf, math.inf, "INCONCLUSIVE", "too few prompts", True),
        (3.5, 3.1, 4, "FAIL", None, False),
    ],
)
def test_a_lower_bound_fails_a_limit_and_never_passes_one(
    value: float, low: float, high: float, verdict: str, why_open: str | None, is_settled_by_more: bool
) -> None:
    found = judged(value, low, high, budget=3, prompts=5, exact=False)
    assert (found.verdict, found.why_open) == (verdict, why_open)
    assert (found.further_prompts is not None) == is_settled_by_more


def test_what_the_public_api_tells_exactly_is_judged_as_ever() -> None:
    low = Estimate(value=0.001, low=0.0009, high=0.0011)
    found = judge(
        phase_of(metrics(kl=low, rejection=low, perplexity_gap=low)),
        "decode",
        PUBLISHED[TierKind.TURBO],
        exact=False,
    )
    assert [(each.metric, each.verdict) for each in found] == [
        ("kl", "INCONCLUSIVE"),
        ("rejection", "PASS"),
        ("perplexity_gap", "PASS"),
    ]
    assert overall(found) is Verdict.INCONCLUSIVE


def test_an_open_judgement_says_why_and_no_other_does() -> None:
    for verdict, why_open in (("INCONCLUSIVE", None), ("PASS", "too close"), ("FAIL", "lower bound")):
        with pytest.raises(ValidationError, match="says why"):
            Judgement.model_validate(
                {"metric": "kl", "phase": "decode", "estimate": NOTHING, "budget": 1, "verdict": verdict}
                | {"why_open": why_open}
            )


def test_each_metric_with_a_budget_is_judged_by_its_own() -> None:
    found = judge(
        phase_of(
            metrics(
                kl=Estimate(value=0.01, low=0.009, high=0.011),
                rejection=Estimate(value=0.01, low=0.009, high=0.011),
                perplexity_gap=Estimate(value=9, low=8, high=10),
            ),
            corpus=metrics(
                kl=Estimate(value=9, low=8, high=10), perplexity_gap=Estimate(value=-2, low=-3, high=-1)
            ),
        ),
        "prefill",
        PUBLISHED[TierKind.TURBO],
    )
    assert [(each.metric, each.verdict) for each in found] == [
        ("kl", "FAIL"),
        ("rejection", "PASS"),
        ("perplexity_gap", "PASS"),
    ]
    assert [each.metric for each in judge(phase_of(metrics()), "decode", PUBLISHED[TierKind.REFERENCE])] == ["kl"]
    assert judge(phase_of(metrics()), "decode", Budget()) == []


def test_perplexity_is_judged_on_the_corpus_and_all_else_on_the_answers() -> None:
    answers = metrics(kl=Estimate(value=1, low=1, high=1), perplexity_gap=Estimate(value=2, low=2, high=2))
    corpus = metrics(kl=Estimate(value=3, low=3, high=3), perplexity_gap=Estimate(value=4, low=4, high=4))
    found = judge(phase_of(answers, corpus), "prefill", Budget(kl=5, perplexity_gap=5))
    assert [each.estimate.value for each in found] == [1, 4]


def test_every_kind_of_tier_has_a_budget_and_a_lower_grade_a_wider_one() -> None:
    assert set(PUBLISHED) == set(TierKind)
    limits = [[getattr(PUBLISHED[kind], name) for kind in TierKind] for name in Budget.model_fields]
    for each in limits:
        known = [limit for limit in each if limit is not None]
        assert known == sorted(set(known))


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", Budget.model_fields)
def test_a_limit_is_a_number_above_0(name: str, limit: float) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate({name: limit})


def test_a_metric_that_is_not_judged_is_refused() -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate({"tv": 0.1})


def test_one_fail_fails_all_and_only_passes_pass() -> None:
    passed, failed, unknown = judged(1, 0, 2, 3), judged(4, 3.5, 5, 3), judged(2, 1, 4, 3)
    assert overall([passed, passed]) is Verdict.PASS
    assert overall([passed, unknown]) is Verdict.INCONCLUSIVE
    assert overall([unknown, failed, passed]) is Verdict.FAIL
    assert overall([]) is Verdict.INCONCLUSIVE


def test_twice_the_precision_takes_four_times_the_prompts() -> None:
    # The end on the budget's side is at twice the budget's distance; the other end does not count.
    assert judged(2, 1.9, 4, budget=3).further_prompts == 301
    assert judged(4, 2, 9, budget=3).further_prompts == 301
    assert judged(2, 1, 3, budget=3).further_prompts == 1, "an end on the budget itself is just short"


def test_of_perplexity_no_more_is_known_than_the_corpus_tells() -> None:
    def further(passages: int) -> int | None:
        gap = Estimate(value=2, low=1, high=4)
        (only,) = judge(phase_of(metrics(passages, perplexity_gap=gap)), "decode", Budget(perplexity_gap=3))
        return only.further_prompts

    assert further(10) == 31
    assert len(load_corpus()) < 4 * 24
    assert further(24) is None


def test_what_no_number_of_prompts_settles_has_none() -> None:
    assert judged(3, 2, 4, budget=3).further_prompts is None
    # At a distance of 1/31 of the interval's end it takes 961 times as many prompts, at 1/32 1,024 times.
    assert judged(3 - 1 / 31, 2, 4 - 1 / 31, budget=3).further_prompts == pytest.approx(96_000, rel=0.001)
    assert judged(3 - 1 / 32, 2, 4 - 1 / 32, budget=3).further_prompts is None


def test_few_prompts_decide_nothing_whatever_they_say() -> None:
    few = measure(random_scores(np.random.default_rng(0), prompts=FEWEST_PROMPTS - 1, tokens=50, mean=0.01))
    for limit in (1e-9, 0.99):
        found = judge(phase_of(few), "decode", Budget(kl=limit, rejection=limit, perplexity_gap=limit))
        assert [(each.verdict, each.further_prompts) for each in found] == [("INCONCLUSIVE", 1)] * 3
        assert {each.why_open for each in found} == {"too few prompts"}
    alone = judge(
        phase_of(measure(random_scores(np.random.default_rng(0), 1, 50))), "decode", PUBLISHED[TierKind.TURBO]
    )
    assert overall(alone) is Verdict.INCONCLUSIVE
    assert {each.further_prompts for each in alone} == {FEWEST_PROMPTS - 1}


def test_so_many_further_prompts_settle_it_half_the_time_and_four_times_as_many_nearly_always() -> None:
    rng = np.random.default_rng(7)
    truth, budget, start = 0.0092, Budget(kl=0.01), 40

    def repeated(prompts: int) -> list[Metrics]:
        return [measure(random_scores(rng, prompts, 20, mean=truth), resamples=300) for _ in range(60)]

    first = repeated(start)
    above = float(np.mean([each.kl.high - each.kl.value for each in first]))
    further = judged(truth, truth - above, truth + above, 0.01, start).further_prompts
    assert further is not None
    assert further > 40

    def settled(found: list[Metrics]) -> float:
        return float(np.mean([judge(phase_of(each), "decode", budget)[0].verdict == "PASS" for each in found]))

    assert settled(first) < 0.4
    then = repeated(start + further)
    assert float(np.mean([each.kl.high - each.kl.value for each in then])) == pytest.approx(0.0008, rel=0.15)
    assert 0.3 <= settled(then) <= 0.7
    assert settled(repeated(4 * (start + further))) > 0.9
