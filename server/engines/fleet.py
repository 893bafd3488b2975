"""All replicas of a server: watched, drained and stopped together."""

import asyncio
import time
from collections.abc import Iterable

from server.engines.pool import Pool


class Fleet:
    """All replicas of a server, tier by tier."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self.pools = tuple(pools)
        self.replicas = tuple(replica for pool in self.pools for replica in pool.replicas)
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        """Whether every configured tier can answer."""
        return all(pool.can_answer for pool in self.pools)

    @property
    def running(self) -> int:
        """Requests that engines work on now."""
        return sum(replica.running for replica in self.replicas)

    def watch(self) -> None:
        """From now on, start again what ends."""
        self._keepers = [asyncio.create_task(replica.keep()) for replica in self.replicas]

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no request runs; False if some still did when the time was over."""
        until = time.monotonic() + timeout_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return not self.running

    async def stop(self) -> None:
        """End every engine; what they still answer gets its error event first."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
