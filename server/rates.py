"""How many requests and tokens a minute each key may have, counted in a storage of the library `limits`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from limits.aio.storage import MemoryStorage

from server.errors import RateExceeded

WINDOW_S = 60


@dataclass(frozen=True)
class Standing:
    """How a caller stands towards one limit after this request."""

    limit: int
    remaining: int
    reset_s: int
    """Until the whole limit is there again."""


@dataclass(frozen=True)
class Charge:
    """Tokens that were counted for a request before it was known what it takes."""

    caller: str
    tokens: int
    window_ends: float


class Rates:
    """Windows of a minute, each beginning with the first request after the last one."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._storage = MemoryStorage()
        self._clock = clock
        self._ends: dict[str, float] = {}
        """When windows end that have begun: a storage is not asked what it has said."""

    async def take_request(self, caller: str, limit: int) -> Standing:
        """Count one request.

        Raises:
            RateExceeded: the minute's are used up; says when the next begins.
        """
        taken, ends = await self._take(f"requests/{caller}", 1)
        if taken > limit:
            raise RateExceeded("requests", limit, max(1, self._until(ends)))
        return Standing(limit, limit - taken, self._until(ends))

    async def take_tokens(self, caller: str, limit: int, tokens: int) -> tuple[Standing, Charge]:
        """Count the tokens that a request may take; `settle` corrects it.

        Raises:
            RateExceeded: they are more than the minute has left. One that takes more than a whole minute's is let
                in when all of it is left.
        """
        key = f"tokens/{caller}"
        taken, ends = await self._take(key, tokens)
        if taken - tokens + min(tokens, limit) > limit:
            await self._storage.incr(key, WINDOW_S, -tokens)
            raise RateExceeded("tokens", limit, max(1, self._until(ends)))
        return Standing(limit, max(0, limit - taken), self._until(ends)), Charge(caller, tokens, ends)

    async def settle(self, charge: Charge, tokens: int) -> None:
        """Count what the request really took instead.

        If its minute is over, only what it took beyond its charge counts, in the minute that is: nothing is given
        back to another minute than it was taken from.
        """
        more = tokens - charge.tokens
        if more > 0 or (more < 0 and self._clock() < charge.window_ends):
            await self._take(f"tokens/{charge.caller}", more)

    async def _take(self, key: str, amount: int) -> tuple[int, float]:
        """How much has been taken in this window with this, and when it ends."""
        taken = await self._storage.incr(key, WINDOW_S, amount)
        ends = self._ends.get(key, 0.0)
        if ends <= self._clock() or taken == amount:
            ends = self._ends[key] = await self._storage.get_expiry(key)
        return taken, ends

    def _until(self, ends: float) -> int:
        return max(0, math.ceil(ends - self._clock()))
