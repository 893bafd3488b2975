"""A tier with `idle: sleep`: asleep it can still answer, and its caller waits until it has woken."""

import asyncio
import json

import pytest
from aiohttp import web

from server.engines.affinity import Work
from server.engines.state import State
from server.engines.turns import Turns
from tests.server.conftest import Gateway
from tests.server.engines.drained import Runs, slow_to_wake
from tests.server.engines.test_turns import Bed, Memory
from tiers.probe.reading import SLEEP_ROUTE, WAKE_ROUTE


def paths(gateway: Gateway) -> list[str]:
    return [request.path for request in gateway.seen]


async def answers(request: web.Request) -> web.StreamResponse:
    return web.json_response({"id": "x"})


async def test_a_request_wakes_a_sleeping_tier(gateway: Gateway) -> None:
    gateway.handler = answers
    gateway.replica.take_turns(Turns(60))
    await gateway.replica.sleep()
    assert gateway.replica.state is State.ASLEEP
    assert gateway.metric("assay_tier_asleep") == 1
    ready = await gateway.post(b"", path="/readyz", method="GET")
    assert ready.status == 200
    assert "asleep" in ready.body.decode()
    assert (await gateway.post()).status == 200
    assert paths(gateway) == [SLEEP_ROUTE, WAKE_ROUTE, "/v1/chat/completions"]
    assert gateway.metric("assay_tier_asleep") == 0
    assert gateway.metric("assay_wake_seconds_count") == 1


async def test_an_engine_that_slept_has_lost_what_it_had_read(gateway: Gateway) -> None:
    """With the GPU's memory goes its KV cache."""
    gateway.handler = answers
    load = gateway.replica.load
    load.remember(Work(prompt=1000, head=7))
    assert load.knows(7)
    await gateway.replica.sleep()
    assert not load.knows(7)


async def test_an_idle_tier_falls_asleep(gateway: Gateway) -> None:
    gateway.handler = answers
    gateway.replica.take_turns(Turns(0.05))
    await gateway.post()
    async with asyncio.timeout(5):
        while gateway.replica.state is not State.ASLEEP:
            await asyncio.sleep(0.01)
    assert (await gateway.post()).status == 200


async def test_a_tier_that_cannot_wake_is_unavailable_and_started_again(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500 if request.path == WAKE_ROUTE else 200)

    gateway.handler = handler
    gateway.replica.take_turns(Turns(60))
    await gateway.replica.sleep()
    answer = await gateway.post()
    assert answer.status == 503
    assert json.loads(answer.body)["error"]["code"] == "tier_unavailable"
    assert gateway.replica.state is State.RESTARTING


async def test_while_an_engine_of_the_group_starts_a_caller_is_told_so(gateway: Gateway) -> None:
    """It takes minutes; nobody should hang for so long."""
    gateway.handler = answers
    turns = Turns(60)
    gateway.replica.take_turns(turns)
    other = Bed("other", Memory())
    async with turns.starting(other):
        answer = await gateway.post()
    assert answer.status == 503
    assert "retry-after" in answer.headers
    turns.close()


async def test_a_start_that_is_given_up_frees_its_memory_before_others_wake(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle of a start: who was served before still answers what was accepted."""
    turns, replica, ended = Turns(60), gateway.replica, asyncio.Event()

    class Ends(Runs):
        async def stop(self) -> None:
            assert turns.is_starting, "its memory is not free yet"
            ended.set()

    async def loads(say: object) -> None:
        replica.connect(replica.url)
        replica.engine.process = Ends()
        replica.state = State.STARTING
        await asyncio.Event().wait()

    replica.take_turns(turns)
    monkeypatch.setattr(replica, "_start", loads)
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0.02)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert ended.is_set()
    turns.close()


async def test_a_request_that_waits_for_its_engine_to_wake_counts_as_running(gateway: Gateway) -> None:
    """A stop lets it finish."""
    waking = asyncio.Event()

    gateway.handler = slow_to_wake(waking)
    gateway.replica.take_turns(Turns(60))
    await gateway.replica.sleep()
    request = asyncio.create_task(gateway.post())
    async with asyncio.timeout(5):
        while not gateway.replica.running:
            await asyncio.sleep(0.01)
    waking.set()
    assert (await request).status == 200
    assert gateway.replica.running == 0


async def test_an_engine_that_cannot_sleep_is_ended_for_its_memory_is_wanted(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500 if request.path == SLEEP_ROUTE else 200)

    gateway.handler = handler
    await gateway.replica.sleep()
    assert gateway.replica.state is State.RESTARTING
    assert (await gateway.post()).status == 503
    assert paths(gateway) == [SLEEP_ROUTE]
