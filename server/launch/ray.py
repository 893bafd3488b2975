"""Engines on the nodes of a Ray cluster, a placement group and an actor each.

Ray finds the room and says when a node is lost. That an engine is started again is its replica's to see to, as
with one on this machine: a new placement is made then, on whatever nodes there are.
"""

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from server.engines.failures import EngineNotStarted
from server.launch.actor import EngineActor, Order, Report
from server.launch.aside import aside
from server.launch.cluster import Cluster
from server.launch.launch import Launched
from server.launch.process import GRACE_S, TETHER_GRACE_S
from tiers.bundles import Bundles
from tiers.engine import Backend
from tiers.errors import AssayError
from tiers.tier import Tier

log = logging.getLogger("assay.ray")

LOST = 137
"""The exit code of an engine whose node is gone: as of one that was killed."""
UNREACHABLE_S = 20.0
"""How long a node may be out of reach, whose engine answers; one that does not, its replica finds out sooner."""
GIVE_BACK_S = 5.0
POLL_S = 0.5
ASK_AGAIN_S = 1.0


@dataclass(frozen=True)
class RayLaunch:
    """Starts engines of one tier on a cluster."""

    cluster: Cluster
    bundles: Bundles
    backend: Backend
    takes_faults: bool = False
    traces_url: str | None = None

    async def begin(self, tier: Tier, log: Path) -> Launched:
        """See `Launch.begin`."""
        room = Room(self.cluster.ray, self.bundles)
        try:
            actor, launched = await self._started(tier, log, room)
        except BaseException:
            await _given_back(room)
            raise
        host = launched.url.rpartition(":")[0]
        process = RayProcess(self.cluster.ray, actor, room, f"{log.absolute()} on {host.rpartition('/')[2]}")
        return Launched(launched.url, launched.key, process)

    async def _started(self, tier: Tier, log: Path, room: "Room") -> tuple[Any, Launched]:
        """The actor, and what it says. Raises EngineNotStarted."""
        errors = self.cluster.ray.exceptions
        try:
            await room.wait(tier, self.cluster.settings.room_timeout_s)
            actor = await aside(room.actor)
            launched: Launched = await actor.start.remote(self._order(tier, log, room))
        except AssayError as error:  # the actor's own sentence, to which Ray adds where it was said
            raise EngineNotStarted(str(getattr(error, "cause", error))) from error
        except errors.RayError as error:
            why = [line for line in str(error).splitlines() if line.strip()]
            raise EngineNotStarted(
                f"{tier.name}: the engine could not be started on the Ray cluster ({why[-1].strip()[:300]})."
            ) from error
        return actor, launched

    def _order(self, tier: Tier, log: Path, room: "Room") -> Order:
        return Order(
            tier=tier,
            backend=self.backend,
            log=log.absolute(),
            asked_from=self.cluster.here,
            takes_faults=self.takes_faults,
            traces_url=self.traces_url,
            group=room.id if self.bundles.over_nodes else None,
        )


class Room:
    """What is set aside for one replica in the cluster.

    Ray's own calls wait for the cluster's head, seconds if it is slow: all of them are for threads. One may go on
    there when whoever waited for it has left: each has the room to itself, and none begins once it is given back.
    """

    def __init__(self, ray: Any, bundles: Bundles) -> None:
        self._ray = ray
        self._bundles = bundles
        self._group: Any = None
        self._actor: Any = None
        self._given_back = False
        self._mine = threading.Lock()

    @property
    def id(self) -> str:
        """What Ray calls it."""
        name: str = self._group.id.hex()
        return name

    async def wait(self, tier: Tier, timeout_s: float) -> None:
        """Until it is there.

        Raises:
            EngineNotStarted: no node had it within the time.
        """
        await aside(self._set_aside)
        until = time.monotonic() + timeout_s
        while not await aside(partial(self._group.wait, POLL_S)):
            if time.monotonic() > until:
                raise EngineNotStarted(
                    f"{tier.name}: no node of the Ray cluster has had {self._bundles} free for {timeout_s:.0f} s: "
                    "add nodes, or have fewer replicas."
                )

    def _set_aside(self) -> None:
        from ray.util.placement_group import placement_group

        with self._mine:
            if not self._given_back:
                # Bound to this process's life, as its actor is: when the gateway ends, however, so do they.
                bundles = [dict(each) for each in self._bundles.each]
                self._group = placement_group(bundles, strategy=self._bundles.strategy)

    def actor(self) -> Any:
        """The actor for its engine, which Ray neither starts twice nor shows work twice; None once given back."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        first = self._bundles.each[0]
        # Over several nodes the GPUs are vLLM's to give to its workers.
        gpus = 0 if self._bundles.over_nodes else first.get("GPU", 0)
        with self._mine:
            if not self._given_back:
                self._actor = (
                    self._ray.remote(EngineActor)
                    .options(
                        num_cpus=first["CPU"],
                        num_gpus=gpus,
                        memory=first.get("memory"),
                        max_restarts=0,
                        max_task_retries=0,
                        scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
                    )
                    .remote()
                )
            return self._actor

    def give_back(self) -> None:
        """End whatever is in it, and set it aside no longer. Safe to call again."""
        from ray.util.placement_group import remove_placement_group

        with self._mine:
            self._given_back = True
            try:
                if self._actor is not None:
                    self._ray.kill(self._actor, no_restart=True)
                if self._group is not None:
                    remove_placement_group(self._group)
            except self._ray.exceptions.RayError as error:
                # Ray does it by itself when it learns that this process has ended.
                log.warning("room in the Ray cluster could not be given back (%s)", str(error).splitlines()[-1:])


async def _given_back(room: Room) -> None:
    """Have it be given back. A head that is lost is not waited for, for that would take a minute."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GIVE_BACK_S):
            await aside(room.give_back)


class RayProcess:
    """An engine's processes on a node; see `Process`."""

    def __init__(self, ray: Any, actor: Any, room: Room, log: str) -> None:
        self.log: Path | str = log
        self._errors = ray.exceptions
        self._actor = actor
        self._room = room
        self._report = Report(None, "")
        self._following = asyncio.create_task(self._follow())

    @property
    def exit_code(self) -> int | None:
        """None while it runs, as far as is known here."""
        return self._report.exit_code

    async def wait(self) -> int:
        """Wait until it has ended, or its node is lost."""
        await asyncio.wait({self._following})
        return LOST if self.exit_code is None else self.exit_code

    async def stop(self) -> None:
        """End it; returns when nothing of it is left, or its node is out of reach. Safe to call again."""
        if not self._following.done():
            stopping = asyncio.ensure_future(self._actor.stop.remote())
            # The actor's end is one as well: with it ends its engine.
            await asyncio.wait(
                {stopping, self._following}, timeout=GRACE_S + TETHER_GRACE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if stopping.done() and not stopping.cancelled():
                stopping.exception()  # taken note of: what follows ends it in any case
            stopping.cancel()
        self._following.cancel()
        await _given_back(self._room)

    def last_line(self) -> str:
        """The last thing it logged, for people who wait."""
        return self._report.tail.rpartition("\n")[2]

    def tail(self, size: int = 4096) -> str:
        """The end of its log."""
        return self._report.tail[-size:]

    async def _follow(self) -> None:
        """Ask how it does until it has ended; a node out of reach for long is lost."""
        reached_at = time.monotonic()
        while self._report.exit_code is None:
            try:
                self._report = await self._actor.report.remote()
                reached_at = time.monotonic()
            except self._errors.ActorUnavailableError:
                if time.monotonic() - reached_at > UNREACHABLE_S:
                    self._lost("its node cannot be reached")
                await asyncio.sleep(ASK_AGAIN_S)
            except self._errors.RayError as error:
                self._lost(str(error).splitlines()[0])

    def _lost(self, why: str) -> None:
        self._report = Report(LOST, "\n".join((self._report.tail, f"Ray: {why}")))
