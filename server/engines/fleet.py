"""All replicas of a server: watched, drained and stopped together."""

import asyncio
from collections.abc import Iterable

from server.engines.departures import until_idle
from server.engines.following import Following
from server.engines.going_on import goes_well
from server.engines.keeper import keep
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.scaling import Scaling
from server.engines.state import State


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

    def watch(self) -> None:
        """From now on, start again what ends."""
        for replica in self.replicas:
            if replica not in self._keepers:
                self._keep(replica)
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
        await until_idle(replica, timeout_s)
        await self._end_keeper(replica)
        await replica.stop()
        pool.remove(replica)  # last: what the server's end breaks off before, `stop` still finds

    async def restart(self, replica: Replica) -> None:
        """End its engine, which has nothing to do, and start another; whatever comes of that, it is watched.

        Raises:
            AssayError: the other one does not start now.
        """
        replica.state = State.RESTARTING  # before all else: while its keeper ends, it could get requests
        await self._end_keeper(replica)
        try:
            await replica.restart()
        except Exception:
            self._keep(replica)
            raise
        self._keep(replica)

    async def halt(self, replica: Replica) -> None:
        """End its engine, which is to take nothing new already; `restart` starts another."""
        await self._end_keeper(replica)
        await replica.end()

    def _keep(self, replica: Replica) -> None:
        self._keepers[replica] = asyncio.create_task(keep(replica))

    async def _end_keeper(self, replica: Replica) -> None:
        if (keeper := self._keepers.pop(replica, None)) is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def stop(self) -> None:
        """End every engine; what they still answer gets its error event first."""
        keepers = (*self._changers, *self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        # Whatever is watched, whether or not a pool has it still: nobody else would end it.
        await asyncio.gather(*(replica.stop() for replica in {*self.replicas, *self._keepers}))


async def _bring_up(replica: Replica) -> None:
    """Start it, and watch it from then on."""
    await goes_well(replica.name, replica.start())
    await keep(replica)
