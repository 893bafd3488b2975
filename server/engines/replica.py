"""One engine of a tier, and its life: start, watch, restart, stop. Knows processes and health, not callers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from server.checkpoints import Checkpoints
from server.engines.affinity import Load
from server.engines.due import FOUND_IN_S, STARTED_IN_S, Due
from server.engines.engine import Engine
from server.engines.failures import EngineNotStarted, PrecisionRefused
from server.engines.places import Places
from server.engines.probation import Probation
from server.engines.reading_back import read_back
from server.engines.signs import first_of, until_not
from server.engines.state import UP, State
from server.engines.turns import Turns
from server.engines.upstream import Upstream
from server.engines.vitals import Finding, Patience, Vitals
from server.errors import Refusal, TierNotVerified, TierUnavailable
from server.launch.launch import Launch
from server.metrics import Metrics
from tiers.manifest import Manifest
from tiers.tier import Tier
from tiers.verification import VerifiedPrecision

log = logging.getLogger("assay.replica")

FIRST_BACKOFF_S = 1.0
"""Between the end of an engine that failed and its next start."""


class Replica:
    """One engine of a tier, and its life. ``tier`` is as this engine sees it: with GPUs of its own."""

    def __init__(
        self,
        tier: Tier,
        manifest: Manifest,
        context_length: int,
        *,
        number: int = 1,
        of: int = 1,
        at: str | None = None,
        launch: Launch,
        checkpoints: Checkpoints | None,
        logs: Path,
        metrics: Metrics,
        start_timeout_s: float,
        start_locks: tuple[asyncio.Lock, ...] = (),
        turns: Turns | None = None,
        patience: Patience | None = None,
        takes_faults: bool = False,
        address_file: Path | None = None,
    ) -> None:
        self.tier = tier
        self.number = number
        self.name = f"{tier.name} at {at}" if at else f"{tier.name} ({number} of {of})" if of > 1 else tier.name
        """For people; callers know tiers only."""
        self.manifest = manifest
        self.context_length = context_length
        self.state = State.STOPPED
        self.leaving = False
        """Whether it takes nothing new, so that it can be ended: for good, or until it is started again."""
        self.on_ready: Callable[[], object] = bool
        """To be called each time that it takes requests which it did not before: some may wait for it."""
        self.engine_version: str | None = None
        self.verified: VerifiedPrecision | None = None
        self.device_class: str | None = None  # of the engine's machine, once it has said so
        self.restarts = 0
        self.load = Load(self.name)
        """What it has to do: whoever sends a request counts it here."""
        self._launch = launch
        self._checkpoints = checkpoints
        """None where its weights lie elsewhere, and are somebody else's to verify."""
        self.log_file = logs / (f"{tier.slug}-{number}.log" if number > 1 else f"{tier.slug}.log")
        self._metrics = metrics
        self._start_timeout_s = start_timeout_s
        self._start_locks = start_locks
        self._takes_faults = takes_faults
        self._address_file = address_file
        self.turns = turns
        self._engine: Engine | None = None
        self.failed = asyncio.Event()
        """Whether an engine was there, and is no more; not so of one that has not come up."""
        self._places = Places()
        self._vitals = Vitals(patience or Patience())
        self._probation = Probation()
        self._due = Due(STARTED_IN_S if checkpoints else FOUND_IN_S)
        # To be called at each part of an answer that comes from it, and when all of a good one has come.
        self.heard, self.answered = self._vitals.heard, self._vitals.answered

    @property
    def can_answer(self) -> bool:
        """Whether a request would be answered, after waking the engine if need be."""
        return self.state in (State.READY, State.ASLEEP) and not self.leaving

    @property
    def takes_requests(self) -> bool:
        """Whether it can answer now: not so while another engine starts that it shares GPUs with."""
        return self.can_answer and not (self.turns and self.turns.is_starting)

    async def start(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Start the engine, read back what it computes, and answer one request with it.

        Raises:
            EngineNotStarted: with the last line of its log.
            PrecisionRefused: it computes something else than is declared; it was ended, and is not to be retried.
        """
        async with AsyncExitStack() as turn:
            for lock in self._start_locks:
                await turn.enter_async_context(lock)
            if self.turns:
                await turn.enter_async_context(self.turns.starting(self))
            try:
                await self._start(say)
            except BaseException as error:
                # Before the turn is passed on, also by one that is given up: whoever comes next needs the memory.
                if isinstance(error, PrecisionRefused):
                    self.state = State.REFUSED
                await self._end_engine()
                raise
        self.on_ready()

    async def _start(self, say: Callable[[str], None]) -> None:
        self.failed.clear()
        if self.state is not State.RESTARTING:
            self.state = State.STARTING
        elif self._checkpoints is not None:
            await self._checkpoints.verify_again(self.tier, self.manifest)
        self.verified = None
        self._due.begins()
        self.load.forget()
        launched = await self._launch.begin(self.tier, self.log_file)
        self._engine = engine = Engine.of(self.name, launched)  # before all that may fail: who holds it can end it
        if self._address_file:
            engine.write_down(self.manifest.digest, self._address_file)
        self.engine_version = await engine.until_it_answers(say, self._start_timeout_s)
        say("reading its precision back")
        await self._read_back(engine)
        say("warm-up request")
        if self.state is State.STARTING:
            self.state = State.WARMING_UP
        await engine.warm_up(self.tier.name)
        self._due.is_there()
        self._vitals.begin()
        self.state = State.READY

    async def start_again(self) -> None:
        """After it has failed, or not come up. Raises what `start` does."""
        if self._checkpoints and self.failed.is_set():  # else it is somebody else's, who may have wanted its end
            self.restarts += 1
            self._metrics.restarts.labels(self.tier.name).inc()
        await self.start()

    async def restart(self) -> None:
        """End the engine and start another, because somebody wants it so: nothing has failed, and nothing waits.

        Raises:
            EngineNotStarted, PrecisionRefused: as `start`.
        """
        self.state = State.RESTARTING
        self._due.starts_after(0)
        self._metrics.planned_restarts.labels(self.tier.name).inc()
        await self._end_engine()
        await self.start()

    async def stop(self) -> None:
        """End the engine for good; returns when nothing of it is left."""
        if self.turns:
            self.turns.close()
        await self.end()

    async def end(self) -> None:
        """End the engine; returns when nothing of it is left. `restart` starts another."""
        self.state = State.STOPPED
        await self._end_engine()

    def slot(self) -> AbstractAsyncContextManager[Upstream]:
        """A place for one request on this engine, which is woken if it sleeps, and the way to it.

        Raises:
            TierUnavailable: the engine is not ready.
            TierNotVerified: it was refused.
            BrokenOff: out of the block, when the engine is taken away meanwhile.
        """
        if not self.takes_requests:
            raise self.unavailable()
        return self._slot_in_turn(self.turns) if self.turns else self._slot_now()

    def _slot_now(self) -> AbstractAsyncContextManager[Upstream]:
        if self.state is not State.READY or self._engine is None:
            raise self.unavailable()
        return self._places.take(self._engine.upstream)

    @asynccontextmanager
    async def _slot_in_turn(self, turns: Turns) -> AsyncIterator[Upstream]:
        async with AsyncExitStack() as turn:
            turn.enter_context(self._places.count())
            try:
                await turn.enter_async_context(turns.awake(self))
            except EngineNotStarted as error:
                raise self.unavailable() from error
            yield await turn.enter_async_context(self._slot_now())

    async def sleep(self) -> None:
        """Give the GPU's memory back until `wake`; an engine that cannot is ended, and started again."""
        # One that is suspended sleeps as well, which ends its suspension: the memory may be wanted.
        if self.state in (State.READY, State.SUSPENDED) and self._engine is not None:
            self.state = State.ASLEEP
            self.load.forget()  # with the memory goes the KV cache
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
                self._vitals.begin()
                self.state = State.READY

    @property
    def engine(self) -> Engine:
        """The engine that runs. Raises TierUnavailable while there is none."""
        if self.state not in UP or self._engine is None:
            raise self.unavailable()
        return self._engine

    @property
    def running(self) -> int:
        """Requests that the engine works on now, or that wait for it to wake."""
        return self._places.taken

    def unavailable(self) -> Refusal:
        """The refusal to give while the engine is not ready, with an honest guess of when it will be."""
        if self.state is State.REFUSED and self.verified is not None:
            return TierNotVerified(self.tier.name, self.verified.disagreements)
        return TierUnavailable(self.tier.name, self.state.value, self._due.in_s)

    async def is_alive(self) -> bool:
        """Ask the engine now, and take it out of service at once if it is gone, or about to be."""
        engine = self._engine
        if self.state not in UP or engine is None:
            return False
        alive = await engine.is_alive()
        if engine is self._engine and not alive:
            self._fail()
        elif engine is self._engine and engine.drains and self.state in UP:
            self.state = State.DRAINING  # until it is gone, after the last of its answers
        return alive

    def erred(self) -> None:
        """To be called when the engine has answered a request with an error of its own (5xx).

        After too many in a row it gets no requests for a while, and must then answer a probe, or is replaced.
        """
        if self.state is not State.READY or (rest_s := self._vitals.erred()) is None:
            return
        log.warning("%s: the engine errs at every request; it rests for %.0f s", self.name, rest_s)
        self._metrics.ejections.labels(self.tier.name).inc()
        self._due.after(rest_s)
        self.state = State.SUSPENDED
        self._probation.begin(rest_s, self._let_back)

    async def _let_back(self) -> None:
        """End the suspension: one way or the other."""
        if self.state is not State.SUSPENDED or self._engine is None:
            return
        if await self._vitals.probe(self._engine, self.tier.name) is not Finding.WORKS:
            log.warning("%s: the engine still does not answer as it should", self.name)
            self._fail()
        elif self.state is State.SUSPENDED:
            self.state = State.READY
            self.on_ready()

    def _fail(self) -> None:
        """Out of service; the keeper starts it again."""
        if self.state not in UP:
            return
        self._due.starts_after(FIRST_BACKOFF_S)
        self.state = State.RESTARTING
        self.failed.set()

    async def _read_back(self, engine: Engine) -> None:
        """Hold what the engine computes against the manifest."""
        reading = read_back(engine, self.tier, self.manifest, takes_faults=self._takes_faults)
        self.verified, self.device_class = await reading
        if not self.verified.agrees:
            raise PrecisionRefused(self.name, self.verified.disagreements)

    async def until_it_fails(self) -> None:
        """Watch the engine, and return once it has ended, hangs, or was found to be gone."""
        engine = self._engine
        assert engine is not None
        hangs = self._vitals.until_it_hangs(engine, self.tier.name, lambda: self.state is State.READY, self.erred)
        ended = () if engine.process is None else (engine.process.wait(),)
        await first_of((self.failed.wait(), until_not(self.is_alive), hangs, *ended))

    async def clear_away(self, backoff_s: float) -> None:
        """End what is left of an engine that failed; another is to start after so long."""
        self._fail()
        await self._end_engine()
        self._due.starts_after(backoff_s)

    async def _end_engine(self) -> None:
        # First what is still being answered, which so gets its error event, whatever the engine makes of its end.
        self._places.break_off()
        self._probation.end()
        if (engine := self._engine) is not None:
            await engine.stop()
            if self._engine is engine:
                self._engine = None  # only now, so that a second call ends it too
        if self.turns:
            self.turns.forget(self)
