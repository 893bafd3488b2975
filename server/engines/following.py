"""Follows a tier's engines that somebody else runs: every address of its URLs is a replica of its own."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from server.engines.departures import Add, Departures, Remove
from server.engines.going_on import goes_well
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.resolution import addresses_of
from server.engines.state import State

log = logging.getLogger("assay.following")

LOOK_S = 5.0
"""How often names are resolved again: as long as Kubernetes' DNS remembers what it has answered."""
REFUSED_FOR_S = 60.0
"""When an engine that computed something else is looked at again: somebody may have put another in its place."""


@dataclass(frozen=True)
class Place:
    """Where one engine is."""

    url: str
    address: str

    def __str__(self) -> str:
        return self.url if self.address in self.url else f"{self.url} ({self.address})"


class Following:
    """One tier's."""

    def __init__(
        self,
        pool: Pool,
        urls: Sequence[str],
        replica_at: Callable[[Place], Replica],
        *,
        resolve: Callable[[str], Awaitable[frozenset[str]]] = addresses_of,
        look_s: float = LOOK_S,
    ) -> None:
        self.pool = pool
        self.urls = tuple(urls)
        self._replica_at = replica_at
        self._resolve = resolve
        self._look_s = look_s
        self._known: dict[str, frozenset[str]] = {url: frozenset() for url in urls}
        self._unresolved: set[str] = set()
        self._replicas: dict[Place, Replica] = {}
        self._refused_since: dict[Replica, float] = {}
        self._departures = Departures()

    async def find(self) -> None:
        """Look one time, and lay out a replica of each engine; none is spoken to, and none followed."""
        await self._look(self._lay_out, _keep)

    async def keep(self, add: Add, remove: Remove) -> None:
        """Look again and again, for ever."""
        try:
            while True:
                await goes_well(self.pool.tier.name, self._look(add, remove))
                await asyncio.sleep(self._look_s)
        finally:
            await self._departures.close()

    async def _look(self, add: Add, remove: Remove) -> None:
        await asyncio.gather(*(self._resolve_again(url) for url in self.urls))
        places = {Place(url, address) for url, known in self._known.items() for address in known}
        gone = [place for place in self._replicas if place not in places or self._was_long_refused(place)]
        for place in gone:
            replica = self._replicas.pop(place)
            self._refused_since.pop(replica, None)
            if place not in places:
                log.warning("%s is gone from its name, and gets no further requests", replica.name)
            self._departures.begin(remove, self.pool, replica)
        for place in sorted(places - self._replicas.keys(), key=str):
            self._replicas[place] = replica = self._replica_at(place)
            add(self.pool, replica)

    async def _resolve_again(self, url: str) -> None:
        """What is known stays so while nobody can say."""
        try:
            self._known[url] = await self._resolve(url)
            self._unresolved.discard(url)
        except OSError as error:
            if url not in self._unresolved:
                log.warning("%s: %s cannot be resolved (%s)", self.pool.tier.name, url, error)
            self._unresolved.add(url)

    def _was_long_refused(self, place: Place) -> bool:
        replica = self._replicas[place]
        if replica.state is not State.REFUSED:
            self._refused_since.pop(replica, None)
            return False
        return time.monotonic() - self._refused_since.setdefault(replica, time.monotonic()) > REFUSED_FOR_S

    @staticmethod
    def _lay_out(pool: Pool, replica: Replica) -> None:
        pool.add(replica)


async def _keep(pool: Pool, replica: Replica) -> None:
    """Not before anything is followed."""
