"""What is said of scores: the figures by hand, their intervals against scipy's and against the truth."""

import math
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiers.conformance.findings import FEWEST_PROMPTS, Estimate, Metrics
from tiers.conformance.scores import Scores
from tiers.conformance.statistics import count_flips, measure, noise_floor, phase_findings

HALF, QUARTER = math.log(0.5), math.log(0.25)


def scores(prompt: Any, **columns: Any) -> Scores:
    """Of a tier that agrees with the reference everywhere, but for these columns."""
    prompt = np.asarray(prompt)
    same = {name: np.zeros(len(prompt)) for name in ("position", "token", "kl", "tv", "top_p", "top_q")}
    likely = {"ln_p": np.full(len(prompt), HALF), "ln_q": np.full(len(prompt), HALF)}
    return Scores.of({"prompt": prompt, **same, **likely, **columns})


def random_scores(rng: np.random.Generator, prompts: int, tokens: int, *, mean: float = 0.01) -> Scores:
    """Prompts of up to so many tokens, which share how hard their prompt is."""
    lengths = rng.integers(tokens // 2, tokens + 1, size=prompts)
    prompt = np.repeat(np.arange(prompts), lengths)
    hard = np.exp(0.4 * rng.normal(size=prompts) - 0.08)[prompt]
    noise = rng.normal(size=len(prompt))
    ln_p = -rng.exponential(0.5, size=len(prompt))
    return scores(
        prompt,
        position=np.concatenate([np.arange(each) for each in lengths]),
        kl=mean * hard * rng.exponential(size=len(prompt)),
        tv=np.minimum(1, mean * hard * rng.random(len(prompt))),
        ln_p=ln_p,
        ln_q=ln_p - mean * hard * (1 + 5 * noise),
        top_p=rng.random(len(prompt)) < 0.1,
        top_q=rng.random(len(prompt)) < 0.1 * hard,
    )


def figures(found: Metrics) -> dict[str, Estimate]:
    return {name: each for name, each in found if isinstance(each, Estimate)}


def test_the_figures_are_as_defined() -> None:
    found = measure(
        scores(
            [0, 0, 0, 1],
            kl=[0.1, 0.2, 0.3, 1.0],
            tv=[0.0, 0.1, 0.2, 0.5],
            ln_p=[HALF, HALF, HALF, QUARTER],
            ln_q=[HALF, QUARTER, HALF, HALF],
            top_p=[1, 2, 3, 4],
            top_q=[1, 2, 3, 5],
        )
    )
    assert (found.prompts, found.tokens) == (2, 4)
    assert found.kl.value == pytest.approx(0.4), "a mean over tokens, not over prompts"
    assert found.tv.value == pytest.approx(0.2)
    assert found.rejection.value == 0.25
    assert found.rms_delta_p.value == pytest.approx(math.sqrt((0.25**2 + 0.25**2) / 4))
    assert found.delta_nll.value == pytest.approx(0, abs=1e-15)
    assert found.perplexity == pytest.approx(2**1.25)
    assert found.perplexity_gap.value == pytest.approx(0, abs=1e-15)


def test_a_tier_that_is_worse_has_figures_above_0() -> None:
    found = measure(scores([0, 0], ln_p=[HALF, HALF], ln_q=[QUARTER, QUARTER]))
    assert found.delta_nll.value == pytest.approx(math.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.perplexity_gap.value == pytest.approx(2)
    assert found.rms_delta_p.value == pytest.approx(0.25)


def test_the_tails_of_0_to_1000_are_their_own_ranks() -> None:
    tails = measure(scores(np.arange(1001) % 7, kl=np.arange(1001.0)[::-1])).kl_tails
    assert list(tails.model_dump().values()) == [500, 900, 990, 999, 1000]


def test_every_interval_is_scipys_bca_over_prompts_at_the_widened_level() -> None:
    import scipy.stats  # half a second, for which no other process of a test run need wait

    measured = random_scores(np.random.default_rng(3), prompts=12, tokens=30)
    columns = {
        "kl": measured.kl,
        "tv": measured.tv,
        "rejection": measured.top_p != measured.top_q,
        "squares": (np.exp(measured.ln_q) - np.exp(measured.ln_p)) ** 2,
        "nll_p": -measured.ln_p,
        "nll_q": -measured.ln_q,
    }
    total = {
        name: np.array([column[measured.prompt == each].sum() for each in range(12)])
        for name, column in columns.items()
    }
    count = np.array([(measured.prompt == each).sum() for each in range(12)])

    def mean(name: str, chosen: NDArray[Any], axis: int) -> Any:
        return total[name][chosen].sum(axis=axis) / count[chosen].sum(axis=axis)

    statistics = {
        "kl": lambda chosen, axis: mean("kl", chosen, axis),
        "tv": lambda chosen, axis: mean("tv", chosen, axis),
        "rejection": lambda chosen, axis: mean("rejection", chosen, axis),
        "rms_delta_p": lambda chosen, axis: np.sqrt(mean("squares", chosen, axis)),
        "delta_nll": lambda chosen, axis: mean("nll_q", chosen, axis) - mean("nll_p", chosen, axis),
        "perplexity_gap": lambda chosen, axis: (
            np.exp(mean("nll_q", chosen, axis)) - np.exp(mean("nll_p", chosen, axis))
        ),
    }
    found = figures(measure(measured))
    assert found.keys() == statistics.keys()
    # Student's quantile of 11 degrees of freedom, times √(12/11).
    level = 1 - 2 * scipy.stats.norm.cdf(-2.2010 * math.sqrt(12 / 11))
    for name, statistic in statistics.items():
        ours = found[name]
        theirs = scipy.stats.bootstrap(
            (np.arange(12),),
            statistic,
            confidence_level=level,
            n_resamples=9_999,
            method="BCa",
            rng=np.random.default_rng(1),
        ).confidence_interval
        assert ours.low < ours.value < ours.high
        width = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.04 * width), name
        assert ours.high == pytest.approx(theirs.high, abs=0.04 * width), name


def share_covered(truth: float, found: list[Estimate]) -> float:
    return sum(each.low <= truth <= each.high for each in found) / len(found)


def test_intervals_over_prompts_hold_the_truth_and_those_over_tokens_would_not() -> None:
    rng = np.random.default_rng(11)
    runs = [random_scores(rng, prompts=50, tokens=30, mean=0.01) for _ in range(160)]
    over_prompts = [measure(each, resamples=500).kl for each in runs]
    assert 0.91 <= share_covered(0.01, over_prompts) <= 0.985

    apart = [scores(np.arange(len(each)), kl=each.kl) for each in runs[:50]]
    over_tokens = [measure(each, resamples=200).kl for each in apart]
    assert share_covered(0.01, over_tokens) < 0.8


def test_the_truth_is_seldom_above_the_interval_of_skewed_prompts_and_would_be_with_plain_percentiles() -> None:
    rng = np.random.default_rng(5)
    above, above_percentiles = 0, 0
    for _ in range(300):
        kl = np.exp(rng.normal(size=20) - 0.5)
        above += measure(scores(np.arange(20), kl=kl), resamples=400).kl.high < 1
        above_percentiles += np.quantile(rng.choice(kl, size=(400, 20)).mean(axis=1), 0.975) < 1
    assert above < 0.85 * above_percentiles


def test_the_same_scores_give_the_same_intervals() -> None:
    measured = random_scores(np.random.default_rng(0), prompts=20, tokens=10)
    assert measure(measured) == measure(measured)


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = random_scores(np.random.default_rng(0), prompts=20, tokens=10)
    at_once = measure(measured, resamples=1000)
    monkeypatch.setattr("tiers.conformance.statistics._CELLS", 20 * 77)
    assert measure(measured, resamples=1000) == at_once


def test_too_few_prompts_have_figures_and_no_interval() -> None:
    few = np.repeat(np.arange(FEWEST_PROMPTS - 1), 100)
    for prompt in (few, few[:100]):
        for each in figures(measure(scores(prompt, kl=np.linspace(0, 1, len(prompt))))).values():
            assert (each.low, each.high) == (-math.inf, math.inf)
    enough = np.repeat(np.arange(FEWEST_PROMPTS), 100)
    assert math.isfinite(measure(scores(enough)).kl.high)


def test_an_unbounded_interval_survives_json() -> None:
    found = measure(scores([0]))
    assert '"low":"-Infinity","high":"Infinity"' in found.model_dump_json()
    assert found.model_dump(mode="json")["kl"]["high"] == "Infinity"
    assert Metrics.model_validate_json(found.model_dump_json()) == found


def test_a_rejection_never_seen_is_not_ruled_out() -> None:
    import scipy.stats  # as above

    found = measure(scores(np.arange(60) % 6))
    assert (found.rejection.value, found.rejection.low) == (0, 0)
    exact = scipy.stats.binomtest(0, 6).proportion_ci(0.95, method="exact")  # of prompts, not of their tokens
    assert found.rejection.high == pytest.approx(exact.high)
    assert found.kl.high == 0, "a divergence of 0 everywhere is known, not counted"


def test_no_tokens_and_broken_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        measure(scores([]))
    with pytest.raises(ValueError, match="no tokens"):
        phase_findings(scores([]), scores([0]), [], [])
    with pytest.raises(ValueError, match="2 of 3 tokens"):
        measure(scores([0, 1, 2], kl=[math.nan, 0, 0], ln_q=[0, -math.inf, 0]))


def test_flips_are_counted_each_way_and_tested_by_mcnemar() -> None:
    right, wrong = [1], [0]
    found = count_flips(
        scores(
            np.zeros(120),
            token=np.ones(120),
            top_p=right * 70 + wrong * 50,
            top_q=right * 59 + wrong * 11 + right * 3 + wrong * 47,
        )
    )
    assert (found.right_to_wrong, found.wrong_to_right) == (11, 3)
    # 2 · P(X ≤ 3) of 14 fair coins: 2 · (1 + 14 + 91 + 364) / 2¹⁴.
    assert found.p_value == pytest.approx(2 * 470 / 2**14)


def test_without_flips_nothing_favours_a_direction() -> None:
    assert count_flips(scores([0, 1])).p_value == 1


def test_a_phase_is_split_by_kind_language_and_position() -> None:
    measured = scores(
        np.repeat([0, 2, 3], 300),
        position=np.tile(np.arange(300), 3),
        kl=np.repeat([0.1, 0.2, 0.6], 300) + np.tile(np.arange(300) >= 256, 3),
    )
    floor, corpus = noise_floor({"restarted": scores([0])}, scores([1])), scores([0, 1], ln_q=[QUARTER, QUARTER])
    found = phase_findings(measured, corpus, ["chat", "code", "chat", "math"], ["en", "en", "de", "de"], floor)
    assert {name: each.kl.value for name, each in found.by_kind.items()} == pytest.approx(
        {"chat": 0.15 + 44 / 300, "math": 0.6 + 44 / 300}
    ), "code has no tokens, and is not there"
    assert {name: each.prompts for name, each in found.by_language.items()} == {"en": 1, "de": 2}
    assert {name: each.tokens for name, each in found.by_position.items()} == {
        "0–15": 3 * 16,
        "16–63": 3 * 48,
        "64–255": 3 * 192,
        "256–": 3 * 44,
    }
    assert found.by_position["256–"].kl.value == pytest.approx(1.3)
    assert list(found.by_position) == ["0–15", "16–63", "64–255", "256–"]
    assert found.overall == measure(measured)
    assert found.corpus.perplexity_gap.value == pytest.approx(4 - 2)
    assert found.noise_floor == floor


def test_the_noise_floor_is_of_all_conditions_together_and_of_each() -> None:
    conditions = {"restarted": scores([0, 1], kl=[0.1, 0.1]), "prefix cache": scores([2, 3], kl=[0.3, 0.3])}
    floor = noise_floor(conditions, scores([0], kl=[0.7]))
    assert floor.overall.kl.value == pytest.approx(0.2)
    assert floor.overall.prompts == 4
    assert {name: each.kl.value for name, each in floor.by_condition.items()} == pytest.approx(
        {"restarted": 0.1, "prefix cache": 0.3}
    )
    assert (floor.judged("kl"), floor.judged("perplexity_gap")) == (floor.overall, floor.corpus)


def test_more_confidence_is_a_wider_interval_around_the_same_figure() -> None:
    measured = random_scores(np.random.default_rng(3), prompts=40, tokens=20)
    narrow, wide = measure(measured, resamples=2000), measure(measured, confidence=0.9875, resamples=2000)
    assert wide.kl.value == narrow.kl.value
    assert wide.kl.low < narrow.kl.low < narrow.kl.high < wide.kl.high
    never = scores(np.arange(60) % 6)
    assert measure(never, confidence=0.99).rejection.high > measure(never).rejection.high


def test_a_prompt_without_kind_or_language_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts 0 to 2, of 2 known"):
        phase_findings(scores([0, 2]), scores([0]), ["chat", "chat"], ["en"] * 3)


def test_a_phase_of_200_prompts_takes_about_a_second() -> None:
    measured = random_scores(np.random.default_rng(2), prompts=200, tokens=340)
    started = time.process_time()
    phase_findings(measured, measured, ["chat", "code", "math", "long"] * 50, ["en", "de", "fr", "hi", "th"] * 40)
    took = time.process_time() - started
    print(f"{len(measured)} tokens of 200 prompts: {took:.2f} s")
    assert took < 5
