"""`assay serve` and `assay gateway`: from a `Config` to a gateway that answers, and back to nothing.

The order is the promise: whatever can be found wrong is found before an engine is started, and whatever was
started is ended before this returns.
"""

import asyncio
import contextlib
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from server.app import Scrape, build_app
from server.config import Config
from server.connections import room_for
from server.control import listening_for_operators
from server.engines.drains import Drains
from server.engines.failures import PrecisionRefused
from server.engines.fleet import Fleet
from server.engines.following import Following
from server.engines.replica import Replica
from server.intake import Intake
from server.keys import Keys
from server.limits import check_limits
from server.listener import LAST_WORDS_S, Server, check_reach, http_server, listening_socket, url_of
from server.measuring.background import certify_in_background
from server.metrics import Metrics
from server.preparation import prepare
from server.progress import Steps
from server.stop import Stop
from server.worker import Worker
from tiers.errors import ConfigError

log = logging.getLogger("assay.serve")

FIND_S = 20.0
"""Time for an engine that runs to be read and warmed up."""
POLL_S = 0.1
COLLECT_AFTER = (20_000, 20, 50)
"""Objects, and rounds of the generation before: Python's own numbers are for programs with less to do."""


Announce = Callable[[Fleet, str, Keys], None]
"""Told once, when every tier can answer: what is served, on which URL, and to whom."""


def check_gateway(config: Config) -> None:
    """Whether this config can be served without starting an engine here.

    Raises:
        ConfigError: a tier's engines would be started by it, here or on a Ray cluster.
    """
    for tier in config.tiers_started:
        raise ConfigError(
            f"{tier.name} is of launch: {tier.resources.launch}, and `assay gateway` starts no engine: give it "
            "`launch: url` and `urls:`, where `assay engine` runs it, or use `assay serve`."
        )


async def serve(
    config: Config, steps: Steps, announce: Announce, *, build: bool, worker: Worker | None = None
) -> None:
    """Serve until asked to stop; as one of several processes on one port, if there is a ``worker``.

    Raises:
        AssayError: one sentence of what is wrong; nothing is left running.
    """
    if config.workers > 1 and worker is None:
        raise ConfigError(
            f"workers: `assay serve` is one process with its engines; for {config.workers} run the two halves, "
            "`assay engine TIER` for each engine and `assay gateway` for them all."
        )
    stop = Stop()
    stop.listen()
    keys = Keys(config.keys_file)
    config = _with_room(config)
    with worker.listen() if worker else listening_socket(config.host, config.port) as listener:
        check_reach(listener, keys)
        await check_limits(config)
        fleet_of = asyncio.create_task(prepare(config, None, steps, build=build, writes_down=True))
        if not await stop.unless_asked(fleet_of):
            return
        fleet, metrics = fleet_of.result()
        async with worker.telling(metrics) if worker else nullcontext():
            scrape = worker.scrape if worker else None
            await _run(config, fleet, metrics, keys, listener, stop, steps, announce, scrape)


def _with_room(config: Config) -> Config:
    """No more connections than this process may open files for."""
    room = room_for(config.max_connections)
    if room < config.max_connections:
        log.warning(
            "max_connections is %d instead of %d: this process may not open more files (raise `ulimit -Hn`)",
            room,
            config.max_connections,
        )
    return config.model_copy(update={"max_connections": room})


@asynccontextmanager
async def running_engines(
    config: Config, steps: Steps, *, build: bool = True, takes_faults: bool = False
) -> AsyncIterator[Fleet]:
    """Every tier's engines, started and verified, with no gateway in front; ended with the block.

    With ``takes_faults`` they are such as can be broken, for the self-test. Nobody else learns where they answer.

    Raises:
        AssayError: into the block; nothing is left running.
    """
    if takes_faults:
        config = config.all_here()  # nobody else's engines are there to be broken
    fleet, _ = await prepare(config, None, steps, build=build, takes_faults=takes_faults)
    try:
        for following in fleet.followings:
            await following.find()
        await _start_engines(fleet.replicas, steps)
        yield fleet
    finally:
        await fleet.stop()


async def _run(
    config: Config,
    fleet: Fleet,
    metrics: Metrics,
    keys: Keys,
    listener: socket.socket,
    stop: Stop,
    steps: Steps,
    announce: Announce,
    scrape: Scrape | None = None,
) -> None:
    """Answer from the first moment (503 until a tier is ready), start the engines, serve until asked to stop."""
    app = build_app(config, fleet, keys, metrics, scrape)
    server = http_server(app, config, metrics)
    spare_the_collector()
    gateway = asyncio.create_task(server.serve([listener]))
    async with AsyncExitStack() as ending:
        ending.push_async_callback(app.close)
        ending.push_async_callback(_stop_gateway, server, gateway)
        ending.push_async_callback(fleet.stop)
        drains = Drains(fleet, config.drain_timeout_s)
        starting = asyncio.create_task(_start_all(fleet, steps))
        if not await stop.unless_asked(starting):
            # Tiers that answer already have accepted requests, however long another would still have taken.
            await _drain(config, app.intake, drains, stop, is_known=any(pool.can_answer for pool in fleet.pools))
            return
        fleet.watch()
        await ending.enter_async_context(listening_for_operators(config, drains))
        announce(fleet, url_of(listener), keys)
        certifying = asyncio.create_task(certify_in_background(config, fleet.pools))
        ending.push_async_callback(_cancel, certifying)
        await asyncio.wait({gateway, asyncio.create_task(stop.asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if gateway.done():
            gateway.result()
        await _drain(config, app.intake, drains, stop)


def spare_the_collector() -> None:
    """Have the garbage collector look at what requests leave, and not, again and again, at all that is loaded.

    A pass over everything takes some ten milliseconds, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def _start_all(fleet: Fleet, steps: Steps) -> None:
    """Start our own engines, and find those that somebody else runs; of these, none is waited for for long."""
    own = fleet.replicas
    fleet.follow()
    finding = [asyncio.create_task(_find(each, steps)) for each in fleet.followings]
    try:
        await _start_engines(own, steps)
        await asyncio.gather(*finding)
    finally:
        for each in finding:
            each.cancel()
        await asyncio.gather(*finding, return_exceptions=True)


async def _find(following: Following, steps: Steps) -> None:
    """Wait for the tier's first engine, for as long as one takes that is there."""
    tier = following.pool.tier.name
    where = " and ".join(following.urls)
    until = time.monotonic() + FIND_S
    with steps.step(f"Engines of {tier} at {where}"):
        while not following.pool.can_answer and time.monotonic() < until:
            await asyncio.sleep(POLL_S)
    if not following.pool.can_answer:
        log.warning("%s: no engine is ready at %s yet; until one is, requests get 503", tier, where)


async def _start_engines(replicas: Sequence[Replica], steps: Steps) -> None:
    """Start all at once. A tier that is refused stays out, and the others are served; none is no server."""

    async def start(replica: Replica) -> PrecisionRefused | None:
        try:
            with steps.step(f"Engine {replica.name}") as step:
                await replica.start(step.detail)
        except PrecisionRefused as refusal:
            log.error("%s", refusal)  # noqa: TRY400  # the sentence says it all
            return refusal
        return None

    starts = [asyncio.create_task(start(replica)) for replica in replicas]
    try:
        refusals = await asyncio.gather(*starts)
        if refusals and all(refusals) and refusals[0] is not None:
            raise refusals[0]
    finally:
        for each in starts:
            each.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


async def _drain(config: Config, intake: Intake, drains: Drains, stop: Stop, *, is_known: bool = True) -> None:
    """Take nothing new after a grace, and let what was accepted come to its end, for a bounded time.

    No grace where no tier has answered yet: then nobody can have sent requests here on purpose.
    """

    async def until_empty() -> None:
        intake.is_ending = True
        await asyncio.sleep(config.drain_grace_s if is_known else 0)
        intake.close()
        if intake.under_way:
            log.warning(
                "stopping: %d requests may finish within %.0f s; a second signal breaks them off",
                intake.under_way,
                config.drain_timeout_s,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.drain_timeout_s):
                await intake.until_empty()

    drains.give_up()
    await stop.unless_at_once(asyncio.create_task(until_empty()))
    intake.close()
    if intake.under_way:
        log.warning("stopping: %d requests are broken off", intake.under_way)


async def _stop_gateway(server: Server, gateway: asyncio.Task[None]) -> None:
    server.should_exit = True
    done, _ = await asyncio.wait({gateway}, timeout=LAST_WORDS_S)
    if not done:
        server.force_exit = True
    await gateway


async def _cancel(task: asyncio.Task[None]) -> None:
    """End what runs beside the server."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
