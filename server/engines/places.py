"""The requests that an engine works on: counted, and broken off together when it ends. Knows no HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class BrokenOff(Exception):
    """The engine was ended while it worked on this request."""


class Places:
    """One for each request on an engine."""

    def __init__(self) -> None:
        self._places: set[Place[object]] = set()
        self._counted = 0

    @property
    def taken(self) -> int:
        """Requests that have a place, or that wait for the engine to wake."""
        return max(len(self._places), self._counted)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count a request that may have to wait before it takes its place, until it leaves it."""
        self._counted += 1
        try:
            yield
        finally:
            self._counted -= 1

    def take(self, way: T) -> "Place[T]":
        """A place for the block, which gets ``way``, the way to the engine. Raises BrokenOff if all are."""
        return Place(way, self._places)

    def break_off(self) -> None:
        """Raise BrokenOff in every request that has a place."""
        for place in self._places:
            place.break_off()


class Place(Generic[T]):
    """One of them. A class, for every request has one, and a generator costs more."""

    def __init__(self, way: T, places: "set[Place[object]]") -> None:
        self._way = way
        self._places: set[Place[T]] = places  # type: ignore[assignment]  # which nobody takes a way from
        self._broken = False

    async def __aenter__(self) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._places.add(self)
        return self._way

    def break_off(self) -> None:
        """Interrupt the block."""
        if not self._broken:
            self._broken = True
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.discard(self)
        if self._broken and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise BrokenOff("its engine was ended") from error
