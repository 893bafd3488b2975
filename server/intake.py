"""Whether the server takes requests, and how many it works on. Knows neither what they ask nor who answers."""

import asyncio
from types import TracebackType

from server.errors import RetryLater

POLL_S = 0.05


class ServerStopping(RetryLater):
    """The server was told to stop: it answers what it has accepted, and takes nothing new."""

    status, type, code = 503, "server_error", "server_stopping"

    def __init__(self) -> None:
        super().__init__("This server is stopping, and takes no further requests; another may take this one.", 1)


class Intake:
    """Of one gateway: open, ending, closed. A context for each request, from its head to the end of its answer."""

    def __init__(self) -> None:
        self.under_way = 0
        """Requests that were accepted: read, waiting, being answered."""
        self.is_ending = False
        """Whether nobody should send further ones, though some may still come."""
        self._is_closed = False

    def close(self) -> None:
        """Take nothing new from now on."""
        self.is_ending = self._is_closed = True

    async def until_empty(self) -> None:
        """Wait until all that was accepted is answered."""
        while self.under_way:
            await asyncio.sleep(POLL_S)

    def __enter__(self) -> None:
        if self._is_closed:
            raise ServerStopping
        self.under_way += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.under_way -= 1
