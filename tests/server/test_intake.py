"""A server that is told to stop answers all that it has accepted, within its time, and says that it is ending."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from server.config import Config
from server.engines.drains import Work
from server.engines.state import State
from server.listener import http_server, listening_socket
from server.serve import _drain, _stop_gateway
from server.stop import Stop
from tests.server.engines.drained import STREAM, TIER, a_moment, drained_gateway, is_whole, until


def settings(folder: Path, grace_s: float = 0.1, timeout_s: float = 5) -> Config:
    return Config(home=folder, drain_grace_s=grace_s, drain_timeout_s=timeout_s)


async def test_what_waits_in_the_queue_is_accepted_too_and_the_rest_is_refused(tmp_path: Path) -> None:
    async with drained_gateway(tmp_path) as (engines, drains):
        gateway, intake = engines.gateway, engines.gateway.app.intake
        before = engines.ask(50)  # two run, for there are as many places
        await until(lambda: engines.begun == 2)
        stopping = asyncio.create_task(_drain(settings(tmp_path), intake, drains, Stop()))
        await asyncio.sleep(0)
        within_the_grace = engines.ask()
        assert (await gateway.post(b"", path="/readyz", method="GET")).status == 503
        health = await gateway.post(b"", path="/healthz", method="GET")
        assert health.status == 200
        assert health.headers["connection"] == "close", "the next request is to go to another server"
        await asyncio.sleep(0.2)
        refused = await gateway.post(STREAM)
        assert (refused.status, refused.error["code"]) == (503, "server_stopping")
        assert "retry-after" in refused.headers
        assert not stopping.done()
        engines.may_end.set()
        assert all(is_whole(answer) for answer in await asyncio.gather(*before, *within_the_grace))
        await asyncio.wait_for(stopping, 1)
        assert intake.under_way == 0


@pytest.mark.parametrize("part", ["half its head", "half its body"])
async def test_a_request_of_which_only_a_part_had_come_is_accepted(tmp_path: Path, part: str) -> None:
    config = settings(tmp_path, grace_s=0.2)
    async with drained_gateway(tmp_path) as (engines, drains), AsyncExitStack() as ending:
        engines.may_end.set()
        listener = ending.enter_context(listening_socket("127.0.0.1", 0))
        server = http_server(engines.gateway.app, config, engines.gateway.metrics)
        serving = asyncio.create_task(server.serve([listener]))
        ending.push_async_callback(_stop_gateway, server, serving)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(STREAM)
        request = head + STREAM
        half = len(head) // 2 if part == "half its head" else len(head) + len(STREAM) // 2
        writer.write(request[:half])
        await until(lambda: server.server_state.connections)
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(_drain(config, engines.gateway.app.intake, drains, Stop()))
        await asyncio.sleep(0.1 if part == "half its head" else 0.3)
        writer.write(request[half:])
        answer = await asyncio.wait_for(reader.readuntil(b"[DONE]"), 3)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        await asyncio.wait_for(stopping, 1)
        writer.close()


@pytest.mark.parametrize("ends_it", ["the time is over", "a second signal"])
async def test_what_takes_too_long_is_not_waited_for(tmp_path: Path, ends_it: str) -> None:
    async with drained_gateway(tmp_path) as (engines, drains):
        running, stop = engines.ask(), Stop()
        await until(lambda: engines.begun == 1)
        timeout_s = 0.1 if ends_it == "the time is over" else 60
        stopping = asyncio.create_task(
            _drain(settings(tmp_path, 0, timeout_s), engines.gateway.app.intake, drains, stop)
        )
        if ends_it == "a second signal":
            await asyncio.sleep(0.02)
            stop.at_once.set()
        await asyncio.wait_for(stopping, 1)
        await engines.gateway.fleet.stop()
        assert "broke off" in (await running[0]).body.decode()


async def test_an_engine_that_requests_wait_for_is_waited_for_as_well(tmp_path: Path) -> None:
    """The server is told to stop in the middle of a rolling restart."""
    async with drained_gateway(tmp_path) as (engines, drains):
        second = engines.add(tmp_path)
        second.state = State.REFUSED  # so that the first one is the only one
        untouched = second.engine
        engines.may_end.set()
        engines.may_start.clear()
        drain = drains.begin(TIER, Work.RESTART)
        await until(lambda: engines.gateway.replica.state is State.RESTARTING)
        waiting = engines.ask(3)
        await a_moment()
        stopping = asyncio.create_task(_drain(settings(tmp_path, 0), engines.gateway.app.intake, drains, Stop()))
        await a_moment()
        assert not stopping.done()
        engines.may_start.set()
        assert all(is_whole(answer) for answer in await asyncio.gather(*waiting))
        await asyncio.wait_for(stopping, 1)
        await asyncio.gather(drain.task, return_exceptions=True)
        assert second.engine is untouched, "the next one is not begun any more"


async def test_a_mistake_while_it_stops_is_in_the_log_and_does_not_hold_it_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def drains() -> None:
        raise RuntimeError("unforeseen")

    await asyncio.wait_for(Stop().unless_at_once(asyncio.create_task(drains())), 1)
    assert "RuntimeError: unforeseen" in caplog.text
