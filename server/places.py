"""The requests that an engine works on: counted, and broken off together when it ends. Knows no HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

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

    def take(self) -> "Place":
        """A place, for the block; raises TimeoutError out of it when all are broken off."""
        return Place(self._gauge, self._ends)

    def break_off(self) -> None:
        """Raise TimeoutError in every request that has a place."""
        for end in self._ends:
            if not end.expired():
                end.reschedule(0)


class Place:
    """One of them. A class, for every request has one, and a generator costs more."""

    def __init__(self, gauge: Gauge, ends: set[asyncio.Timeout]) -> None:
        self._gauge = gauge
        self._ends = ends
        self._end = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._end.__aenter__()
        self._ends.add(self._end)
        self._gauge.inc()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gauge.dec()
        self._ends.discard(self._end)
        await self._end.__aexit__(kind, error, trace)
