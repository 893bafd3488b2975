"""One of several gateway processes on a port, as it sees itself: what it listens on, and whom it tells what.

Knows its number, its socket and the process that started it; knows nothing of requests.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from server.errors import Refusal
from server.metrics import Metrics
from server.scrape import ask, tell
from tiers.errors import AssayError

ANSWER_S = 5.0
"""Whoever asks all of them may take so long, which is less than Prometheus waits."""
ALL = "all.sock"
"""Where the process that started them all says what all of them count."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


class ScrapeFailed(Refusal):
    """This process alone could be asked what it counts, and that would be taken for all."""

    status, type, code = 503, "server_error", "metrics_unavailable"

    def __init__(self) -> None:
        super().__init__("The processes of this server could not be asked what they count; try again.")


@dataclass(frozen=True)
class Worker:
    """What one is told when it starts."""

    number: int
    """From 1."""
    of: int
    host: str
    port: int
    folder: Path
    """The sockets that they talk on among themselves; nobody else's to read."""
    parent: int
    ready: Connection

    @property
    def counts(self) -> Path:
        """Where it says what it counts."""
        return self.folder / f"{self.number}.sock"

    def listen(self) -> socket.socket:
        """Its own socket on the common port, so that the system deals connections out evenly.

        Raises:
            PortTaken: it cannot be had.
        """
        from server.listener import listening_socket  # with it comes what HTTP needs, which `begin` does not

        return listening_socket(self.host, self.port, shared=True)

    def tell_ready(self) -> None:
        """It answers now."""
        self.ready.send_bytes(b"ready")

    @asynccontextmanager
    async def telling(self, metrics: Metrics) -> AsyncIterator[None]:
        """Say within the block what it counts."""

        async def exposition() -> bytes:
            return metrics.exposition()

        server = await tell(self.counts, exposition)
        try:
            yield
        finally:
            server.close()

    async def scrape(self) -> bytes:
        """What all of them count, whichever is asked.

        Raises:
            ScrapeFailed: who knows it does not say it.
        """
        try:
            return await ask(self.folder / ALL, ANSWER_S)
        except OSError as error:
            raise ScrapeFailed from error


def begin(main: Callable[[Worker], None], worker: Worker) -> None:
    """What such a process runs, in its entirety."""
    os.setsid()  # Ctrl-C is for the one that started it, which passes it on: two would mean at once
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != worker.parent:
        return  # it died before this could be told
    try:
        main(worker)
    except AssayError as error:
        sys.exit(str(error))
