"""An engine that hangs is found and one that is busy is not taken for it; one that errs at everything rests."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

import server.engines.vitals
from server.engines.keeper import keep
from server.engines.patience import Patience
from server.engines.state import State
from server.engines.turns import Turns
from server.engines.vitals import Finding, Vitals
from server.launch.process import LocalProcess
from tests.server.conftest import Gateway

PROBE = "/v1/completions"
SOON = Patience(probe_every_s=0.04, probe_timeout_s=0.16, eject_after_errors=3, eject_s=0.1)
IDLE = (
    'vllm:prompt_tokens_total{engine="0"} 7.0\n'
    'vllm:generation_tokens_total{engine="0"} 7.0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
    'vllm:prompt_tokens_by_source_total{engine="0"} 7.0\n'
)

Metrics = Callable[[], str]


def engine_that(
    probe: Callable[[], Awaitable[web.StreamResponse]], metrics: Metrics = lambda: IDLE
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """An engine that treats a request for one token like this, and counts its work like that."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == PROBE:
            return await probe()
        if request.path == "/metrics":
            return web.Response(text=metrics())
        return web.json_response({"id": "x"})

    return handler


async def never() -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("the probe was not given up")


async def at_once() -> web.StreamResponse:
    return web.json_response({"choices": []})


async def badly() -> web.StreamResponse:
    return web.Response(status=500)


def probes(gateway: Gateway) -> int:
    return sum(request.path == PROBE for request in gateway.seen)


@asynccontextmanager
async def watching(
    gateway: Gateway, vitals: Vitals, is_up: Callable[[], bool] = lambda: True
) -> AsyncIterator["asyncio.Task[None]"]:
    replica = gateway.replica
    watch = asyncio.create_task(vitals.until_it_hangs(replica.engine, replica.tier.name, is_up, replica.erred))
    try:
        yield watch
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_silent_engine_is_asked_for_one_token_by_the_way_of_callers(gateway: Gateway) -> None:
    gateway.handler = engine_that(at_once)
    async with watching(gateway, Vitals(SOON)) as watch:
        await until(lambda: probes(gateway) >= 2)
        assert not watch.done()
    body = json.loads(gateway.bodies[0])
    assert (body["model"], body["max_tokens"]) == ("SmolLM2-135M-Instruct-Reference", 1)


async def test_an_engine_of_which_something_is_heard_is_not_asked(gateway: Gateway) -> None:
    gateway.handler = engine_that(at_once)
    vitals = Vitals(Patience(probe_every_s=0.2))
    async with watching(gateway, vitals):
        for _ in range(15):
            await asyncio.sleep(0.02)
            vitals.heard()
    assert probes(gateway) == 0


async def test_an_engine_that_sleeps_or_starts_is_not_asked(gateway: Gateway) -> None:
    gateway.handler = engine_that(never)
    async with watching(gateway, Vitals(SOON), is_up=lambda: False) as watch:
        await asyncio.sleep(3 * SOON.probe_every_s)
        assert not watch.done()
    assert probes(gateway) == 0


@pytest.mark.parametrize("dead", ["core", "API server"])
async def test_an_engine_that_gives_no_sign_hangs(gateway: Gateway, dead: str) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        return await never()

    gateway.handler = engine_that(never) if dead == "core" else silent
    began = time.monotonic()
    async with watching(gateway, Vitals(SOON)) as watch:
        await asyncio.wait_for(watch, 5)
    assert time.monotonic() - began < SOON.probe_every_s + SOON.probe_timeout_s + 2


@pytest.mark.parametrize("name", ["prompt_tokens_total", "generation_tokens_total", "kv_cache_usage_perc"])
async def test_an_engine_that_is_busy_with_others_does_not_hang(gateway: Gateway, name: str) -> None:
    """Its places are all taken, or a long prompt takes every step: the probe waits, and the counts move."""
    steps = itertools.count()

    def metrics() -> str:
        return IDLE + f'vllm:{name}{{engine="1"}} {next(steps)}\n'

    gateway.handler = engine_that(never, metrics)
    async with watching(gateway, Vitals(Patience(probe_every_s=0.04, probe_timeout_s=0.3))) as watch:
        await until(lambda: watch.done() or probes(gateway) == 2)
        assert not watch.done()


async def test_counts_that_move_without_any_work_are_none(gateway: Gateway) -> None:
    asked = itertools.count()
    gateway.handler = engine_that(never, lambda: IDLE + f"http_requests_total {next(asked)}\n")
    assert await Vitals(SOON).probe(gateway.replica.engine, "m") is Finding.HANGS


async def test_a_chunk_that_comes_while_a_probe_waits_is_a_sign(gateway: Gateway) -> None:
    gateway.handler = engine_that(never)
    vitals = Vitals(SOON)
    asyncio.get_running_loop().call_later(0.1, vitals.heard)
    assert await vitals.probe(gateway.replica.engine, "m") is Finding.WORKS


async def test_a_pause_of_the_gateway_itself_is_no_silence_of_the_engine(gateway: Gateway) -> None:
    async def slowly() -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.2)  # this engine goes on meanwhile
        await asyncio.sleep(0.12)
        return await at_once()

    gateway.handler = engine_that(slowly)
    assert await Vitals(SOON).probe(gateway.replica.engine, "m") is Finding.WORKS


async def test_a_probe_that_is_given_up_leaves_the_engine(gateway: Gateway) -> None:
    left = asyncio.Event()

    async def notices() -> web.StreamResponse:
        (request,) = [each for each in gateway.seen if each.path == PROBE]
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        left.set()
        return await at_once()

    gateway.handler = engine_that(notices)
    await Vitals(SOON).probe(gateway.replica.engine, "m")
    await asyncio.wait_for(left.wait(), 5)


async def test_a_stream_on_an_engine_that_hangs_gets_its_error_event(gateway: Gateway, tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/chat/completions":
            return await engine_that(never)(request)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        begun.set()
        return await never()

    gateway.handler = handler
    gateway.replica.lose_patience(SOON)
    gateway.replica.hold(await LocalProcess.start(["sleep", "60"], {}, tmp_path / "log"))
    asking = asyncio.create_task(gateway.post())
    await begun.wait()
    keeping = asyncio.create_task(keep(gateway.replica))
    answer = await asyncio.wait_for(asking, 5)
    assert b"engine_failed" in answer.body
    assert gateway.replica.state is State.RESTARTING
    assert (await gateway.post()).headers["retry-after"]
    keeping.cancel()


class Clock:
    """Time as a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(server.engines.vitals, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_only_errors_in_a_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    vitals = Vitals(Patience())
    for _ in range(4):
        assert vitals.erred() is None
    vitals.answered()
    for _ in range(4):
        assert vitals.erred() is None
    assert vitals.erred() == 10


def test_who_errs_again_soon_rests_twice_as_long_up_to_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, vitals = Clock(monkeypatch), Vitals(Patience(eject_after_errors=1))
    rests = []
    for _ in range(6):
        rests.append(vitals.erred())
        clock.now += (rests[-1] or 0) + 5
    assert rests == [10, 20, 40, 80, 120, 120]
    clock.now += 120
    assert vitals.erred() == 10, "after a good while it is forgotten"


async def test_an_engine_that_errs_at_every_request_gets_none_for_a_while(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await (at_once() if request.path == PROBE else badly())

    gateway.handler = handler
    gateway.replica.lose_patience(SOON)
    statuses = [(await gateway.post()).status for _ in range(4)]
    assert statuses == [500, 500, 500, 503]
    answer = await gateway.post()
    assert json.loads(answer.body)["error"]["code"] == "tier_unavailable"
    assert "its engine is suspended" in json.loads(answer.body)["error"]["message"]
    assert answer.headers["retry-after"] == "1"
    assert gateway.metric("assay_engine_ejections_total") == 1
    assert gateway.metric("assay_tier_ready") == gateway.metric("assay_replicas_ready") == 0
    assert probes(gateway) == 0
    await until(lambda: gateway.replica.state is State.READY)
    assert probes(gateway) == 1
    assert (await gateway.post()).status == 500, "it is asked again"


@pytest.mark.parametrize("probe", [badly, never])
async def test_an_engine_that_errs_still_after_its_rest_is_replaced(
    gateway: Gateway, probe: Callable[[], Awaitable[web.StreamResponse]]
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await (probe() if request.path == PROBE else engine_that(badly)(request))

    gateway.handler = handler
    gateway.replica.lose_patience(SOON)
    for _ in range(SOON.eject_after_errors):
        gateway.replica.erred()
    assert gateway.replica.state is State.SUSPENDED
    await until(lambda: gateway.replica.state is State.RESTARTING)


async def test_errors_at_probes_count_too(gateway: Gateway) -> None:
    """An engine that nobody asks would otherwise be found broken by its next caller."""
    gateway.handler = engine_that(badly)
    gateway.replica.lose_patience(SOON)
    async with watching(gateway, Vitals(SOON)):
        await until(lambda: gateway.replica.state is State.SUSPENDED)
    assert probes(gateway) >= SOON.eject_after_errors


async def test_a_request_that_the_engine_refuses_is_no_error_of_its(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=400)

    gateway.handler = handler
    gateway.replica.lose_patience(SOON)
    for _ in range(2 * SOON.eject_after_errors):
        assert (await gateway.post()).status == 400
    assert gateway.replica.state is State.READY


async def test_a_suspended_engine_gives_its_memory_to_whose_turn_it_is(gateway: Gateway) -> None:
    gateway.handler = engine_that(at_once)
    gateway.replica.lose_patience(SOON)
    gateway.replica.take_turns(Turns(60))
    for _ in range(SOON.eject_after_errors):
        gateway.replica.erred()
    await gateway.replica.sleep()
    assert gateway.replica.state is State.ASLEEP
    await asyncio.sleep(2 * SOON.eject_s)
    assert gateway.replica.state is State.ASLEEP, "it is not probed awake"
    assert (await gateway.post()).status == 200


async def test_stopping_a_suspended_replica_leaves_no_task(gateway: Gateway) -> None:
    gateway.replica.lose_patience(SOON)
    for _ in range(SOON.eject_after_errors):
        gateway.replica.erred()
    before = asyncio.all_tasks()
    await gateway.replica.stop()
    await asyncio.sleep(0.01)
    (probation,) = before - asyncio.all_tasks()
    assert probation.cancelled()
    assert gateway.replica.state is State.STOPPED
    assert gateway.seen == []


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
async def test_what_only_the_api_server_answers_does_not_hide_a_core_that_hangs(
    gateway: Gateway, path: str
) -> None:
    """Tokens of a text, and the status of a stream that never begins."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == PROBE:
            return await never()
        if request.path == "/tokenize":
            return web.json_response({"count": 1, "tokens": [1]})
        if request.path == "/metrics":
            return web.Response(text=IDLE)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(60)
        return response

    gateway.handler = handler
    gateway.replica.lose_patience(SOON)

    found = asyncio.Event()
    body = {"model": "SmolLM2-135M-Instruct"} | ({"prompt": "x"} if path == "/tokenize" else {"stream": True})

    async def traffic() -> None:
        while not found.is_set():
            leave = asyncio.Event()
            asyncio.get_running_loop().call_later(0.05, leave.set)
            await gateway.post(json.dumps(body).encode(), path=path, leave_after=leave)
            await asyncio.sleep(0.01)

    callers = asyncio.create_task(traffic())
    try:
        async with watching(gateway, gateway.replica.vitals) as watch:
            await asyncio.wait_for(watch, 3)
    finally:
        found.set()
        await callers


async def test_an_engine_that_errs_inside_its_streams_rests_too(gateway: Gateway) -> None:
    gateway.replica.lose_patience(SOON)

    async def handler(request: web.Request) -> web.StreamResponse:
        error = b'data: {"error": {"message": "no", "code": 500}}\n\ndata: [DONE]\n\n'
        return web.Response(body=error, content_type="text/event-stream")

    gateway.handler = handler
    for _ in range(SOON.eject_after_errors):
        await gateway.post(b'{"model":"SmolLM2-135M-Instruct","stream":true}')
    assert gateway.replica.state is State.SUSPENDED
