"""The requests that an engine works on: counted, and broken off together when it ends. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from prometheus_client import Gauge


class Places:
    """One for each request on an engine; ``gauge`` counts those on all engines of the tier."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._ends: set[asyncio.Timeout] = set()
        self._counted = 0

    @property
    def taken(self) -> int:
        """Requests that have a place, or that wait for the engine to wake."""
        return max(len(self._ends), self._counted)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count a request that may have to wait before it takes its place, until it leaves it."""
        self._counted += 1
        try:
            yield
        finally:
            self._counted -= 1

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """A place, for the block; raises TimeoutError out of it when all are broken off."""
        self._gauge.inc()
        try:
            async with asyncio.timeout(None) as end:
                self._ends.add(end)
                try:
                    yield
                finally:
                    self._ends.discard(end)
        finally:
            self._gauge.dec()

    def break_off(self) -> None:
        """Raise TimeoutError in every request that has a place."""
        for end in self._ends:
            if not end.expired():
                end.reschedule(0)
