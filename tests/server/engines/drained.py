"""A gateway whose engines come and go as a test says, and requests that end when it says so."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from server.config import Config
from server.engines.drains import Drains
from server.engines.failures import EngineNotStarted
from server.engines.pool import Pool
from server.metrics import Metrics
from tests.server.conftest import Answer, FakeEngineReplica, Gateway, Handler, fake_replica, running_gateway
from tiers.probe.reading import WAKE_ROUTE

TIER = "SmolLM2-135M-Instruct-Reference"
STREAM = json.dumps({"model": TIER, "stream": True}).encode()
CHUNK = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
END = b"data: [DONE]\n\n"


def slow_to_wake(waking: asyncio.Event) -> Handler:
    """An engine that is awake when the event is set."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == WAKE_ROUTE:
            await waking.wait()
        return web.json_response({"id": "x"})

    return handle


class Runs:
    """An engine's process, as far as its replica sees it: it runs until it is stopped."""

    log = "nowhere"
    exit_code = None

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        """Wait for its end."""
        await self._ended.wait()
        return 0

    async def stop(self) -> None:
        """End it."""
        self._ended.set()

    def last_line(self) -> str:
        """It says nothing."""
        return ""

    def tail(self, size: int = 4096) -> str:
        """It has said nothing."""
        return ""


class Engines:
    """Of one tier: each start takes until it is let through, or fails as the test wants."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.fails = False
        self.may_end = asyncio.Event()
        self.begun = 0
        gateway.handler = self._answer
        self.take(gateway.replica)
        gateway.replica.engine.process = Runs()

    def take(self, replica: FakeEngineReplica) -> None:
        """Have its starts be those of the test."""
        url = self.gateway.replica.url

        async def start(say: Callable[[str], None]) -> None:
            await self.may_start.wait()
            if self.fails:
                raise EngineNotStarted(f"{replica.name}: as the test wants.")
            replica.failed.clear()
            replica.connect(url)
            replica.engine.process = Runs()

        replica._start = start  # type: ignore[method-assign]

    def add(self, folder: Path, number: int = 2) -> FakeEngineReplica:
        """Another replica, which is ready."""
        replica = self.coming(folder, number)
        self.connect(replica)
        self.pool.add(replica)
        return replica

    def coming(self, folder: Path, number: int = 2) -> FakeEngineReplica:
        """Another, which nobody has started, and no pool knows."""
        replica = fake_replica(Config(home=folder), Metrics(), number, 3, tier=self.gateway.replica.tier)
        self.take(replica)
        return replica

    def connect(self, replica: FakeEngineReplica) -> None:
        """Have it run."""
        replica.connect(self.gateway.replica.url)
        replica.engine.process = Runs()

    @property
    def pool(self) -> Pool:
        return self.gateway.fleet.pools[0]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """A stream whose end the test lets come."""
        self.begun += 1
        if request.path == "/tokenize":
            return web.json_response({"count": 1, "max_model_len": 1, "tokens": [1]})
        if request.path != "/v1/chat/completions":
            return web.json_response({})
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(CHUNK)
        await self.may_end.wait()
        await answer.write(END)
        return answer

    def ask(self, requests: int = 1) -> "list[asyncio.Task[Answer]]":
        """So many streams at once."""
        return [asyncio.create_task(self.gateway.post(STREAM)) for _ in range(requests)]


async def until(is_so: Callable[[], object]) -> None:
    """Wait for it, for a moment."""
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.005)


async def a_moment() -> None:
    """Long enough for whatever goes on by itself."""
    await asyncio.sleep(0.1)


def is_whole(answer: Answer) -> bool:
    """Whether it has its last event."""
    return answer.status == 200 and answer.ended and answer.body.endswith(END)


@asynccontextmanager
async def drained_gateway(folder: Path, **fields: Any) -> AsyncIterator[tuple[Engines, Drains]]:
    """A gateway whose engines are watched, with operators' work on it; all ended with the block."""
    async with running_gateway(folder, max_waiting=50, **fields) as gateway:
        drains = Drains(gateway.fleet, 5)
        engines = Engines(gateway)
        gateway.fleet.watch()
        try:
            yield engines, drains
        finally:
            engines.may_end.set()
            await drains.close()
            await gateway.fleet.stop()
