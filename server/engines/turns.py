"""Whose turn it is to be awake, among engines that share GPUs and sleep while idle. Knows nothing of HTTP."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol


class Sleeper(Protocol):
    """What can be put to sleep and woken."""

    async def sleep(self) -> None:
        """Give the memory back."""

    async def wake(self) -> None:
        """Take it again."""


class Turns:
    """At most one of a group is awake, so that each may use the memory of all.

    Who comes for one that sleeps waits until the other's requests are answered; who comes later waits behind, also
    for the one that is awake: nobody is starved. A caller who leaves meanwhile leaves no change half done.
    """

    def __init__(self, idle_after_s: float) -> None:
        self._idle_after_s = idle_after_s
        self._door = asyncio.Lock()
        self._awake: Sleeper | None = None
        self._change: asyncio.Task[None] | None = None
        """The last falling asleep or waking up, which goes on when whoever asked for it has left."""
        self.is_starting = False
        """Whether an engine is starting, which takes minutes: who comes meanwhile is better told so."""
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._bedtime: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def awake(self, sleeper: Sleeper) -> AsyncIterator[None]:
        """Hold ``sleeper`` awake within the block; wakes it first if it sleeps. Raises what waking raises."""
        async with self._door:
            if self._awake is not sleeper:
                await self._make_room()
                self._awake = sleeper
                self._change = asyncio.create_task(sleeper.wake())
            self._use()
        try:
            await self._settled()
            yield
        finally:
            self._leave()

    @asynccontextmanager
    async def starting(self, sleeper: Sleeper) -> AsyncIterator[None]:
        """Have all the memory within the block; ``sleeper`` is awake after it, unless it raises."""
        async with self._door:
            self.is_starting = True
            try:
                self.forget(sleeper)
                await self._make_room()
                yield
            finally:
                self.is_starting = False
            self._awake = sleeper
            self._use()
        self._leave()

    def forget(self, sleeper: Sleeper) -> None:
        """Its engine is gone, and its memory free."""
        if self._awake is sleeper:
            self._awake, self._change = None, None

    def close(self) -> None:
        """Let nobody fall asleep any more."""
        self._idle_after_s = math.inf
        if self._bedtime:
            self._bedtime.cancel()

    def _use(self) -> None:
        self._users += 1
        self._unused.clear()
        if self._bedtime:
            self._bedtime.cancel()
            self._bedtime = None

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()
            if self._idle_after_s < math.inf:
                loop = asyncio.get_running_loop()
                self._bedtime = loop.call_later(self._idle_after_s, self._go_to_bed)

    def _go_to_bed(self) -> None:
        # Nobody uses it now, so that nothing is waited for; who comes meanwhile waits for the change.
        if not self._users and not self._door.locked() and self._awake is not None:
            sleeper, self._awake = self._awake, None
            self._change = asyncio.create_task(sleeper.sleep())

    async def _make_room(self) -> None:
        """Wait until the one that is awake has answered everything, and put it to sleep."""
        await self._unused.wait()
        with contextlib.suppress(Exception):  # whoever asked for that change was told
            await self._settled()
        if self._awake is not None:
            sleeper, self._awake = self._awake, None
            self._change = asyncio.create_task(sleeper.sleep())
            await self._settled()

    async def _settled(self) -> None:
        if self._change is not None:
            await asyncio.shield(self._change)


def share(gpus: Sequence[frozenset[int]]) -> list[int]:
    """Which of several sets of GPUs overlap, directly or through others: equal numbers take turns."""
    groups = list(range(len(gpus)))
    for i, mine in enumerate(gpus):
        for j in range(i):
            if mine & gpus[j]:
                old, new = groups[i], groups[j]
                groups = [new if group == old else group for group in groups]
    return groups
