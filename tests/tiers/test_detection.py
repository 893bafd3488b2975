"""What tells a broken engine from a sound one: power, false alarms, and after how many tokens."""

from dataclasses import replace

import numpy as np
import pytest

from tiers.conformance.detection import ALPHA, MARGIN, detect
from tiers.conformance.scores import PHASES, Phase, Scores

ANSWERS, TOKENS = 24, 16


def measured(seed: int = 1, answers: int = ANSWERS) -> dict[Phase, Scores]:
    """A tier whose answers are unequally hard and whose tokens vary by orders of magnitude."""
    random = np.random.default_rng(seed)
    return {phase: _scores(random, answers) for phase in PHASES}


def _scores(random: np.random.Generator, answers: int) -> Scores:
    tokens = answers * TOKENS
    kl = 0.001 * np.repeat(random.lognormal(0, 0.7, answers), TOKENS) * random.lognormal(0, 1.8, tokens)
    ln_p = -random.gamma(0.35, 1.2, tokens)
    top_p = random.integers(0, 1000, tokens)
    return Scores.of(
        {
            "prompt": np.repeat(np.arange(answers), TOKENS),
            "position": np.tile(np.arange(TOKENS), answers),
            "token": top_p,
            "kl": kl,
            "tv": np.sqrt(kl / 2) * 0.8,
            "ln_p": ln_p,
            "ln_q": ln_p + random.normal(0, 1, tokens) * np.sqrt(kl),
            "top_p": top_p,
            "top_q": np.where(random.random(tokens) < 0.02, top_p + 1, top_p),
        }
    )


def again(
    scores: dict[Phase, Scores], seed: int, *, factor: float = 1.0, noise: float = 0.2
) -> dict[Phase, Scores]:
    """The same tokens with other noise, and divergences that are so many times as large."""
    random = np.random.default_rng(seed)
    made: dict[Phase, Scores] = {}
    for phase, each in scores.items():
        times = factor * random.lognormal(-(noise**2) / 2, noise, len(each))
        moved = noise * random.normal(0, 1, len(each)) * np.sqrt(each.kl)
        flips = random.random(len(each)) < noise / 50
        made[phase] = replace(
            each,
            kl=each.kl * times,
            tv=each.tv * np.sqrt(times),
            ln_q=each.ln_q + moved,
            top_q=np.where(flips, each.top_p, each.top_q),
        )
    return made


def test_a_sound_engine_raises_no_alarm() -> None:
    before = measured()
    assert detect(before, before) is None
    assert [seed for seed in range(30) if detect(before, again(before, seed))] == []


def test_less_than_the_margin_is_none_even_where_it_is_certain() -> None:
    before = measured()
    assert detect(before, again(before, 1, factor=1 + 0.9 * MARGIN, noise=0)) is None


def test_a_divergence_of_twice_as_much_is_found_and_named() -> None:
    before = measured()
    found = detect(before, again(before, 1, factor=2))
    assert found is not None
    assert found.metric == "kl"
    assert found.factor == pytest.approx(2, rel=0.1)
    assert found.p_value < ALPHA / 20


def test_what_is_worse_is_found_sooner() -> None:
    before = measured()
    tokens = [
        found.tokens if (found := detect(before, again(before, 1, factor=factor, noise=1))) else np.inf
        for factor in (20, 2, 1.4)
    ]
    assert tokens == sorted(tokens)
    assert tokens[0] == ANSWERS, "one token of each answer is enough"
    assert tokens[0] < tokens[2]


def test_an_engine_that_is_nearer_is_no_alarm() -> None:
    before = measured()
    assert detect(before, again(before, 1, factor=0.5)) is None


def test_only_the_phase_that_is_broken_is_named() -> None:
    before = measured()
    now = {"prefill": again(before, 1)["prefill"], "decode": again(before, 1, factor=3)["decode"]}
    found = detect(before, now)  # type: ignore[arg-type]  # a literal's keys are strings to mypy
    assert found is not None
    assert found.phase == "decode"


def test_what_shows_only_later_is_counted_until_then() -> None:
    before = measured()
    now = {
        phase: replace(each, kl=np.where(each.position >= 8, 30 * each.kl, each.kl))
        for phase, each in before.items()
    }
    found = detect(before, now)
    assert found is not None
    assert found.tokens == ANSWERS * TOKENS, "eight of each are no different"


def test_what_shows_at_first_and_not_over_all_is_not_found() -> None:
    before = measured()
    now = {
        phase: replace(
            each,
            kl=np.where(each.position < 1, 3 * each.kl, 0.1 * each.kl),
            tv=np.where(each.position < 1, 3 * each.tv, 0.1 * each.tv),
        )
        for phase, each in before.items()
    }
    assert detect(before, now) is None


def test_one_bad_answer_is_not_enough() -> None:
    before = measured()
    now = {phase: replace(each, kl=each.kl + 5.0 * (each.prompt == 3)) for phase, each in before.items()}
    assert detect(before, now) is None


def test_few_answers_prove_nothing() -> None:
    before = measured(answers=8)
    assert detect(before, again(before, 1, factor=50)) is None


def test_numbers_that_are_none_are_found() -> None:
    before = measured()
    now = {phase: replace(each, kl=np.full(len(each), np.nan)) for phase, each in before.items()}
    found = detect(before, now)
    assert found is not None
    assert found.factor == np.inf


def test_other_answers_cannot_be_compared() -> None:
    before = measured()
    now = {phase: each.where(each.prompt > 0) for phase, each in before.items()}
    with pytest.raises(ValueError, match="same answers"):
        detect(before, now)


@pytest.mark.parametrize(("scale", "metric"), [(1.02, "sharper"), (0.98, "flatter")])
def test_scaled_logits_are_found_where_no_divergence_shows_them(scale: float, metric: str) -> None:
    """A twentieth of the tier's own KL or less, on top of it."""
    before = measured()
    now = {
        phase: replace(each, ln_q=each.ln_q + (scale - 1) * (each.ln_q - each.ln_q.mean()))
        for phase, each in again(before, 1, noise=0.05).items()
    }
    found = detect(before, now)
    assert found is not None
    assert found.metric == metric
    assert found.factor == pytest.approx(scale, abs=0.005)
    barely = {
        phase: replace(each, ln_q=each.ln_q + 0.1 * (scale - 1) * (each.ln_q - each.ln_q.mean()))
        for phase, each in before.items()
    }
    assert detect(before, barely) is None
