"""`assay engine` that is told to stop, and an engine too busy to say how far it is."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from server.engines import engine as engines
from server.engines.engine import Engine
from server.one_engine import _drain
from tests.server.engines.drained import Runs
from tiers.probe.reading import DRAIN_ROUTE


class Busy:
    """An engine that is asked how many requests it works on, and stalls at the polls that the test names."""

    def __init__(self) -> None:
        self.polls = 0
        self.running = 7
        self.stalls_at: set[int] = set()
        self.process = Ends()

    async def answer(self, request: web.Request) -> web.Response:
        assert request.path == DRAIN_ROUTE
        self.polls += 1
        if self.polls in self.stalls_at:
            await asyncio.sleep(0.1)
        return web.Response(text=str(self.running))

    async def is_asked(self, times: int) -> None:
        """Wait until it has been, so often more."""
        until = self.polls + times
        async with asyncio.timeout(2):
            while self.polls < until:
                await asyncio.sleep(0.005)


class Ends(Runs):
    """A process of which the test says when it has ended."""

    code: int | None = None

    @property
    def exit_code(self) -> int | None:  # type: ignore[override]
        return self.code


@pytest.fixture
async def busy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Busy, Engine]]:
    monkeypatch.setattr(engines, "HEALTH_TIMEOUT_S", 0.05)
    monkeypatch.setattr("server.one_engine.POLL_S", 0.005)
    made = Busy()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    engine = Engine("it", f"http://{host}:{port}", "key", made.process)
    yield made, engine
    await engine.stop()
    await runner.cleanup()


@pytest.mark.parametrize("stalls_at", [1, 3])
async def test_an_engine_that_does_not_say_for_a_moment_is_not_broken_off(
    busy: tuple[Busy, Engine], stalls_at: int
) -> None:
    made, engine = busy
    made.stalls_at = {stalls_at}
    draining = asyncio.create_task(_drain(engine, 60))
    await made.is_asked(stalls_at + 2)
    assert not draining.done(), "it works on 7 requests still"
    made.running = 0
    await asyncio.wait_for(draining, 2)


async def test_an_engine_that_hears_nobody_is_told_of_once(
    busy: tuple[Busy, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    made, engine = busy
    made.stalls_at = {2, 3, 4}
    draining = asyncio.create_task(_drain(engine, 60))
    await made.is_asked(6)
    made.running = 0
    await asyncio.wait_for(draining, 2)
    told = [record.message for record in caplog.records if record.message.startswith("stopping: ")]
    assert len(told) == 2, "how many may finish, and that it is silent"


async def test_an_engine_that_has_ended_is_not_waited_for(busy: tuple[Busy, Engine]) -> None:
    made, engine = busy
    draining = asyncio.create_task(_drain(engine, 60))
    await made.is_asked(2)
    made.process.code = 0
    await asyncio.wait_for(draining, 2)


async def test_a_drain_ends_with_its_time_and_says_what_it_breaks_off(
    busy: tuple[Busy, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    _, engine = busy
    await asyncio.wait_for(_drain(engine, 0.05), 2)
    assert "7 requests are broken off" in caplog.text
