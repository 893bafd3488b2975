"""Every address of a name is a replica, as long as it is one."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import pytest

from server.config import Config
from server.engines import following
from server.engines.fleet import Fleet
from server.engines.following import Following, Place
from server.engines.pool import Pool
from server.engines.resolution import addresses_of
from server.engines.state import State
from server.metrics import Metrics
from tests.server.conftest import FakeEngineReplica, fake_replica

URL = "http://turbo:8100"
FIRST, SECOND = "10.0.0.1", "10.0.0.2"


class Launchless(FakeEngineReplica):
    """One that is ready as soon as it is started."""

    async def start(self, say: object = None) -> None:
        self.state = State.READY

    async def until_it_fails(self) -> None:
        await asyncio.Event().wait()


class Cluster:
    """A tier whose name has the addresses that a test gives it."""

    def __init__(self, folder: Path) -> None:
        self.addresses: frozenset[str] | None = frozenset({FIRST})
        self.error: Exception = OSError("no such name")
        config, metrics = Config(home=folder), Metrics()
        first = fake_replica(config, metrics)
        self.pool = Pool(config.tiers[0], first.manifest, 2048, (), metrics, max_num_seqs=4)
        self.made: list[Place] = []

        def replica_at(place: Place) -> FakeEngineReplica:
            self.made.append(place)
            made = fake_replica(config, metrics)
            made.__class__ = Launchless
            made.name = str(place)
            return made

        self.following = Following(self.pool, [URL], replica_at, resolve=self._resolve, look_s=0.01)
        self.fleet = Fleet([self.pool], [self.following], leave_within_s=5)

    async def _resolve(self, url: str) -> frozenset[str]:
        if self.addresses is None:
            raise self.error
        return self.addresses

    @property
    def names(self) -> list[str]:
        return sorted(replica.name for replica in self.pool.replicas)

    async def until(self, *addresses: str) -> None:
        async with asyncio.timeout(5):
            while self.names != sorted(f"{URL} ({address})" for address in addresses):
                await asyncio.sleep(0.005)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


async def test_a_new_address_is_a_new_replica_and_one_that_is_gone_is_none(cluster: Cluster) -> None:
    cluster.fleet.follow()
    await cluster.until(FIRST)
    cluster.addresses = frozenset({FIRST, SECOND})
    await cluster.until(FIRST, SECOND)
    cluster.addresses = frozenset({SECOND})
    await cluster.until(SECOND)
    assert [place.address for place in cluster.made] == [FIRST, SECOND], "who stays is not made anew"
    await cluster.fleet.stop()


async def test_one_that_is_gone_from_its_name_finishes_what_it_works_on(cluster: Cluster) -> None:
    cluster.fleet.follow()
    await cluster.until(FIRST)
    (replica,) = cluster.pool.replicas
    assert isinstance(replica, FakeEngineReplica)
    async with replica.works_on(1):
        cluster.addresses = frozenset({SECOND})
        await cluster.until(FIRST, SECOND)
        await asyncio.sleep(0.1)
        assert cluster.pool.service.shown(replica) is State.DRAINING
        assert cluster.pool.pick() is not replica
        assert replica in cluster.pool.replicas
    await cluster.until(SECOND)
    async with asyncio.timeout(5):
        while replica.state.value != "stopped":
            await asyncio.sleep(0.005)
    await cluster.fleet.stop()


async def test_while_nobody_can_resolve_the_name_what_is_known_stays(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.fleet.follow()
    await cluster.until(FIRST)
    cluster.addresses = None
    await asyncio.sleep(0.1)
    assert cluster.names == [f"{URL} ({FIRST})"]
    assert len([each for each in caplog.records if "cannot be resolved" in each.message]) == 1, "said once"
    cluster.addresses = frozenset({SECOND})
    await cluster.until(SECOND)
    await cluster.fleet.stop()


async def test_one_look_that_fails_is_told_and_is_not_the_last(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.addresses, cluster.error = None, UnicodeError("label too long")
    cluster.fleet.follow()
    await asyncio.sleep(0.05)
    assert "label too long" in caplog.text
    cluster.addresses = frozenset({FIRST})
    await cluster.until(FIRST)
    await cluster.fleet.stop()


async def test_one_that_was_refused_is_looked_at_again_later(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "REFUSED_FOR_S", 0.1)
    cluster.fleet.follow()
    await cluster.until(FIRST)
    (replica,) = cluster.pool.replicas
    replica.state = State.REFUSED
    async with asyncio.timeout(5):
        while cluster.pool.replicas in ((), (replica,)):
            await asyncio.sleep(0.01)
    await cluster.until(FIRST)
    assert len(cluster.made) == 2
    await cluster.fleet.stop()


async def test_watching_does_not_watch_twice_who_was_found_before(cluster: Cluster) -> None:
    cluster.fleet.follow()
    await cluster.until(FIRST)
    before = asyncio.all_tasks()
    cluster.fleet.watch()
    assert asyncio.all_tasks() == before
    await cluster.fleet.stop()


async def test_a_name_with_both_kinds_of_addresses_has_each_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("fd00::1", 80, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (FIRST, 80)),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (SECOND, 80)),
    ]

    def getaddrinfo(*_: object, **__: object) -> Awaitable[object]:
        return asyncio.sleep(0, found)

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await addresses_of(URL) == {FIRST, SECOND}
    del found[1:]
    assert await addresses_of(URL) == {"fd00::1"}
