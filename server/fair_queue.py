"""Who is next for a place in a tier's engines: callers take turns, however much each of them asks.

Knows callers by name; knows nothing of HTTP or engines.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from types import TracebackType

from server.errors import QueueFull

LONGEST_ADVICE_S = 60


class _Ticket:
    """One request that waits, and how many places it wants."""

    __slots__ = ("granted", "places")

    def __init__(self, places: int) -> None:
        self.places = places
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class FairQueue:
    """A bounded number of places, and a bounded queue for them that is fair between callers.

    Each caller has a line of its own, and the lines are served in turn: who has a thousand requests waits behind
    who has one. When the queue is full, the newest request of the longest line makes room for a caller with a
    shorter one; a caller whose own line is the longest is refused.
    """

    def __init__(self, name: str, places: Callable[[], int], longest: int) -> None:
        self._name = name
        self._places = places
        self._longest = longest
        self._lines: OrderedDict[str, deque[_Ticket]] = OrderedDict()
        self._taken = 0
        self._waiting = 0
        self._mean_s = 1.0
        """How long a place is held, lately."""

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return self._waiting

    @property
    def longest(self) -> int:
        """As many may wait."""
        return self._longest

    @property
    def taken(self) -> int:
        """Places that are held, also by those who have not been told yet."""
        return self._taken

    def look_again(self) -> None:
        """There may be more places than a moment ago."""
        self._grant()

    def place(self, caller: str, places: int = 1) -> "Place":
        """Hold so many places within the block, or all there are; waits in turn, also while there are none.

        Raises:
            QueueFull: at once when there is no room to wait in, or later when somebody with less got it.
        """
        return Place(self, caller, places)

    async def take(self, caller: str, places: int) -> None:
        """Wait for places; `give` them back."""
        if self._lines or not self._fits(places):
            await self._wait(caller, places)
        else:
            self._taken += places

    def give(self, places: int, held_s: float) -> None:
        """Places are free again, that were held for so long."""
        self._mean_s += (held_s - self._mean_s) / 16
        self._taken -= places
        if self._lines:
            self._grant()

    async def _wait(self, caller: str, places: int) -> None:
        if self._waiting >= self._longest:
            self._make_room(caller)
        ticket = _Ticket(places)
        self._lines.setdefault(caller, deque()).append(ticket)
        self._waiting += 1
        self._grant()  # who waits already may do so for places that came back unsaid
        try:
            await ticket.granted
        except asyncio.CancelledError:
            granted = ticket.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._taken -= places  # granted a moment ago, to nobody any more
            else:
                self._remove(caller, ticket)
            self._grant()
            raise

    def _make_room(self, caller: str) -> None:
        most = max(self._lines, key=lambda each: len(self._lines[each]), default=caller)
        mine = len(self._lines.get(caller, ()))
        if most == caller or len(self._lines[most]) <= mine + 1:
            raise self._full()
        last = self._lines[most][-1]
        self._remove(most, last)
        last.granted.set_exception(self._full())

    def _remove(self, caller: str, ticket: _Ticket) -> None:
        line = self._lines.get(caller)
        if line is not None and ticket in line:
            line.remove(ticket)
            self._waiting -= 1
            if not line:
                del self._lines[caller]

    def _fits(self, places: int) -> bool:
        there_are = self._places()
        return self._taken + places <= there_are or (self._taken == 0 and there_are > 0)

    def _grant(self) -> None:
        while self._lines:
            caller, line = next(iter(self._lines.items()))
            if not self._fits(line[0].places):
                return
            ticket = line.popleft()
            self._waiting -= 1
            if line:
                self._lines.move_to_end(caller)
            else:
                del self._lines[caller]
            if not ticket.granted.done():
                self._taken += ticket.places
                ticket.granted.set_result(None)

    def _full(self) -> QueueFull:
        advice = self._mean_s * self._waiting / max(1, self._places())
        return QueueFull(self._name, max(1, min(LONGEST_ADVICE_S, math.ceil(advice))))


class Place:
    """Held within a block. A class, for every request has one, and a generator costs more."""

    def __init__(self, queue: FairQueue, caller: str, places: int) -> None:
        self._queue = queue
        self._caller = caller
        self._places = places
        self._began = 0.0

    async def __aenter__(self) -> None:
        await self._queue.take(self._caller, self._places)
        self._began = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.give(self._places, time.monotonic() - self._began)
