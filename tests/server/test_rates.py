"""A key's requests and tokens a minute."""

import pytest

from server.errors import RateExceeded
from server.rates import Rates


async def test_requests_beyond_the_minutes_are_refused_until_the_next() -> None:
    rates = Rates()
    standings = [await rates.take_request("ann", 3) for _ in range(3)]
    assert [standing.remaining for standing in standings] == [2, 1, 0]
    with pytest.raises(RateExceeded) as refusal:
        await rates.take_request("ann", 3)
    assert 1 <= int(refusal.value.headers["retry-after"]) <= 60
    assert refusal.value.type == "requests"


async def test_one_keys_limit_is_not_anothers() -> None:
    rates = Rates()
    await rates.take_request("ann", 1)
    await rates.take_request("bob", 1)
    with pytest.raises(RateExceeded):
        await rates.take_request("ann", 1)


async def test_tokens_are_counted_as_guessed_and_then_as_they_were() -> None:
    rates = Rates()
    standing, charge = await rates.take_tokens("ann", 100, 60)
    assert standing.remaining == 40
    with pytest.raises(RateExceeded) as refusal:
        await rates.take_tokens("ann", 100, 60)
    assert refusal.value.type == "tokens"
    await rates.settle(charge, 10)
    standing, _ = await rates.take_tokens("ann", 100, 60)
    assert standing.remaining == 30


async def test_a_refused_request_costs_no_tokens() -> None:
    rates = Rates()
    await rates.take_tokens("ann", 100, 60)
    for _ in range(3):
        with pytest.raises(RateExceeded):
            await rates.take_tokens("ann", 100, 60)
    standing, _ = await rates.take_tokens("ann", 100, 40)
    assert standing.remaining == 0


async def test_more_than_a_minutes_tokens_at_once_is_let_in_once_a_minute() -> None:
    rates = Rates()
    standing, charge = await rates.take_tokens("ann", 100, 5000)
    assert standing.remaining == 0
    with pytest.raises(RateExceeded):
        await rates.take_tokens("ann", 100, 1)
    await rates.settle(charge, 30)
    standing, _ = await rates.take_tokens("ann", 100, 1)
    assert standing.remaining == 69


async def test_what_was_counted_in_a_minute_that_is_over_is_not_given_back_to_the_next() -> None:
    now = 1000.0
    rates = Rates(clock=lambda: now)
    _, charge = await rates.take_tokens("ann", 100, 60)
    now = charge.window_ends + 1
    await rates.settle(charge, 0)
    now = 1000.0
    standing, _ = await rates.take_tokens("ann", 100, 10)
    assert standing.remaining == 30


async def test_what_a_request_took_beyond_its_minute_counts_in_the_next() -> None:
    now = 1000.0
    rates = Rates(clock=lambda: now)
    _, charge = await rates.take_tokens("ann", 100, 10)
    now = charge.window_ends + 1
    await rates.settle(charge, 85)
    now = 1000.0
    standing, _ = await rates.take_tokens("ann", 100, 10)
    assert standing.remaining == 100 - 85 - 10
