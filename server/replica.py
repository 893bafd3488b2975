"""One engine of a tier, and its life: start, watch, restart, stop. Knows processes and health, not callers."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path

import aiohttp

from server.checkpoints import Checkpoints
from server.engine import Engine, EngineNotStarted
from server.errors import Refusal, TierNotVerified, TierUnavailable
from server.launch.local import free_port
from server.metrics import Metrics
from server.turns import Turns
from tiers.catalog import ModelShape
from tiers.engine import Backend, engine_command
from tiers.errors import AssayError, CheckpointError
from tiers.manifest import Manifest
from tiers.tier import Tier
from tiers.verification import VerifiedPrecision, verify_precision

log = logging.getLogger("assay.replica")

WATCH_S = 2.0
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
GUESSED_START_S = 60.0


class State(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"
    WARMING_UP = "warming up"
    READY = "ready"
    ASLEEP = "asleep"
    RESTARTING = "restarting"
    REFUSED = "refused"
    STOPPED = "stopped"


class PrecisionRefused(AssayError):
    """What an engine computes is not what its checkpoint declares; trying again would not change that."""

    def __init__(self, tier: Tier, disagreements: tuple[str, ...]) -> None:
        super().__init__(
            f"{tier.name} is not served, its engine does not compute what its checkpoint declares: "
            f"{'; '.join(disagreements)}."
        )


class Replica:
    """One engine of a tier, and its life."""

    def __init__(
        self,
        tier: Tier,
        manifest: Manifest,
        context_length: int,
        *,
        backend: Backend,
        checkpoints: Checkpoints,
        logs: Path,
        metrics: Metrics,
        start_timeout_s: float,
        start_locks: tuple[asyncio.Lock, ...] = (),
        turns: Turns | None = None,
    ) -> None:
        self.tier = tier
        self.manifest = manifest
        self.context_length = context_length
        self.state = State.STOPPED
        self.engine_version: str | None = None
        self.verified: VerifiedPrecision | None = None
        self.restarts = 0
        self._backend: Backend = backend
        self._checkpoints = checkpoints
        self._log_file = logs / f"{tier.slug}.log"
        self._metrics = metrics
        self._start_timeout_s = start_timeout_s
        self._start_locks = start_locks
        self._turns = turns
        self._engine: Engine | None = None
        self._failed = asyncio.Event()
        self._ends: set[asyncio.Timeout] = set()
        self._waiting = 0
        """Requests that wait for the engine to wake or that it works on, where it may sleep."""
        self._last_start_s = GUESSED_START_S
        self._due = 0.0
        metrics.declare(tier.name)

    @property
    def can_answer(self) -> bool:
        """Whether a request would be answered now, after waking the engine if need be."""
        return self.state in (State.READY, State.ASLEEP)

    async def start(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Start the engine, read back what it computes, and answer one request with it.

        Raises:
            EngineNotStarted: with the last line of its log.
            PrecisionRefused: it computes something else than is declared; it was ended, and is not to be retried.
        """
        async with AsyncExitStack() as turn:
            for lock in self._start_locks:
                await turn.enter_async_context(lock)
            if self._turns:
                await turn.enter_async_context(self._turns.starting(self))
            try:
                await self._start(say)
            except Exception as error:
                # Before the turn is passed on: whoever comes next needs the memory.
                if isinstance(error, PrecisionRefused):
                    self._become(State.REFUSED)
                await self._end_engine()
                raise

    async def _start(self, say: Callable[[str], None]) -> None:
        if self.state is State.RESTARTING:
            await self._verify_checkpoint()
        else:
            self._become(State.STARTING)
        self.verified = None
        self._metrics.verified.labels(self.tier.name).set(0)
        began = time.monotonic()
        self._due = began + self._last_start_s
        command = engine_command(self.tier, self._backend, free_port(), secrets.token_urlsafe(32))
        self._failed.clear()
        self._engine = await Engine.launch(self.tier.name, command, self._log_file)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self.engine_version = await self._engine.until_it_answers(say)
        except TimeoutError:
            raise EngineNotStarted(
                f"{self.tier.name}: the engine was not ready after {self._start_timeout_s:.0f} s "
                f"(start_timeout_s); its log is {self._log_file}."
            ) from None
        say("reading its precision back")
        await self._read_back(self._engine)
        say("warm-up request")
        if self.state is State.STARTING:
            self._become(State.WARMING_UP)
        await self._engine.warm_up(self.tier.name)
        self._last_start_s = time.monotonic() - began
        self._become(State.READY)

    async def keep(self) -> None:
        """Watch the engine and start it again when it ends, for ever, waiting longer after each failure."""
        backoff = FIRST_BACKOFF_S
        while self.state is not State.REFUSED:
            if self.can_answer:
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
        if self._turns:
            self._turns.close()
        await self._end_engine()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A place for one request on this engine, which is woken if it sleeps, and the way to it.

        Raises:
            TierUnavailable: the engine is not ready.
            TierNotVerified: it was refused.
            TimeoutError: out of the block, when the engine is taken away meanwhile.
        """
        if not self.can_answer or (self._turns and self._turns.is_starting):
            raise self.unavailable()
        async with AsyncExitStack() as turn:
            if self._turns:
                self._waiting += 1
                turn.callback(self._leave)
                try:
                    await turn.enter_async_context(self._turns.awake(self))
                except EngineNotStarted as error:
                    raise self.unavailable() from error
            if self.state is not State.READY or self._engine is None:
                raise self.unavailable()
            yield await turn.enter_async_context(self._place(self._engine))

    def _leave(self) -> None:
        self._waiting -= 1

    @asynccontextmanager
    async def _place(self, engine: Engine) -> AsyncIterator[aiohttp.ClientSession]:
        running = self._metrics.running.labels(self.tier.name)
        running.inc()
        try:
            async with asyncio.timeout(None) as end:
                self._ends.add(end)
                try:
                    yield engine.session
                finally:
                    self._ends.discard(end)
        finally:
            running.dec()

    async def sleep(self) -> None:
        """Give the GPU's memory back until `wake`; an engine that cannot is ended, and started again."""
        if self.state is State.READY and self._engine is not None:
            self._become(State.ASLEEP)
            try:
                await self._engine.sleep()
            except EngineNotStarted as error:
                log.error("%s", error)  # noqa: TRY400  # the sentence says it all
                self._fail()
        if self.state is not State.ASLEEP:
            await self._end_engine()  # it failed just now, or a moment ago: its memory is wanted

    async def wake(self) -> None:
        """Take the GPU's memory again; an engine that cannot is started again."""
        if self.state is State.ASLEEP and self._engine is not None:
            began = time.monotonic()
            try:
                await self._engine.wake()
            except EngineNotStarted:
                self._fail()
                raise
            self._metrics.waking.labels(self.tier.name).observe(time.monotonic() - began)
            if self.state is State.ASLEEP:  # and was not stopped meanwhile
                self._become(State.READY)

    @property
    def running(self) -> int:
        """Requests that the engine works on now, or that wait for it to wake."""
        return max(len(self._ends), self._waiting)

    def unavailable(self) -> Refusal:
        """The refusal to give while the engine is not ready, with an honest guess of when it will be."""
        if self.state is State.REFUSED and self.verified is not None:
            return TierNotVerified(self.tier.name, self.verified.disagreements)
        wait = max(1, math.ceil(self._due - time.monotonic()))
        return TierUnavailable(self.tier.name, self.state.value, wait)

    async def is_alive(self) -> bool:
        """Ask the engine now, and take it out of service at once if it is gone."""
        if not self.can_answer or self._engine is None:
            return False
        alive = await self._engine.is_alive()
        if not alive and self.can_answer:
            self._fail()
        return alive

    def _fail(self) -> None:
        """Out of service; the keeper starts it again."""
        if self.state in (State.STOPPED, State.REFUSED):
            return
        self._due = time.monotonic() + FIRST_BACKOFF_S + self._last_start_s
        self._become(State.RESTARTING)
        self._failed.set()

    async def _verify_checkpoint(self) -> None:
        """What was verified before the start may have changed since: a tier is what it says, restarted or not."""
        if Manifest.read(self.tier.checkpoint).digest != self.manifest.digest:
            raise CheckpointError(
                f"{self.tier.name}: the checkpoint in {self.tier.checkpoint} was rebuilt while the server ran: "
                "restart the server to serve it."
            )
        await self._checkpoints.verify(self.tier, self.manifest)

    async def _read_back(self, engine: Engine) -> None:
        """Hold what the engine computes against the manifest."""
        shape = ModelShape.read(self.tier.checkpoint)
        self.verified = verify_precision(self.manifest.precision, await engine.readings(), shape)
        self._metrics.verified.labels(self.tier.name).set(self.verified.agrees)
        if not self.verified.agrees:
            raise PrecisionRefused(self.tier, self.verified.disagreements)

    def _become(self, state: State) -> None:
        self.state = state
        self._metrics.ready.labels(self.tier.name).set(self.can_answer)
        self._metrics.asleep.labels(self.tier.name).set(state is State.ASLEEP)

    async def _until_it_fails(self) -> None:
        assert self._engine is not None
        assert self._engine.process is not None
        ended = asyncio.create_task(self._engine.process.wait())
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
        if self._engine is not None:
            await self._engine.stop()
            self._engine = None  # only now, so that a second call ends it too
        if self._turns:
            self._turns.forget(self)
