"""All replicas of a server: watched, drained and stopped together."""

import asyncio
import logging
import time
from collections.abc import Iterable

from server.engines.following import Following
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.scaling import Scaling
from tiers.errors import AssayError

log = logging.getLogger("assay.fleet")


class Fleet:
    """All replicas of a server, tier by tier, and what makes them more or fewer."""

    def __init__(
        self,
        pools: Iterable[Pool],
        followings: Iterable[Following] = (),
        scalings: Iterable[Scaling] = (),
        *,
        leave_within_s: float = 3600,
    ) -> None:
        """``leave_within_s`` is for what an engine works on that leaves, and may take its time."""
        self.pools = tuple(pools)
        self.followings = tuple(followings)
        self._scalings = tuple(scalings)
        self._leave_within_s = leave_within_s
        self._keepers: dict[Replica, asyncio.Task[None]] = {}
        self._changers: list[asyncio.Task[None]] = []

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Those there are now."""
        return tuple(replica for pool in self.pools for replica in pool.replicas)

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
        for replica in self.replicas:
            if replica not in self._keepers:
                self._keepers[replica] = asyncio.create_task(replica.keep())
        self._change(self._scalings)

    def follow(self) -> None:
        """From now on, have a replica of each engine that somebody else runs."""
        self._change(self.followings)

    def _change(self, changing: Iterable[Following | Scaling]) -> None:
        self._changers += [asyncio.create_task(each.keep(self.add, self._let_go)) for each in changing]

    async def _let_go(self, pool: Pool, replica: Replica) -> None:
        await self.remove(pool, replica, self._leave_within_s)

    def add(self, pool: Pool, replica: Replica) -> None:
        """One replica more: it is started now, watched, and takes requests as soon as it can."""
        pool.add(replica)
        self._keepers[replica] = asyncio.create_task(_bring_up(replica))

    async def remove(self, pool: Pool, replica: Replica, timeout_s: float) -> None:
        """One replica fewer: it gets nothing new, ends what it works on within the time, and is stopped."""
        await replica.drain(timeout_s)
        pool.remove(replica)
        keeper = self._keepers.pop(replica, None)
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await replica.stop()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no request runs; False if some still did when the time was over."""
        until = time.monotonic() + timeout_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return not self.running

    async def stop(self) -> None:
        """End every engine; what they still answer gets its error event first."""
        keepers = (*self._changers, *self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self.replicas))


async def _bring_up(replica: Replica) -> None:
    """Start it, and watch it from then on."""
    try:
        await replica.start()
    except AssayError as error:
        log.error("%s", error)  # noqa: TRY400  # the sentence says it all
    await replica.keep()
