"""Several gateway processes on one port: started, watched, told to stop, and ended together.

One process is one Python, which uses one core. Each has a socket of its own on the port (SO_REUSEPORT), and the
system deals connections out by their addresses: of 400 connections, four processes got 85 to 114 each, where of
one socket that all inherit, whoever woke first took up to 270 and the last one 9. A socket ends with its process,
so that nobody waits for one that is gone; whoever starts them holds the port meanwhile, and answers nobody.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from server.config import Config
from server.keys import Keys
from server.launch.process import GRACE_S
from server.limits import check_limits
from server.listener import LAST_WORDS_S, check_reach, reserved_port, url_of
from server.metrics import Metrics
from server.scrape import Processes, gauges_of, tell
from server.series import WORKER_RESTARTS
from server.worker import ALL, Worker, begin
from tiers.errors import AssayError

log = logging.getLogger("assay.workers")

SHORT_LIFE_S = 60
"""One that lives no longer is started again after a pause."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""The first one, and what it doubles up to."""


class WorkerFailed(AssayError):
    """A gateway process ended before it could answer at all; the line above says why."""


class Workers:
    """The processes of one port."""

    def __init__(self, main: Callable[[Worker], None], workers: int, host: str, port: int, folder: Path) -> None:
        self._main = main
        self._of = workers
        self._address = host, port
        self._folder = folder
        self._living: dict[int, SpawnProcess] = {}
        self._not_ready = set(range(1, workers + 1))
        self.all_ready = asyncio.Event()
        """All have been able to answer at the same time, or one after another."""
        self._stopping = asyncio.Event()
        registry = CollectorRegistry()
        self._restarts = WORKER_RESTARTS.make(registry)
        self._processes = Processes(registry, gauges_of(Metrics().registry))

    async def run(self) -> None:
        """Keep all of them running until `stop`; returns when none is left.

        Raises:
            WorkerFailed: one could not begin.
        """
        server = await tell(self._folder / ALL, self._processes.exposition)
        keeping = [asyncio.create_task(self._keep(number)) for number in range(1, self._of + 1)]
        try:
            await asyncio.gather(*keeping)
        finally:
            self.stop()
            await asyncio.gather(*keeping, return_exceptions=True)
            server.close()

    def stop(self) -> None:
        """Have all finish what they have begun; a second time, have them end at once."""
        self._stopping.set()
        for process in self._living.values():
            process.terminate()

    def kill(self) -> None:
        """End whatever still lives."""
        for process in self._living.values():
            process.kill()

    async def _keep(self, number: int) -> None:
        """One of them, and whoever follows it."""
        pause = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            process = await self._live(number)
            if self._stopping.is_set():
                return
            ending = _ending(process)
            if not self.all_ready.is_set():
                raise WorkerFailed(f"Gateway process {number} of {self._of} {ending} before it could answer.")
            pause = (
                0.0 if time.monotonic() - began > SHORT_LIFE_S else min(max(PAUSE_S, 2 * pause), LONGEST_PAUSE_S)
            )
            log.error(
                "gateway process %d of %d (pid %d) %s; another takes its place in %.1f s",
                *(number, self._of, process.pid, ending, pause),
            )
            self._restarts.inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _live(self, number: int) -> SpawnProcess:
        """Start one and wait for its end."""
        loop = asyncio.get_running_loop()
        ours, theirs = multiprocessing.Pipe(duplex=False)
        worker = Worker(number, self._of, *self._address, self._folder, os.getpid(), theirs)
        process = multiprocessing.get_context("spawn").Process(target=begin, args=(self._main, worker))
        process.start()  # in this thread, whose end is what ends it (PR_SET_PDEATHSIG)
        theirs.close()
        self._living[number] = process
        assert process.pid is not None
        self._processes.joined(process.pid, worker.counts)
        if self._stopping.is_set():
            process.terminate()
        ended = asyncio.Event()
        loop.add_reader(process.sentinel, ended.set)
        loop.add_reader(ours.fileno(), self._heard, ours, number)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process.sentinel)
            loop.remove_reader(ours.fileno())
            ours.close()
        process.join()
        del self._living[number]
        self._processes.left(process.pid)
        worker.counts.unlink(missing_ok=True)
        return process

    def _heard(self, connection: Connection, number: int) -> None:
        asyncio.get_running_loop().remove_reader(connection.fileno())
        try:
            connection.recv_bytes()
        except EOFError:
            return  # it has ended
        self._not_ready.discard(number)
        if not self._not_ready:
            self.all_ready.set()


def _ending(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


async def run_workers(
    main: Callable[[Worker], None],
    config: Config,
    asked: asyncio.Event,
    at_once: asyncio.Event,
    announce: Callable[[str], None],
) -> None:
    """Run ``config.workers`` processes on its port until asked to stop.

    Args:
        main: what each runs: listens by `Worker.listen`, says by `Worker.tell_ready` that it answers, by
            `Worker.telling` what it counts, and ends by SIGTERM, at once by a second. Importable by name, or a
            `functools.partial` of such with arguments that can be pickled.
        asked: set when they shall finish what they have begun, and end.
        at_once: set when they shall not finish it.
        announce: told the URL, once all of them answer.

    Raises:
        AssayError: one sentence of what is wrong; nothing is left running.
    """
    with reserved_port(config.host, config.port) as port, TemporaryDirectory(prefix="assay-") as folder:
        # Not in `home`: several gateways may share that, only read it, or have it where no socket can be.
        check_reach(port, Keys(config.keys_file))
        await check_limits(config)
        host, number = port.getsockname()[:2]
        workers = Workers(main, config.workers, host, number, Path(folder))
        running = asyncio.create_task(workers.run())
        beside = [
            asyncio.create_task(each)
            for each in (_announce(workers, url_of(port), announce), _stop(workers, config, asked, at_once))
        ]
        try:
            await running
        finally:
            for each in beside:
                each.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


async def _announce(workers: Workers, url: str, announce: Callable[[str], None]) -> None:
    await workers.all_ready.wait()
    announce(url)


async def _stop(workers: Workers, config: Config, asked: asyncio.Event, at_once: asyncio.Event) -> None:
    """Pass on what was asked of the one that started them; each ends in bounded time, or is ended."""
    await asked.wait()
    workers.stop()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(at_once.wait(), config.drain_grace_s + config.drain_timeout_s)
        workers.stop()
    await asyncio.sleep(2 * (GRACE_S + LAST_WORDS_S))  # for what comes after: last bytes, last spans, and the end
    workers.kill()
