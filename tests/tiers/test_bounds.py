"""Bounds are below what they bound, whatever a server tells, and what is exact is exact."""

import math
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from tiers.conformance.bounds import lower_bounds
from tiers.conformance.pack import Likeliest
from tiers.conformance.scores import Scores

Floats = NDArray[np.float64]
MOST = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 150


def likeliest_of(ln_p: Floats, answer: list[int], k: int) -> Likeliest:
    """As a pack keeps it, in FP32."""
    tokens = np.argsort(-ln_p, axis=1, kind="stable")[:, :k]
    others = ln_p.copy()
    np.put_along_axis(others, tokens, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        rest = logsumexp(others, axis=1)
    return Likeliest(
        tokens=tokens.astype(np.int32),
        ln_p=np.take_along_axis(ln_p, tokens, axis=1).astype(np.float32),
        ln_rest=np.asarray(rest, np.float32),
        ln_given=ln_p[np.arange(len(answer)), answer].astype(np.float32),
    )


def told_of(ln_q: Floats, answer: list[int], n: int) -> dict[int, dict[int, float]]:
    """As a server tells it: its likeliest and the given one, in FP32."""
    return {
        position: {int(token): float(np.float32(row[token])) for token in {*np.argsort(-row)[:n].tolist(), given}}
        for position, (row, given) in enumerate(zip(ln_q, answer, strict=True))
    }


def exact(ln_p: Floats, ln_q: Floats) -> tuple[Floats, Floats]:
    p, q = np.exp(ln_p), np.exp(ln_q)
    kl = (p * (ln_p - ln_q)).sum(axis=-1)  # of logarithms: what q has left near the least float has few digits
    return kl, np.abs(p - q).sum(axis=-1) / 2


def bounds(p: Floats, q: Floats, answer: list[int], k: int, n: int) -> Scores:
    return lower_bounds(0, answer, likeliest_of(p, answer, k), told_of(q, answer, n))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Floats, Floats, list[int], int, int]:
    """Two distributions at one position, near or far, flat or sharp; the given token, and how many are told."""
    size = draw(st.integers(2, 60))
    seed, sharp = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 12.0, 40.0]))
    random = np.random.default_rng(seed)
    logits = random.normal(0, sharp, (1, size))
    away = draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 300.0]))
    other = logits + random.normal(0, away, (1, size))
    if draw(st.booleans()):
        other = other[:, random.permutation(size)]
    given_token = draw(st.integers(0, size - 1))
    k, n = draw(st.integers(1, size)), draw(st.integers(1, size))
    return log_softmax(logits, axis=1), log_softmax(other, axis=1), [given_token], k, n


@settings(max_examples=MOST, deadline=None)
@given(pairs())
def test_a_bound_is_never_above_the_exact_value(pair: tuple[Floats, Floats, list[int], int, int]) -> None:
    ln_p, ln_q, answer, k, n = pair
    found = bounds(ln_p, ln_q, answer, k, n)
    kl, tv = exact(ln_p, ln_q)
    assert np.isfinite(found.kl).all()
    assert 0 <= found.kl[0] <= kl[0] * (1 + 1e-5) + 1e-6
    assert 0 <= found.tv[0] <= min(1, tv[0] + 1e-6)
    assert found.ln_p[0] == pytest.approx(ln_p[0, answer[0]], rel=1e-6, abs=1e-7)
    assert found.ln_q[0] == pytest.approx(ln_q[0, answer[0]], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("away", [0.1, 1.0])
def test_with_every_token_told_it_is_the_exact_value(away: float) -> None:
    random = np.random.default_rng(1)
    ln_p = log_softmax(random.normal(0, 2, (50, 30)), axis=1)
    ln_q = log_softmax(ln_p + random.normal(0, away, ln_p.shape), axis=1)
    answer = random.integers(0, 30, 50).tolist()
    found = bounds(ln_p, ln_q, answer, 30, 30)
    kl, tv = exact(ln_p, ln_q)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=2e-5)  # less the room that rounding is given
    np.testing.assert_allclose(found.tv, tv, rtol=1e-3, atol=2e-6)


def test_more_tokens_bound_more_closely() -> None:
    random = np.random.default_rng(2)
    ln_p = log_softmax(random.normal(0, 2, (200, 500)), axis=1)
    ln_q = log_softmax(ln_p + random.normal(0, 0.3, ln_p.shape), axis=1)
    answer = ln_p.argmax(axis=1).tolist()
    means = [bounds(ln_p, ln_q, answer, k, k).kl.mean() for k in (1, 5, 20, 100, 500)]
    assert means == sorted(means)
    assert means[2] > 0.2 * means[-1]


def test_two_that_are_the_same_are_at_nothing() -> None:
    ln_p = log_softmax(np.random.default_rng(3).normal(0, 6, (100, 1000)), axis=1)
    found = bounds(ln_p, ln_p, ln_p.argmax(axis=1).tolist(), 20, 20)
    assert found.kl.max() < 1e-6
    assert found.tv.max() < 1e-6


def test_the_likeliest_are_those_of_whole_distributions_and_of_ties_the_first() -> None:
    ln_p = np.log([[0.2, 0.3, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    ln_q = np.log([[0.4, 0.1, 0.1, 0.4], [0.1, 0.2, 0.4, 0.3]])
    found = bounds(ln_p, ln_q, [0, 0], 3, 2)
    assert found.top_p.tolist() == [1, 3]
    assert found.top_q.tolist() == [0, 2]


def test_a_rest_that_rounds_to_nothing_is_no_divergence() -> None:
    """Without room for rounding 1 − Σq would be 0 or below, and what p has there would count as infinitely far."""
    ln_p = np.log([[1 - 3e-7, 1e-7, 1e-7, 1e-7]])
    told = {0: {0: 0.0, 1: math.log(1.1e-7)}}
    found = lower_bounds(0, [0], likeliest_of(ln_p, [0], 2), told)
    assert found.kl[0] < 1e-6


def test_what_decode_does_not_tell_of_the_given_token_bounds_nothing() -> None:
    ln_p, ln_q = np.log([[0.5, 0.3, 0.15, 0.05]]), np.log([[0.4, 0.4, 0.1, 0.1]])
    likeliest = likeliest_of(ln_p, [3], 4)
    told = {0: {0: float(ln_q[0, 0]), 1: float(ln_q[0, 1])}}
    one = lower_bounds(0, [3], likeliest, told, {0: -2.0})
    other = lower_bounds(0, [3], likeliest, told, {0: -9.0})
    assert (one.ln_q[0], other.ln_q[0]) == (-2.0, -9.0)
    assert one.kl[0] == other.kl[0] > 0


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({}, "tells of no token"),
        ({1: -1.0}, "how likely token 0 is"),
        ({0: -0.1, 1: -0.1}, "add up to more than 1"),
        ({0: 12.5}, "add up to more than 1"),
        ({0: 1e300}, "add up to more than 1"),
        ({0: math.nan}, "no finite number"),
        ({0: -math.inf}, "no finite number"),
    ],
)
def test_what_is_no_distribution_is_refused(told: dict[int, Any], why: str) -> None:
    likeliest = likeliest_of(np.log([[0.5, 0.5]]), [0], 2)
    with pytest.raises(ValueError, match=why):
        lower_bounds(0, [0], likeliest, {0: told})


def test_of_no_positions_there_are_no_rows() -> None:
    found = lower_bounds(3, [0], likeliest_of(np.log([[0.5, 0.5]]), [0], 2), {})
    assert len(found) == 0
    assert found.kl.dtype == np.float64
