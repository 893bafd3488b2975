"""Limits of keys that several gateways count together, in a real Redis."""

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import server.shared_limits
from server.config import Config
from server.config_file import load_config
from server.errors import RateExceeded, TooManyAtOnce
from server.keys import Key, KeyFile
from server.launch.process import free_port
from server.limits import Entry, Limits, LimitsNotShared, LocalLimits, check_limits, limits_of
from server.shared_limits import LimitsUnreachable, RedisUnreachable, SharedLimits
from tests.server.conftest import running_gateway
from tests.server.redis_server import RedisServer, redis_server
from tests.server.test_admission import BODY, USAGE, bearer, code_of, quick, quick_after
from tiers.errors import ConfigError

GUESS = len(BODY) // 4 + 10
"""Tokens that a request of the tests may take."""


@pytest.fixture(scope="module")
def _one_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis(_one_redis: RedisServer) -> RedisServer:
    """One that has counted nothing."""
    with _one_redis.ask() as client:
        client.flushall()
        client.config_resetstat()
    return _one_redis


@pytest.fixture
async def two(redis: RedisServer) -> AsyncIterator[tuple[SharedLimits, SharedLimits]]:
    """The limits of two gateways."""
    both = SharedLimits(redis.url, None), SharedLimits(redis.url, None)
    yield both
    for each in both:
        await each.close()


@pytest.fixture(params=["memory", "redis"])
async def limits(request: pytest.FixtureRequest) -> AsyncIterator[Limits]:
    """In either place: what a caller sees is the same."""
    made: Limits = LocalLimits()
    if request.param == "redis":
        made = SharedLimits(request.getfixturevalue("redis").url, None)
    yield made
    await made.close()


def key_with(name: str = "ann", **limits: Any) -> Key:
    return Key(name=name, id="0" * 12, salt=b"0" * 16, hash=b"0" * 32, created=datetime.now(UTC), **limits)


async def how_many(tries: int, attempt: Callable[[], Awaitable[object]]) -> int:
    """How many of so many at once are let in."""

    async def is_let_in() -> bool:
        try:
            await attempt()
        except (RateExceeded, TooManyAtOnce):
            return False
        return True

    return sum(await asyncio.gather(*(is_let_in() for _ in range(tries))))


async def test_a_minutes_requests_are_told_and_refused_alike_in_either_place(limits: Limits) -> None:
    key = key_with(requests_per_minute=3)
    standings = [(await limits.enter(key)).standing for _ in range(3)]
    assert [(each.limit, each.remaining, each.reset_s) for each in standings if each] == [
        (3, 2, 60),
        (3, 1, 60),
        (3, 0, 60),
    ]
    with pytest.raises(RateExceeded) as refusal:
        await limits.enter(key)
    assert refusal.value.type == "requests"
    assert 58 <= refusal.value.retry_after <= 60
    await limits.enter(key_with("bob", requests_per_minute=1))


async def test_a_minutes_tokens_are_told_refused_and_corrected_alike_in_either_place(limits: Limits) -> None:
    key = key_with(tokens_per_minute=100)
    standing, charge = await limits.take_tokens(key, 100, 60)
    assert (standing.remaining, standing.reset_s) == (40, 60)
    for _ in range(3):
        with pytest.raises(RateExceeded) as refusal:
            await limits.take_tokens(key, 100, 60)
        assert refusal.value.type == "tokens"
    entry = await limits.enter(key)
    await limits.leave(key, entry, charge, 10)
    standing, charge = await limits.take_tokens(key, 100, 60)
    assert standing.remaining == 30
    await limits.leave(key, await limits.enter(key), charge, 85)
    with pytest.raises(RateExceeded):
        await limits.take_tokens(key, 100, 6)
    assert (await limits.take_tokens(key, 100, 5))[0].remaining == 0


async def test_more_than_a_minutes_tokens_at_once_is_let_in_alike_in_either_place(limits: Limits) -> None:
    key = key_with(tokens_per_minute=100)
    standing, charge = await limits.take_tokens(key, 100, 5000)
    assert standing.remaining == 0
    with pytest.raises(RateExceeded):
        await limits.take_tokens(key, 100, 1)
    await limits.leave(key, await limits.enter(key), charge, 30)
    assert (await limits.take_tokens(key, 100, 1))[0].remaining == 69


async def test_one_that_a_minutes_requests_refuse_is_not_under_way_in_either_place(limits: Limits) -> None:
    key = key_with(requests_per_minute=1, concurrent_requests=2)
    first = await limits.enter(key)
    for _ in range(3):
        with pytest.raises(RateExceeded):
            await limits.enter(key)
    more = key_with(concurrent_requests=2)
    second = await limits.enter(more)
    with pytest.raises(TooManyAtOnce):
        await limits.enter(more)
    for entry in (first, second):
        await limits.leave(more, entry, None, None)
    await limits.enter(more)


async def test_two_gateways_let_through_exactly_the_limit(two: tuple[SharedLimits, SharedLimits]) -> None:
    requests, at_once = key_with(requests_per_minute=37), key_with("bob", concurrent_requests=11)
    tokens = key_with("eve", tokens_per_minute=1000)
    for key, let_in in ((requests, 37), (at_once, 11)):
        assert sum(await asyncio.gather(*(how_many(60, partial(each.enter, key)) for each in two))) == let_in
    taken = await asyncio.gather(*(how_many(60, partial(each.take_tokens, tokens, 1000, 30)) for each in two))
    assert sum(taken) == 1000 // 30
    assert min(taken) > 0, "one of the gateways had no part in it"


async def test_what_was_counted_in_a_minute_that_is_over_is_not_given_back_to_the_next(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer
) -> None:
    key = key_with(tokens_per_minute=100)
    _, less = await two[0].take_tokens(key, 100, 30)
    _, more = await two[0].take_tokens(key, 100, 10)
    with redis.ask() as client:
        client.delete("assay:{ann}:tokens")  # as the end of the minute does
    await two[1].take_tokens(key, 100, 50)
    await two[0].leave(key, Entry(), less, 0)
    assert (await two[1].take_tokens(key, 100, 1))[0].remaining == 49
    await two[0].leave(key, Entry(), more, 25)
    assert (await two[1].take_tokens(key, 100, 1))[0].remaining == 49 - 15 - 1


async def test_a_minute_ends(two: tuple[SharedLimits, SharedLimits], redis: RedisServer) -> None:
    key = key_with(requests_per_minute=1)
    await two[0].enter(key)
    with redis.ask() as client:
        assert 59_000 < client.pttl("assay:{ann}:requests") <= 60_000
        client.hset("assay:{ann}:requests", "ends", round(time.time() * 1000) - 1)
    entry = await two[1].enter(key)
    assert entry.standing is not None
    assert entry.standing.reset_s == 60


async def test_the_requests_of_a_gateway_that_died_end_by_themselves_and_no_others(
    two: tuple[SharedLimits, SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.shared_limits, "LEASE_S", 0.3)
    monkeypatch.setattr(server.shared_limits, "REFRESH_S", 0.05)
    key = key_with(concurrent_requests=2)
    dead, living = two
    await dead.enter(key)
    await living.enter(key)
    with pytest.raises(TooManyAtOnce):
        await living.enter(key)
    await dead.close()  # it refreshes nothing any more
    await asyncio.sleep(0.35)
    await living.enter(key)
    with pytest.raises(TooManyAtOnce):
        await living.enter(key)


async def test_what_runs_counts_again_in_a_redis_that_lost_it(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.shared_limits, "REFRESH_S", 0.05)
    key = key_with(concurrent_requests=1)
    entry = await two[0].enter(key)
    redis.kill()
    await asyncio.sleep(0.12)
    redis.start()
    await asyncio.sleep(0.12)
    with pytest.raises(TooManyAtOnce):
        await two[1].enter(key)
    await two[0].leave(key, entry, None, None)
    await two[1].enter(key)


async def test_a_request_that_ends_while_leases_are_refreshed_does_not_stay(
    two: tuple[SharedLimits, SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, key = two[0], key_with(concurrent_requests=1)
    entry = await limits.enter(key)
    refresh = limits._refresh

    async def late(*arguments: Any) -> object:
        await limits.leave(key, entry, None, None)
        return await refresh(*arguments)

    monkeypatch.setattr(limits, "_refresh", late)
    await limits._refresh_leases("ann")
    await two[1].enter(key)


async def test_a_redis_that_does_not_answer_holds_nobody_up_and_lets_nobody_in(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, limits = key_with(requests_per_minute=100), two[0]
    await limits.enter(key)
    monkeypatch.setattr(server.shared_limits, "PATIENCE_S", 0.1)
    with redis.hanging():
        began = time.monotonic()
        outcomes = await asyncio.gather(*(limits.enter(key) for _ in range(50)), return_exceptions=True)
        assert time.monotonic() - began < 3, "one after the other they would take 5 s"
        assert {type(outcome) for outcome in outcomes} == {LimitsUnreachable}
    answers = [await limits.enter(key) for _ in range(3)]
    left = [answer.standing.remaining for answer in answers if answer.standing]
    assert left == sorted(left, reverse=True), "an answer to one of those who went was taken for another's"
    assert len(set(left)) == 3


@pytest.mark.parametrize("leaves", [False, True])
async def test_what_redis_counted_while_it_did_not_answer_is_taken_back_once_it_does(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Its caller is refused after a moment, or leaves before."""
    key, limits = key_with(concurrent_requests=1), two[0]
    await limits.leave(key, await limits.enter(key), None, None)
    monkeypatch.setattr(server.shared_limits, "PATIENCE_S", 60 if leaves else 0.1)
    with redis.hanging(), pytest.raises((LimitsUnreachable, TimeoutError)):
        await asyncio.wait_for(limits.enter(key), 0.2)
    monkeypatch.setattr(server.shared_limits, "PATIENCE_S", 1)
    async with asyncio.timeout(3):  # a lease lasts for 15 s
        while not await how_many(1, partial(two[1].enter, key)):
            await asyncio.sleep(0.02)


async def test_a_request_that_could_not_be_counted_out_is_taken_back_too(
    two: tuple[SharedLimits, SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise OSError("as the test wants")

    key, limits = key_with(concurrent_requests=1), two[0]
    entry = await limits.enter(key)
    monkeypatch.setattr(limits, "_leave", fails)
    await limits.leave(key, entry, None, None)
    async with asyncio.timeout(3):
        while not await how_many(1, partial(two[1].enter, key)):
            await asyncio.sleep(0.02)


async def test_a_key_whose_leases_cannot_be_refreshed_does_not_hold_up_others(
    two: tuple[SharedLimits, SharedLimits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.shared_limits, "LEASE_S", 0.3)
    monkeypatch.setattr(server.shared_limits, "REFRESH_S", 0.05)
    limits, keys = two[0], [key_with(name, concurrent_requests=1) for name in ("ann", "bob")]
    for key in keys:
        await limits.enter(key)
    refresh = limits._refresh

    async def fails_for_ann(names: list[str], arguments: Any) -> object:
        if "ann" in names[0]:
            raise OSError("as the test wants")
        return await refresh(names, arguments)

    monkeypatch.setattr(limits, "_refresh", fails_for_ann)
    await asyncio.sleep(0.2)
    await asyncio.sleep(0.2)
    assert await how_many(1, partial(two[1].enter, keys[0])) == 1, "hers have ended"
    assert await how_many(1, partial(two[1].enter, keys[1])) == 0


async def test_a_clock_of_rediss_that_is_set_back_locks_nobody_out(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer
) -> None:
    key, later = key_with(requests_per_minute=1, concurrent_requests=1), 3_600_000
    await two[0].enter(key)
    with redis.ask() as client:
        client.hincrby("assay:{ann}:requests", "ends", later)
        client.persist("assay:{ann}:requests")
        ((lease, _),) = client.zrange("assay:{ann}:leases", 0, -1, withscores=True)
        client.zincrby("assay:{ann}:leases", later, lease)
    await two[1].enter(key)


async def test_a_redis_that_has_vanished_is_found_out_before_a_request_waits_for_it() -> None:
    port = free_port()
    with redis_server("--port", str(port)):
        limits = SharedLimits(f"redis://127.0.0.1:{port}", None)
        await limits.check()
        (connection,) = limits._redis.connection_pool._available_connections
        assert connection._writer is not None
        with socket.fromfd(connection._writer.get_extra_info("socket").fileno(), socket.AF_INET, 0) as own:
            for option in socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL:
                assert own.getsockopt(socket.IPPROTO_TCP, option) <= 5, "minutes or hours by default"
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 15_000
        await limits.close()


async def test_a_lost_redis_is_told_once_and_so_is_its_return(
    two: tuple[SharedLimits, SharedLimits], redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    limits, key = two[0], key_with(requests_per_minute=9, concurrent_requests=9)
    entry = await limits.enter(key)
    redis.kill()
    for _ in range(3):
        with pytest.raises(LimitsUnreachable) as refusal:
            await limits.enter(key)
        assert int(refusal.value.headers["retry-after"]) >= 1
    await limits.leave(key, entry, None, None)  # does not fail whose answer is out
    redis.start()
    for _ in range(3):
        await limits.enter(key)
    said = [(record.levelno, record.message) for record in caplog.records if record.name == "assay.limits"]
    assert [level for level, _ in said] == [logging.ERROR, logging.WARNING]
    assert "requests of keys with limits are refused until it does" in said[0][1]


async def test_two_gateways_hold_a_caller_to_one_limit_and_do_without_redis_for_others(
    tmp_path: Path, redis: RedisServer
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    few, busy, free = (
        bearer(file.add("few", requests_per_minute=5)),
        bearer(file.add("busy", concurrent_requests=3, tokens_per_minute=1000)),
        bearer(file.add("free")),
    )
    go = asyncio.Event()

    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(
                running_gateway(tmp_path / name, keys=file.path, limits=redis.url, tier={"max_num_seqs": 8})
            )
            for name in ("a", "b")
        ]
        for gateway in gateways:
            gateway.handler = quick

        def post(headers: dict[str, str], times: int) -> list[asyncio.Task[Any]]:
            return [asyncio.create_task(gateways[i % 2].post(BODY, headers=headers)) for i in range(times)]

        answers = await asyncio.gather(*post(few, 12))
        assert Counter(answer.status for answer in answers) == {200: 5, 429: 7}
        left = [a.headers["x-ratelimit-remaining-requests"] for a in answers if a.status == 200]
        assert sorted(left) == ["0", "1", "2", "3", "4"]

        for gateway in gateways:
            gateway.handler = quick_after(go)
        held = post(busy, 8)
        while len(refused := [each.result() for each in held if each.done()]) < 5:
            await asyncio.sleep(0.01)
        go.set()
        assert {code_of(answer) for answer in refused} == {"concurrency_limit_exceeded"}
        assert sorted([(await each).status for each in held]) == [200] * 3 + [429] * 5
        answer = await gateways[1].post(BODY, headers=busy)
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 1000 - 3 * USAGE["total_tokens"] - GUESS

        asked = redis.scripts_run()
        assert [(await each).status for each in post(free, 4)] == [200] * 4
        assert redis.scripts_run() == asked

        redis.kill()
        answers = await asyncio.gather(*post(busy, 2), *post(free, 2))
        assert [answer.status for answer in answers] == [503, 503, 200, 200]
        assert code_of(answers[0]) == "limits_unreachable"
        assert "retry-after" in answers[0].headers
        counted = gateways[0].metrics.registry.get_sample_value
        assert (
            counted("assay_requests_total", {"tier": "none", "status": "503", "code": "limits_unreachable"}) == 1
        )
        redis.start()
        assert [(await each).status for each in post(busy, 2)] == [200] * 2


@pytest.mark.parametrize(
    ("limited", "trips"),
    [
        ({"requests_per_minute": 100}, 1),
        ({"tokens_per_minute": 10_000}, 2),
        ({"requests_per_minute": 100, "tokens_per_minute": 10_000, "concurrent_requests": 5}, 3),
    ],
    ids=["requests", "tokens", "all"],
)
async def test_a_request_asks_redis_no_more_often_than_it_must(
    tmp_path: Path, redis: RedisServer, limited: dict[str, Any], trips: int
) -> None:
    headers = bearer(KeyFile(tmp_path / "keys.json").add("ann", **limited))
    async with running_gateway(tmp_path, limits=redis.url) as gateway:
        gateway.handler = quick
        await gateway.post(BODY, headers=headers)  # may find that Redis does not know the scripts yet
        before = redis.scripts_run()
        for _ in range(4):
            assert (await gateway.post(BODY, headers=headers)).status == 200
        assert redis.scripts_run() - before == 4 * trips


async def test_a_start_says_in_one_sentence_that_redis_is_not_there(tmp_path: Path) -> None:
    config = Config(limits=f"unix://{tmp_path}/none.sock")
    with pytest.raises(RedisUnreachable, match=r"none\.sock .*: start it, or correct `limits`"):
        await check_limits(config)


async def test_a_redis_with_a_password_is_given_it_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with redis_server("--requirepass", "hush-hush") as redis:
        with pytest.raises(RedisUnreachable, match="Authentication required") as error:
            await check_limits(Config(limits=redis.url))
        file.write_text("wrong-one\n")
        with pytest.raises(RedisUnreachable) as wrong:
            await check_limits(Config(limits=redis.url, limits_password=file))
        assert "wrong-one" not in f"{error.value} {wrong.value}"
        file.write_text("hush-hush\n")
        await check_limits(Config(limits=redis.url, limits_password=file))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://host",
        "redis://",
        "redis://host:port",
        "redis://host/0?socket_timeout=9",
        "unix://",
    ],
)
def test_what_is_no_url_of_a_redis_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="limits: "):
        Config(limits=url)


@pytest.mark.parametrize("url", ["redis://:hush@host:6379/0", "unix:///a.sock?password=hush"])
def test_a_password_in_the_config_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"limits: '{url}'")
    with pytest.raises(ConfigError, match="limits_password") as error:
        load_config(tmp_path / "c.yaml")
    assert "hush" not in str(error.value)


async def test_several_workers_count_nobodys_limits_for_themselves(tmp_path: Path) -> None:
    config = Config(home=tmp_path, workers=2)
    KeyFile(config.keys_file).add("free")
    await check_limits(config)
    limits = limits_of(config)
    with pytest.raises(LimitsNotShared):  # a key that was added while they ran
        await limits.enter(key_with(requests_per_minute=1))
    KeyFile(config.keys_file).add("ann", tokens_per_minute=1)
    with pytest.raises(ConfigError, match=r"'ann' has limits, .*2 workers"):
        await check_limits(config)
