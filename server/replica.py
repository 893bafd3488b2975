"""One engine of a tier, and its life: start, watch, restart, stop. Knows processes and health, not callers."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path

import aiohttp

from server.checkpoints import verify
from server.errors import TierUnavailable
from server.launch.local import LocalProcess, free_port
from server.metrics import Metrics
from tiers.engine import Backend, engine_command
from tiers.errors import AssayError, CheckpointError
from tiers.manifest import Manifest
from tiers.tier import Tier

log = logging.getLogger("assay.replica")

POLL_S = 0.5
WATCH_S = 2.0
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
WARM_UP_TIMEOUT_S = 300.0
GUESSED_START_S = 60.0


class State(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"
    WARMING_UP = "warming up"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


class EngineNotStarted(AssayError):
    """An engine ended, or was not ready in time, when it was to be started."""


class Replica:
    """One engine of a tier, and its life."""

    def __init__(
        self,
        tier: Tier,
        manifest: Manifest,
        context_length: int,
        *,
        backend: Backend,
        logs: Path,
        metrics: Metrics,
        start_timeout_s: float,
        start_locks: tuple[asyncio.Lock, ...] = (),
    ) -> None:
        self.tier = tier
        self.manifest = manifest
        self.context_length = context_length
        self.state = State.STOPPED
        self.engine_version: str | None = None
        self.restarts = 0
        self._backend: Backend = backend
        self._log_file = logs / f"{tier.slug}.log"
        self._metrics = metrics
        self._start_timeout_s = start_timeout_s
        self._start_locks = start_locks
        self._process: LocalProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._failed = asyncio.Event()
        self._ends: set[asyncio.Timeout] = set()
        self._last_start_s = GUESSED_START_S
        self._due = 0.0
        metrics.declare(tier.name)

    async def start(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Start the engine and answer one request with it.

        Raises:
            EngineNotStarted: with the last line of its log.
        """
        async with AsyncExitStack() as turn:
            for lock in self._start_locks:
                await turn.enter_async_context(lock)
            await self._start(say)

    async def _start(self, say: Callable[[str], None]) -> None:
        if self.state is State.RESTARTING:
            await self._verify_checkpoint()
        else:
            self._become(State.STARTING)
        began = time.monotonic()
        self._due = began + self._last_start_s
        port, key = free_port(), secrets.token_urlsafe(32)
        command = engine_command(self.tier, self._backend, port, key)
        self._failed.clear()
        self._process = await LocalProcess.start(command.arguments, command.environment, self._log_file)
        self._session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {key}"},
            # vLLM closes idle connections after 5 s; a request sent into that would fail.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            auto_decompress=False,
        )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._until_it_answers(self._process, say)
        except TimeoutError:
            raise EngineNotStarted(
                f"{self.tier.name}: the engine was not ready after {self._start_timeout_s:.0f} s "
                f"(start_timeout_s); its log is {self._log_file}."
            ) from None
        say("warm-up request")
        if self.state is State.STARTING:
            self._become(State.WARMING_UP)
        await self._warm_up()
        self._last_start_s = time.monotonic() - began
        self._become(State.READY)

    async def keep(self) -> None:
        """Watch the engine and start it again when it ends, for ever, waiting longer after each failure."""
        backoff = FIRST_BACKOFF_S
        while True:
            if self.state is State.READY:
                ready_since = time.monotonic()
                await self._until_it_fails()
                if time.monotonic() - ready_since > LONGEST_BACKOFF_S:
                    backoff = FIRST_BACKOFF_S
            self._become(State.RESTARTING)
            await self._end_engine()
            log.warning("%s: the engine ended; starting it again in %.0f s", self.tier.name, backoff)
            self._due = time.monotonic() + backoff + self._last_start_s
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, LONGEST_BACKOFF_S)
            self.restarts += 1
            self._metrics.restarts.labels(self.tier.name).inc()
            try:
                await self.start()
            except AssayError as error:
                log.error("%s", error)  # noqa: TRY400  # the sentence says it all
            except Exception:
                # Whatever it was, the next try may do better; a keeper that ends would leave its tier dead.
                log.exception("%s: starting the engine failed", self.tier.name)
            else:
                log.warning("%s: the engine is back", self.tier.name)

    async def stop(self) -> None:
        """End the engine; returns when nothing of it is left."""
        self._become(State.STOPPED)
        await self._end_engine()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A place for one request on this engine, and the way to it.

        Raises:
            TierUnavailable: the engine is not ready.
            TimeoutError: out of the block, when the engine is taken away meanwhile.
        """
        if self.state is not State.READY or self._session is None:
            raise self.unavailable()
        running = self._metrics.running.labels(self.tier.name)
        running.inc()
        try:
            async with asyncio.timeout(None) as end:
                self._ends.add(end)
                try:
                    yield self._session
                finally:
                    self._ends.discard(end)
        finally:
            running.dec()

    @property
    def running(self) -> int:
        """Requests that the engine works on now."""
        return len(self._ends)

    def unavailable(self) -> TierUnavailable:
        """The refusal to give while the engine is not ready, with an honest guess of when it will be."""
        wait = max(1, math.ceil(self._due - time.monotonic()))
        return TierUnavailable(self.tier.name, self.state.value, wait)

    async def is_alive(self) -> bool:
        """Ask the engine now, and take it out of service at once if it is gone."""
        if self.state is not State.READY or self._session is None:
            return False
        try:
            async with self._session.get("/health", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                alive = answer.status == 200
        except TimeoutError:
            alive = True  # busy is not dead
        except aiohttp.ClientError:
            alive = False
        if not alive and self.state is State.READY:
            self._due = time.monotonic() + FIRST_BACKOFF_S + self._last_start_s
            self._become(State.RESTARTING)
            self._failed.set()
        return alive

    async def _verify_checkpoint(self) -> None:
        """What was verified before the start may have changed since: a tier is what it says, restarted or not."""
        if Manifest.read(self.tier.checkpoint).digest != self.manifest.digest:
            raise CheckpointError(
                f"{self.tier.name}: the checkpoint in {self.tier.checkpoint} was rebuilt while the server ran: "
                "restart the server to serve it."
            )
        await verify(self.manifest, self.tier.checkpoint)

    def _become(self, state: State) -> None:
        self.state = state
        self._metrics.ready.labels(self.tier.name).set(state is State.READY)

    async def _until_it_answers(self, process: LocalProcess, say: Callable[[str], None]) -> None:
        assert self._session is not None
        while True:
            if process.exit_code is not None:
                raise EngineNotStarted(
                    f"{self.tier.name}: the engine ended while starting ({_reason(process.tail())}); "
                    f"its log is {self._log_file}."
                )
            say(process.last_line().rpartition("] ")[2].strip())
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.get("/version", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                    if answer.status == 200:
                        self.engine_version = (await answer.json())["version"]
                        return
            await asyncio.sleep(POLL_S)

    async def _warm_up(self) -> None:
        """One short request: the first one pays for memory and kernels, which no caller should."""
        assert self._session is not None
        body = {"model": self.tier.name, "prompt": "Hello", "max_tokens": 8, "logprobs": 1}
        timeout = aiohttp.ClientTimeout(total=WARM_UP_TIMEOUT_S)
        try:
            async with self._session.post("/v1/completions", json=body, timeout=timeout) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineNotStarted(
                f"{self.tier.name}: no answer to the warm-up request ({error!r}); its log is {self._log_file}."
            ) from error
        if answer.status != 200:
            raise EngineNotStarted(
                f"{self.tier.name}: the warm-up request failed: {text[:300]}; its log is {self._log_file}."
            )

    async def _until_it_fails(self) -> None:
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        failed = asyncio.create_task(self._failed.wait())
        try:
            while True:
                done, _ = await asyncio.wait({ended, failed}, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
                if done or not await self.is_alive():
                    return
        finally:
            ended.cancel()
            failed.cancel()

    async def _end_engine(self) -> None:
        # First what is still being answered, which so gets its error event, whatever the engine makes of its end.
        for end in self._ends:
            end.reschedule(0)
        # Both are forgotten only once they are gone, so that a second call ends them too.
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._process is not None:
            await self._process.stop()
            self._process = None


def _reason(tail: str) -> str:
    """The line of a log that says most: the last that names an error, or else the last."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (telling or lines or ["it wrote nothing"])[-1][-300:]
