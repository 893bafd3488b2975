"""How many replicas a tier is to have: more while requests wait, fewer when few come. Knows no way to start one.

What is decided is a function of what was seen; `Scaling` looks, and has it done.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Self

from server.engines.departures import Add, Departures, Remove
from server.engines.going_on import goes_well
from server.engines.pool import Pool
from server.engines.replica import Replica

log = logging.getLogger("assay.scaling")

LOOK_S = 1.0


class Look(NamedTuple):
    """What is true of a tier at one moment."""

    at: float
    """In seconds, of any clock that only goes forward."""
    waiting: int
    """Requests that no engine works on."""
    running: int
    """Requests that engines work on."""
    replicas: int
    """Engines there are, or are to be; without those that leave, and those that an operator has stopped."""
    able: int
    """Those of them that answer."""
    to_spare: int = 0
    """Those of them that do not answer, and may leave: the first stays."""
    stopped: int = 0
    """Engines that an operator has stopped, or is about to, and may bring back."""
    is_worked_on: bool = False
    """Whether an operator has all of them ended, or one of them started again, at this moment."""

    @classmethod
    def at_pool(cls, pool: Pool) -> Self:
        """Now, of that tier."""
        staying = _staying(pool)
        return cls(
            at=time.monotonic(),
            waiting=pool.waiting,
            running=pool.running,
            replicas=len(staying),
            able=sum(replica.can_answer for replica in staying),
            to_spare=sum(not replica.can_answer for replica in staying[1:]),
            stopped=sum(map(pool.service.has_out, pool.replicas)),
            is_worked_on=pool.service.is_worked_on,
        )


@dataclass(frozen=True)
class Bounds:
    """Between what the number of replicas is held, and how long a reason must hold before it changes."""

    fewest: int
    most: int
    requests_of_one: int
    """What one engine works on at once."""
    more_after_s: float = 10
    """A queue that lasts so long does not pass by itself."""
    fewer_after_s: float = 300
    """An engine takes a minute or more to come back: it must have been too many for longer than that."""
    fullness: float = 0.5
    """How full the others may be when one leaves. Well below 1, or the next request would call it back."""


class Reason(NamedTuple):
    """Why there should be more replicas (1), or fewer (-1), and since when; 0 is none."""

    change: int = 0
    since: float = 0.0


def next_reason(reason: Reason, look: Look, bounds: Bounds) -> tuple[Reason, int]:
    """The reason that holds after this look, and by how many to change the number of replicas now: -1, 0 or 1.

    A reason counts from the first look of an unbroken row that has it, and anew after each change. While a replica
    is still on its way, or back from a failure, no further one is called: it is what those who wait for wait for.
    That keeps none from leaving, or one that never comes would hold all the others. An operator's work is not
    meddled with; what is stopped keeps its place, and the others are kept meanwhile.
    """
    change = _wanted(look, bounds)
    if change == 0 or look.is_worked_on or (change > 0 and look.able < look.replicas):
        return Reason(0, look.at), 0
    if change != reason.change:
        reason = Reason(change, look.at)
    held_s = look.at - reason.since
    if held_s < (bounds.more_after_s if change > 0 else bounds.fewer_after_s):
        return reason, 0
    return Reason(0, look.at), change


def _wanted(look: Look, bounds: Bounds) -> int:
    if look.replicas + look.stopped < bounds.most and look.waiting:
        return 1
    others = look.able if look.to_spare else look.able - 1
    too_many = look.replicas > bounds.fewest and not look.stopped and others > 0
    if too_many and not look.waiting and look.running <= bounds.fullness * bounds.requests_of_one * others:
        return -1
    return 0


def _staying(pool: Pool) -> list[Replica]:
    return [replica for replica in pool.replicas if not replica.leaving]


class Scaling:
    """Holds one tier to as many replicas as it needs."""

    def __init__(
        self, pool: Pool, bounds: Bounds, another: Callable[[int], Replica], *, look_s: float = LOOK_S
    ) -> None:
        """``another`` makes a replica of that number, which is not started."""
        self._pool = pool
        self._bounds = bounds
        self._another = another
        self._look_s = look_s
        self._departures = Departures()
        self._reason = Reason()

    async def keep(self, add: Add, remove: Remove) -> None:
        """Look again and again, for ever."""
        try:
            while True:
                await goes_well(self._pool.tier.name, self._look(add, remove))
                await asyncio.sleep(self._look_s)
        finally:
            await self._departures.close()

    async def _look(self, add: Add, remove: Remove) -> None:
        self._reason, change = next_reason(self._reason, Look.at_pool(self._pool), self._bounds)
        if change > 0:
            self._more(add)
        elif change < 0:
            self._fewer(remove)

    def _more(self, add: Add) -> None:
        numbers = {replica.number for replica in self._pool.replicas}
        replica = self._another(next(number for number in count(1) if number not in numbers))
        log.warning("%s: %d requests wait; another replica is started", replica.name, self._pool.waiting)
        add(self._pool, replica)

    def _fewer(self, remove: Remove) -> None:
        """One that cannot answer, or else the one that does least, the newest of several such.

        The first stays, which is the one measured.
        """
        replica = min(reversed(_staying(self._pool)[1:]), key=lambda each: (each.can_answer, each.running))
        log.warning("%s: the others suffice; it ends when its requests have", replica.name)
        self._departures.begin(remove, self._pool, replica)
