"""`assay engine`: one tier's engine in the foreground, from its checkpoint to the last of its answers.

It listens where gateways reach it, and answers whoever shows the shared key. Nobody starts it again: it ends with
its engine, and whoever has started it sees that by its exit code. One with more GPUs than are here is a process of
this machine all the same: only its workers go over the nodes of a Ray cluster, where vLLM puts them.
"""

import asyncio
import contextlib
import ipaddress
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from server.backend import backend_of
from server.checkpoints import Checkpoints
from server.config import ENGINE_PORT, Config
from server.engine_key import VARIABLE, engine_key
from server.engines.engine import Engine
from server.engines.failures import EngineNotStarted
from server.engines.replica import Replica
from server.launch.gathering import Gathering, spills_over
from server.launch.local import LocalLaunch, url_at
from server.listener import listening_socket
from server.metrics import Metrics
from server.progress import Steps
from server.stop import Stop
from tiers.engine import EngineCommand, engine_command
from tiers.errors import AssayError, ConfigError
from tiers.hardware import Machine
from tiers.manifest import Manifest
from tiers.placement import place
from tiers.plan import TierPlan
from tiers.tier import Tier

log = logging.getLogger("assay.engine")

POLL_S = 0.1


class EngineEnded(AssayError):
    """The engine is no longer there, or hangs, and nobody had asked for its end."""

    def __init__(self, name: str, log_file: Path) -> None:
        super().__init__(f"{name}: the engine has ended, or hung and was ended; its log is {log_file}.")


class OneEngine:
    """One engine of a tier, as this machine is to run it."""

    def __init__(self, config: Config, tier: Tier, host: str, port: int) -> None:
        """``tier`` is one of the config's, which may say of it that it runs elsewhere: that is here.

        Raises:
            ConfigError: others can reach ``host``, and there is no key.
        """
        self._config = config.all_here()
        alone = next(each for each in self._config.tiers if each.name == tier.name).engines()[0]
        # Nobody here would send it to sleep or wake it.
        self.tier = replace(alone, resources=alone.resources.model_copy(update={"idle": "stay"}))
        self._host = host
        self._port = port
        self._own_port = None if port == ENGINE_PORT else port
        self._key = engine_key(config.engine_key)
        if self._key is None and not _is_loopback(host):
            raise ConfigError(
                f"On {host} others can reach this engine, and it answers only who shows a key that its gateways "
                f"have too: set engine_key in the config, or {VARIABLE}, or listen on 127.0.0.1."
            )
        self._backend = backend_of(config)

    @property
    def log_file(self) -> Path:
        """What it writes."""
        return self._config.logs / (
            f"{self.tier.slug}-{self._own_port}.log" if self._own_port else f"{self.tier.slug}.log"
        )

    async def command(self) -> EngineCommand:
        """What starts it, for those who do that by other means; its key is not that of any engine.

        Raises:
            AssayError: there is no checkpoint yet, or it would not fit.
        """
        Manifest.read(self.tier.checkpoint)
        gathering = await self._gathering()
        return self._launch(gathering).command(self._plan(gathering).tier)

    async def run(self, steps: Steps, announce: Callable[[str], None], *, build: bool) -> None:
        """Start it, and return when it was asked to stop and its last answer is given.

        Args:
            steps: shows what is done.
            announce: told once, on which URL it answers.
            build: whether its checkpoint may be built.

        Raises:
            AssayError: one sentence of what is wrong; nothing is left running.
        """
        stop = Stop()
        stop.listen()
        listening_socket(self._host, self._port).close()  # a port in use is found before any work
        engine_command(self.tier, self._backend, port=0, api_key="")  # refuses arguments that cannot be
        preparing = asyncio.create_task(self._prepared(steps, build=build))
        if not await stop.unless_asked(preparing):
            return
        replica = preparing.result()
        try:
            starting = asyncio.create_task(_start(replica, steps))
            if not await stop.unless_asked(starting):
                return
            engine = replica.engine
            await engine.say_ready()
            announce(url_at(self._host, self._port))
            failing = asyncio.create_task(replica.until_it_fails())
            if await stop.unless_asked(failing):
                raise EngineEnded(replica.name, replica.log_file)
            await stop.unless_at_once(asyncio.create_task(_drain(engine, self._config.drain_timeout_s)))
        finally:
            await replica.stop()

    async def _gathering(self) -> Gathering | None:
        """The nodes that it goes over; None if all that it takes is here."""
        here = Machine.here(self._backend)
        return await Gathering.of(self.tier, self._config.ray, here) if spills_over(self.tier, here) else None

    def _plan(self, gathering: Gathering | None) -> TierPlan:
        """Its share of the machine, all of which is for it unless the config says how much, or of its nodes."""
        if gathering is not None:
            return gathering.plan(self.tier)
        return place((self.tier,), Machine.here(self._backend))[0]

    def _launch(self, gathering: Gathering | None, *, waits: bool = False) -> LocalLaunch:
        tracing = self._config.tracing
        return LocalLaunch(
            self._backend,
            host=self._host,
            port=self._port,
            key=self._key,
            finishes_within_s=math.ceil(self._config.drain_timeout_s),
            waits=waits,
            traces_url=tracing.traces_url if tracing else None,
            over=gathering.over if gathering else None,
        )

    async def _prepared(self, steps: Steps, *, build: bool) -> Replica:
        gathering = await self._gathering()
        self._plan(gathering)  # before hours of building
        # Engines that share a volume start together: one builds, and the others wait for it.
        waits_s = self._config.start_timeout_s
        checkpoints = Checkpoints(self._config, steps, may_build=build, waits_s=waits_s)
        manifest = (await checkpoints.prepare([self.tier]))[self.tier.name]
        plan = self._plan(gathering)
        return Replica(
            plan.tier,
            manifest,
            plan.context_length,
            number=self._own_port or 1,
            launch=self._launch(gathering, waits=True),
            checkpoints=checkpoints,
            logs=self._config.logs,
            metrics=Metrics(),
            start_timeout_s=self._config.start_timeout_s,
            patience=self._config,
            address_file=self._config.address_of(self.tier, self._own_port),
        )


async def _drain(engine: Engine, timeout_s: float) -> None:
    """Have it take nothing new, and wait for the last byte of what it answers, for a bounded time.

    One that does not say for a while how many it still answers is busy: it is asked again, as long as it runs.
    """
    running: int | None = None
    is_silent = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while running != 0 and _runs(engine):
                try:
                    now = await engine.drain()
                    if now and running is None:
                        log.warning("stopping: %d requests may finish within %.0f s", now, timeout_s)
                    running, is_silent = now, False
                except EngineNotStarted as error:
                    if not is_silent:  # else ten lines a second, of an engine that hears nobody any more
                        log.warning("stopping: %s", error)
                    is_silent = True
                await asyncio.sleep(POLL_S)
    if running != 0 and _runs(engine):
        log.warning("stopping: %s requests are broken off", "all" if running is None else running)


def _runs(engine: Engine) -> bool:
    return engine.process is not None and engine.process.exit_code is None


async def _start(replica: Replica, steps: Steps) -> None:
    with steps.step(f"Engine {replica.name}") as step:
        await replica.start(step.detail)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
