"""`assay serve`: from a `Config` to a gateway that answers, and back to nothing.

The order is the promise: whatever can be found wrong is found before an engine is started, and whatever was
started is ended before this returns.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from server.app import build_app
from server.checkpoints import Checkpoints
from server.config import Config
from server.connections import room_for
from server.control import listening_for_operators
from server.engines.drains import Drains
from server.engines.engine import PrecisionRefused
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.signs import first_of
from server.engines.turns import Turns, share
from server.intake import Intake
from server.keys import Keys
from server.launch.local import LocalLaunch
from server.limits import check_limits
from server.listener import LAST_WORDS_S, Server, check_reach, http_server, listening_socket, url_of
from server.measuring.background import certify_in_background
from server.metrics import Metrics
from server.progress import Steps
from tiers.engine import Backend, engine_command, installed_backend
from tiers.errors import ConfigError
from tiers.hardware import Machine
from tiers.placement import place
from tiers.plan import TierPlan
from tiers.tier import Tier

log = logging.getLogger("assay.serve")

COLLECT_AFTER = (20_000, 20, 50)
"""Objects, and rounds of the generation before: Python's own numbers are for programs with less to do."""


class Stop:
    """What a person or an orchestrator has asked for: nothing yet, a drained stop, or one at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP; a second one means at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # as nohup sets it
            loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()


Announce = Callable[[Fleet, str, Keys], None]
"""Told once, when every tier can answer: what is served, on which URL, and to whom."""


async def serve(config: Config, steps: Steps, announce: Announce, *, build: bool) -> None:
    """Serve until asked to stop.

    Raises:
        AssayError: one sentence of what is wrong; nothing is left running.
    """
    if config.workers > 1:
        raise ConfigError(
            f"workers: `assay serve` is one process with its engines; for {config.workers} run the two halves, "
            "`assay engine TIER` for each engine and `assay gateway` for them all."
        )
    stop = Stop()
    stop.listen()
    keys = Keys(config.keys_file)
    config = _with_room(config)
    with listening_socket(config.host, config.port) as listener:
        check_reach(listener, keys)
        await check_limits(config)
        fleet_of = asyncio.create_task(_prepare(config, backend_of(config), steps, build=build, writes_down=True))
        if not await _unless_asked(stop, fleet_of):
            return
        fleet, metrics = fleet_of.result()
        await _run(config, fleet, metrics, keys, listener, stop, steps, announce)


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
    fleet, _ = await _prepare(config, backend_of(config), steps, build=build, takes_faults=takes_faults)
    try:
        await _start_engines(fleet.replicas, steps)
        yield fleet
    finally:
        await fleet.stop()


def backend_of(config: Config) -> Backend:
    """Where the config's engines run."""
    return installed_backend() if config.backend == "auto" else config.backend


async def _prepare(
    config: Config,
    backend: Backend,
    steps: Steps,
    *,
    build: bool,
    takes_faults: bool = False,
    writes_down: bool = False,
) -> tuple[Fleet, Metrics]:
    """Check everything, build what is missing, and lay out the replicas; no engine is started."""
    tiers = config.tiers
    for tier in tiers:
        engine_command(tier, backend, port=0, api_key="")  # refuses arguments that cannot be
    place(tiers, Machine.here(backend))  # before hours of building
    checkpoints = Checkpoints(config, steps, may_build=build)
    manifests = await checkpoints.prepare(tiers)
    metrics = Metrics()
    plans = place(tiers, Machine.here(backend))
    engines = [engine for plan in plans for engine in plan.tier.engines()]
    turns = _turns(engines, config.idle_after_s)
    locks = {gpu: asyncio.Lock() for engine in engines for gpu in engine.resources.gpus}

    launch = LocalLaunch(backend, takes_faults=takes_faults)

    def replica(plan: TierPlan, number: int, engine: Tier) -> Replica:
        return Replica(
            engine,
            manifests[plan.name],
            plan.context_length,
            number=number,
            of=plan.replicas,
            launch=launch,
            checkpoints=checkpoints,
            logs=config.logs,
            metrics=metrics,
            start_timeout_s=config.start_timeout_s,
            start_locks=_start_locks(engine, backend, locks),
            turns=turns.get((engine.name, engine.resources.gpus)),
            patience=config,
            takes_faults=takes_faults,
            address_file=config.address_of(engine) if writes_down and number == 1 else None,
        )

    pools = [
        Pool(
            plan.tier,
            manifests[plan.name],
            plan.context_length,
            [replica(plan, number, engine) for number, engine in enumerate(plan.tier.engines(), 1)],
            metrics,
            max_num_seqs=plan.max_num_seqs,
        )
        for plan in plans
    ]
    return Fleet(pools), metrics


def _turns(engines: Sequence[Tier], idle_after_s: float) -> dict[tuple[str, tuple[int, ...]], Turns]:
    """For those that sleep, by name and GPUs: engines that share a GPU, also through others, take turns."""
    sleepers = [engine for engine in engines if engine.resources.idle == "sleep"]
    groups = share([frozenset(engine.resources.gpus) for engine in sleepers])
    made = {group: Turns(idle_after_s) for group in set(groups)}
    return {
        (engine.name, engine.resources.gpus): made[group] for engine, group in zip(sleepers, groups, strict=True)
    }


def _start_locks(tier: Tier, backend: Backend, locks: dict[int, asyncio.Lock]) -> tuple[asyncio.Lock, ...]:
    """An engine measures free GPU memory while it starts: those that share a GPU take turns."""
    if backend == "cpu":
        return ()
    return tuple(locks[gpu] for gpu in sorted(tier.resources.gpus))


async def _run(
    config: Config,
    fleet: Fleet,
    metrics: Metrics,
    keys: Keys,
    listener: socket.socket,
    stop: Stop,
    steps: Steps,
    announce: Announce,
) -> None:
    """Answer from the first moment (503 until a tier is ready), start the engines, serve until asked to stop."""
    app = build_app(config, fleet, keys, metrics)
    server = http_server(app, config, metrics)
    spare_the_collector()
    gateway = asyncio.create_task(server.serve([listener]))
    async with AsyncExitStack() as ending:
        ending.push_async_callback(app.close)
        ending.push_async_callback(_stop_gateway, server, gateway)
        ending.push_async_callback(fleet.stop)
        starting = asyncio.create_task(_start_engines(fleet.replicas, steps))
        if not await _unless_asked(stop, starting):
            return
        fleet.watch()
        drains = Drains(fleet, config.drain_timeout_s)
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
        if all(refusals) and refusals[0] is not None:
            raise refusals[0]
    finally:
        for each in starts:
            each.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


async def _drain(config: Config, intake: Intake, drains: Drains, stop: Stop) -> None:
    """Take nothing new after a grace, and let what was accepted come to its end, for a bounded time."""

    async def until_empty() -> None:
        intake.is_ending = True
        await asyncio.sleep(config.drain_grace_s)
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
    await first_of([until_empty(), stop.at_once.wait()])
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


async def _unless_asked(stop: Stop, work: asyncio.Task[object] | asyncio.Task[None]) -> bool:
    """Wait for ``work``; if a stop is asked for first, cancel it and return False."""
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if work.done():
        work.result()
        return True
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return False
