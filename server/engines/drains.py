"""An operator's work on a tier: its engines started again one after the other, ended, or brought back.

No request that was accepted is broken off for it: who is answered is waited for, and who comes meanwhile goes to
another replica or waits in the queue. Knows replicas and their service; knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from server.engines.departures import POLL_S
from server.engines.failures import PrecisionRefused
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.signs import first_of
from tiers.errors import AssayError

log = logging.getLogger("assay.drain")


class Work(StrEnum):
    """What is to become of the engines."""

    RESTART = "restart"
    STOP = "stop"
    RESUME = "resume"


class NotDrained(AssayError):
    """The work was not begun, or not done to its end; what is not out of service by now serves as before."""


@dataclass(frozen=True)
class At:
    """Where the work on a tier is."""

    replica: str
    """By its name for people."""
    doing: str
    running: int = 0
    """Requests that are waited for."""


class Drain:
    """One such work on one tier."""

    def __init__(
        self, fleet: Fleet, pool: Pool, work: Work, replicas: Sequence[Replica], timeout_s: float
    ) -> None:
        self.pool = pool
        self.at: At | None = None
        self._fleet = fleet
        self._service = pool.service
        self._replicas = tuple(replicas)
        self._timeout_s = timeout_s
        self._given_up = asyncio.Event()
        do = {Work.RESTART: self._restart, Work.STOP: self._stop, Work.RESUME: self._resume}[work]
        self.task = asyncio.create_task(do())
        """Raises NotDrained when the work is not done to its end."""
        self.task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        """Who asked for it may have left: the log hears of its end in any case."""
        if task.cancelled() or (problem := task.exception()) is None:
            return
        if isinstance(problem, AssayError):
            log.warning("%s", problem)
        else:
            log.error("%s: a mistake of the gateway", self.pool.tier.name, exc_info=problem)

    def give_up(self) -> None:
        """Nobody asks for it any more: what is waited for serves on, and what was begun is brought to its end."""
        self._given_up.set()

    async def _restart(self) -> None:
        for replica in self._replicas:
            if self._has_left(replica):
                continue
            with self._returning(replica):
                await self._until(partial(self._service.is_done_with, replica), replica)
                await self._start(replica)

    async def _resume(self) -> None:
        self._service.closed = False
        for replica in self._replicas:
            with self._returning(replica):
                await self._start(replica)

    async def _stop(self) -> None:
        mine = [replica for replica in self._replicas if not self._has_left(replica)]
        if any(replica not in mine and not replica.leaving for replica in self.pool.replicas):
            await self._leave_to_others(mine)
        else:
            await self._close(mine)
        for replica in mine:
            self.at = At(replica.name, "ending its engine")
            await self._fleet.halt(replica)

    def _has_left(self, replica: Replica) -> bool:
        """Whether it is on its way out by another's decision, or gone, since this was begun."""
        return replica.leaving or replica not in self.pool.replicas

    async def _leave_to_others(self, mine: Sequence[Replica]) -> None:
        for replica in mine:
            self._service.take_out(replica)
        try:
            for replica in mine:
                await self._until(partial(_is_idle, replica), replica)
        except BaseException:
            for replica in mine:
                self._service.take_back(replica)
            self._service.changed()
            raise

    async def _close(self, mine: Sequence[Replica]) -> None:
        """Refuse what comes, and have what waits in the queue answered as well."""
        self._service.closed = True
        try:
            for replica in mine:
                await self._until(lambda: self._service.is_empty, replica)
        except BaseException:
            self._service.closed = False
            raise
        for replica in mine:
            self._service.take_out(replica)

    @contextmanager
    def _returning(self, replica: Replica) -> Iterator[None]:
        """Have requests go to others, or wait, until it is back, or it is plain that it does not come."""
        self._service.returning = replica
        try:
            yield
        finally:
            self._service.returning = None
            self._service.changed()

    async def _start(self, replica: Replica) -> None:
        self._check_wanted()
        self.at = At(replica.name, "starting its engine")
        self._service.take_back(replica)
        try:
            await self._fleet.restart(replica)
        except PrecisionRefused:
            raise
        except AssayError as error:
            raise NotDrained(
                f"{error} The server goes on trying; no other engine of the tier was touched."
            ) from error

    async def _until(self, is_so: Callable[[], bool], replica: Replica) -> None:
        """Wait, and show meanwhile for how many requests. Raises NotDrained."""
        self._check_wanted()

        async def look() -> None:
            until = time.monotonic() + self._timeout_s
            while not is_so() and time.monotonic() < until:
                self.at = At(replica.name, "waiting for its requests to end", replica.running)
                await asyncio.sleep(POLL_S)

        await first_of([look(), self._given_up.wait()])
        if is_so():
            return
        self._check_wanted()
        raise NotDrained(
            f"{replica.name}: {replica.running} requests still ran after {self._timeout_s:g} s. They go on, and "
            "it serves as before: ask again, or give them longer by --timeout."
        )

    def _check_wanted(self) -> None:
        if self._given_up.is_set():
            raise NotDrained(f"{self.pool.tier.name}: given up; what was not drained by then serves as before.")


def _is_idle(replica: Replica) -> bool:
    return not replica.running


def _chosen(pool: Pool, work: Work, number: int | None) -> list[Replica]:
    """The replicas that the work is to be done on. Raises NotDrained when there are none."""
    tier, out = pool.tier.name, pool.service.has_out
    named = [replica for replica in pool.replicas if number in (None, replica.number)]
    if not named:
        numbers = ", ".join(str(replica.number) for replica in pool.replicas)
        raise NotDrained(f"{tier} has no replica {number}; it has {numbers or 'none at all'}.")
    if work is Work.RESUME:
        if drained := [replica for replica in named if out(replica)]:
            return drained
        raise NotDrained(f"{tier} is not drained.")
    if staying := [replica for replica in named if not replica.leaving]:
        return staying
    if any(map(out, named)):
        raise NotDrained(f"{tier} is drained already; `assay drain --resume` brings it back.")
    raise NotDrained(f"{named[0].name} ends by itself once it has answered what it works on.")


class Drains:
    """Those under way, at most one a tier."""

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._under_way: dict[Pool, Drain] = {}
        self._closed = False

    def begin(self, tier: str, work: Work, number: int | None = None, timeout_s: float | None = None) -> Drain:
        """Begin to work on a tier, or on the one of its replicas that has this number.

        Raises:
            NotDrained: there is nothing to be done, or something else is done to it already.
        """
        pool = next(pool for pool in self._fleet.pools if pool.tier.name == tier)
        if self._closed:
            raise NotDrained("The server is stopping.")
        if any(following.pool is pool for following in self._fleet.followings):
            raise NotDrained(
                f"Somebody else runs the engines of {tier} (launch: url): stop them there. They take nothing new "
                "then, and end once they have answered what they work on."
            )
        if (other := self._under_way.get(pool)) is not None and not other.task.done():
            raise NotDrained(f"{tier} is being drained already; ask again once that has ended.")
        replicas = _chosen(pool, work, number)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        drain = self._under_way[pool] = Drain(self._fleet, pool, work, replicas, timeout_s)
        log.warning("%s: an operator asks to %s %d of its engines", tier, work.value, len(replicas))
        return drain

    def give_up(self) -> None:
        """Begin nothing more, and let what was begun come to its end: requests may wait for it."""
        self._closed = True
        for drain in self._under_way.values():
            drain.give_up()

    async def close(self) -> None:
        """Break off what is under way."""
        self.give_up()
        tasks = [drain.task for drain in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
