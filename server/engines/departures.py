"""Replicas that leave a tier in their own time, whoever decided it: let go, and broken off with the server."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from server.engines.going_on import goes_well
from server.engines.pool import Pool
from server.engines.replica import Replica

Add = Callable[[Pool, Replica], None]
"""Brings up a replica more."""
Remove = Callable[[Pool, Replica], Awaitable[None]]
"""Lets one end what it works on, and ends it."""

POLL_S = 0.05


async def until_idle(replica: Replica, timeout_s: float) -> None:
    """Have it take nothing new, and wait until it works on no request, or the time is over."""
    replica.leaving = True
    until = time.monotonic() + timeout_s
    while replica.running and time.monotonic() < until:
        await asyncio.sleep(POLL_S)


class Departures:
    """Those under way."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[bool]] = set()

    def begin(self, remove: Remove, pool: Pool, replica: Replica) -> None:
        """Have it removed; from this moment it leaves, so that nobody chooses it for anything else."""
        replica.leaving = True
        departure = asyncio.create_task(goes_well(replica.name, remove(pool, replica)))
        self._under_way.add(departure)
        departure.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """Break them off; returns when none of them does anything more."""
        departures = tuple(self._under_way)
        for departure in departures:
            departure.cancel()
        await asyncio.gather(*departures, return_exceptions=True)
