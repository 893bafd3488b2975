"""How many replicas a tier has, decided from what was seen of it over time."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from server.config import Config
from server.engines.departures import until_idle
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.scaling import Bounds, Look, Reason, Scaling, next_reason
from server.engines.state import State
from server.metrics import Metrics
from tests.server.conftest import FakeEngineReplica, fake_replica

BOUNDS = Bounds(fewest=1, most=3, requests_of_one=4, more_after_s=10, fewer_after_s=100)


def changes(looks: Iterable[Look], bounds: Bounds = BOUNDS) -> list[tuple[float, int]]:
    """When the number changes, and how; what is seen does not follow it."""
    reason, found = Reason(), []
    for look in looks:
        reason, change = next_reason(reason, look, bounds)
        if change:
            found.append((look.at, change))
    return found


def row(seconds: int, *, begin: int = 0, **seen: int) -> list[Look]:
    """The same, seen once a second."""
    what: dict[str, Any] = {"waiting": 0, "running": 0, "replicas": 1, "able": 1} | seen
    return [Look(at, **what) for at in range(begin, begin + seconds)]


def test_a_queue_that_lasts_brings_one_replica_more() -> None:
    assert changes(row(15, waiting=3, running=4)) == [(10, 1)]


def test_a_queue_that_passes_brings_none() -> None:
    waves = [row(9, begin=at, waiting=3) + row(1, begin=at + 9) for at in range(0, 60, 10)]
    assert changes(look for wave in waves for look in wave) == []


def test_while_one_is_on_its_way_no_further_is_called() -> None:
    assert changes(row(60, waiting=9, replicas=2, able=1)) == []
    coming = row(30, waiting=9, replicas=2, able=1) + row(12, begin=30, waiting=9, replicas=2, able=2)
    assert changes(coming) == [(40, 1)]  # and the time begins anew once it is there: it may have been enough


def test_there_are_never_more_than_the_most() -> None:
    assert changes(row(60, waiting=9, replicas=3, able=3)) == []


def test_there_are_never_fewer_than_the_fewest() -> None:
    assert changes(row(500)) == []
    assert changes(row(500, replicas=2, able=2), Bounds(2, 3, 4)) == []


def test_when_few_requests_come_for_long_one_leaves() -> None:
    assert changes(row(150, replicas=3, able=3)) == [(100, -1)]


def test_one_busy_moment_keeps_them_all() -> None:
    busy = row(90, replicas=2, able=2) + row(1, begin=90, running=3, replicas=2, able=2)
    assert changes(busy + row(90, begin=91, replicas=2, able=2)) == []


def test_one_leaves_only_if_the_others_would_stay_well_below_full() -> None:
    assert changes(row(300, running=3, replicas=2, able=2)) == []  # 3 of the 4 places that would be left
    assert changes(row(101, running=2, replicas=2, able=2)) == [(100, -1)]


def test_load_between_the_two_bounds_changes_nothing_however_long() -> None:
    """Neither is there a queue, nor would one fewer do: what one replica more has settled stays settled."""
    assert changes(row(2000, running=5, replicas=2, able=2)) == []


def test_a_replica_that_failed_is_waited_for_and_not_replaced() -> None:
    assert changes(row(300, waiting=9, replicas=2, able=1, to_spare=1)) == []


def test_a_replica_that_never_comes_up_leaves_when_it_is_not_needed() -> None:
    assert changes(row(150, replicas=3, able=2, to_spare=1, running=4)) == [(100, -1)], "half of what two can do"
    assert changes(row(300, replicas=3, able=2, to_spare=1, running=5)) == []


def test_those_that_answer_are_kept_while_none_could_take_their_place() -> None:
    assert changes(row(300, replicas=2, able=1)) == [], "the first one has failed, and stays"
    assert changes(row(150, replicas=3, able=2)) == [(100, -1)]
    assert changes(row(300, replicas=2, able=0, to_spare=1)) == [], "nobody can say how many would be needed"


def test_what_an_operator_has_stopped_is_not_waited_for_and_keeps_its_place() -> None:
    stopped = row(15, waiting=3, running=4, stopped=1)
    assert changes(stopped) == [(10, 1)], "another is called"
    assert changes(stopped, Bounds(1, 2, 4, more_after_s=10)) == [], "it may be brought back"
    assert changes(row(300, replicas=2, able=2, stopped=1)) == [], "who is left may be needed"


def test_while_an_operator_works_on_the_tier_nothing_changes() -> None:
    assert changes(row(300, waiting=9, is_worked_on=True)) == []
    assert changes(row(300, replicas=3, able=3, is_worked_on=True)) == []


class Tended:
    """A tier with one replica, and who brings and takes others."""

    def __init__(self, folder: Path) -> None:
        self.config, self.metrics = Config(home=folder), Metrics()
        self.queue = 0
        first = self._ready(1)
        self.pool = Pool(self.config.tiers[0], first.manifest, 2048, [first], self.metrics, max_num_seqs=4)
        self.pool.watch_queue(lambda: self.queue)
        self.left: list[Replica] = []
        self.numbers: list[int] = []

    def _ready(self, number: int) -> FakeEngineReplica:
        replica = fake_replica(self.config, self.metrics, number, 3)
        replica.state = State.READY
        return replica

    def another(self, number: int) -> Replica:
        self.numbers.append(number)
        return self._ready(number)

    def add(self, pool: Pool, replica: Replica) -> None:
        pool.add(replica)

    async def remove(self, pool: Pool, replica: Replica) -> None:
        await until_idle(replica, 5)
        pool.remove(replica)
        self.left.append(replica)

    async def reaches(self, replicas: int) -> None:
        async with asyncio.timeout(2):
            while len(self.pool.replicas) != replicas:
                await asyncio.sleep(0.005)


@pytest.fixture
def tended(tmp_path: Path) -> Tended:
    return Tended(tmp_path)


async def test_a_tier_grows_with_its_queue_and_shrinks_without(tended: Tended) -> None:
    first = tended.pool.replicas[0]
    bounds = Bounds(1, 3, 4, more_after_s=0.01, fewer_after_s=0.02)
    keeping = asyncio.create_task(
        Scaling(tended.pool, bounds, tended.another, look_s=0.005).keep(tended.add, tended.remove)
    )
    tended.queue = 5
    await tended.reaches(3)
    tended.queue = 0
    await tended.reaches(1)
    keeping.cancel()
    assert tended.numbers == [2, 3]
    assert tended.pool.replicas == (first,)
    assert [replica.name.partition("(")[2] for replica in tended.left] == ["3 of 3)", "2 of 3)"]


@pytest.fixture
async def tending(tended: Tended) -> AsyncIterator[Tended]:
    """It is changed as soon as there is a reason."""
    bounds = Bounds(1, 3, 4, more_after_s=0.01, fewer_after_s=0.02)
    scaling = Scaling(tended.pool, bounds, tended.another, look_s=0.005)
    keeping = asyncio.create_task(
        scaling.keep(lambda *what: tended.add(*what), lambda *what: tended.remove(*what))
    )
    yield tended
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_with_the_server_what_leaves_is_broken_off_before_anything_else_is_done(tended: Tended) -> None:
    _, leaving = tended.pool.replicas[0], tended.another(2)
    tended.add(tended.pool, leaving)
    over: list[Replica] = []

    async def remove(pool: Pool, replica: Replica) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # an engine takes time to end
            over.append(replica)

    scaling = Scaling(tended.pool, Bounds(1, 3, 4, fewer_after_s=0), tended.another, look_s=0.005)
    keeping = asyncio.create_task(scaling.keep(tended.add, remove))
    async with asyncio.timeout(2):
        while not leaving.leaving:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert over == [leaving]


async def test_while_one_leaves_another_can_come(tending: Tended) -> None:
    tending.queue = 5
    await tending.reaches(2)
    _, leaving = tending.pool.replicas
    assert isinstance(leaving, FakeEngineReplica)
    async with leaving.works_on(1):
        tending.queue = 0
        async with asyncio.timeout(2):
            while not leaving.leaving:
                await asyncio.sleep(0.005)
        tending.queue = 5
        await tending.reaches(3)
        assert leaving in tending.pool.replicas


async def test_with_one_stopped_by_an_operator_another_can_come_and_none_leaves(tending: Tended) -> None:
    tending.queue = 5
    await tending.reaches(2)
    tending.pool.service.take_out(tending.pool.replicas[1])
    await tending.reaches(3)
    tending.queue = 0
    await asyncio.sleep(0.1)
    assert len(tending.pool.replicas) == 3
    assert not tending.left


async def test_none_leaves_while_an_operator_has_one_started_again(tending: Tended) -> None:
    tending.queue = 5
    await tending.reaches(3)
    tending.pool.service.returning = tending.pool.replicas[2]
    tending.queue = 0
    await asyncio.sleep(0.1)
    assert not any(replica.leaving for replica in tending.pool.replicas)
    tending.pool.service.returning = None
    await tending.reaches(1)


async def test_one_look_that_fails_is_told_and_is_not_the_last(
    tending: Tended, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("unforeseen")])

    def add(pool: Pool, replica: Replica) -> None:
        for failure in failures:
            raise failure
        pool.add(replica)

    tending.add = add  # type: ignore[method-assign]
    tending.queue = 5
    await tending.reaches(2)
    assert "unforeseen" in caplog.text


async def test_a_departure_that_fails_is_told(tending: Tended, caplog: pytest.LogCaptureFixture) -> None:
    async def remove(pool: Pool, replica: Replica) -> None:
        raise RuntimeError("unforeseen")

    tending.remove = remove  # type: ignore[method-assign]
    tending.add(tending.pool, tending.another(2))
    async with asyncio.timeout(2):
        while "unforeseen" not in caplog.text:
            await asyncio.sleep(0.005)


async def test_what_was_handed_to_full_engines_waits_as_well(tended: Tended) -> None:
    (replica,) = tended.pool.replicas
    assert isinstance(replica, FakeEngineReplica)
    async with replica.works_on(4):
        assert tended.pool.waiting == 0
        async with replica.works_on(2):
            assert tended.pool.waiting == 2
            tended.queue = 3
            assert tended.pool.waiting == 5


async def test_what_one_that_leaves_still_works_on_calls_no_other(tending: Tended) -> None:
    staying, leaving = tending.pool.replicas[0], tending.another(2)
    assert isinstance(staying, FakeEngineReplica)
    assert isinstance(leaving, FakeEngineReplica)
    tending.add(tending.pool, leaving)
    leaving.leaving = True
    async with leaving.works_on(1), staying.works_on(4):
        assert tending.pool.waiting == 0
        await asyncio.sleep(0.1)
        assert tending.pool.replicas == (staying, leaving)


async def test_where_another_has_room_nothing_waits_for_one_more(tended: Tended) -> None:
    """One was away, so that the other has more than it works on at once; now it is back, and idle."""
    first, back = tended.pool.replicas[0], tended.another(2)
    assert isinstance(first, FakeEngineReplica)
    async with first.works_on(6):
        tended.add(tended.pool, back)
        assert tended.pool.waiting == 0


async def test_one_that_cannot_answer_leaves_before_those_that_can(tended: Tended) -> None:
    first, refused, newest = tended.pool.replicas[0], tended.another(2), tended.another(3)
    for replica in refused, newest:
        tended.add(tended.pool, replica)
    refused.state = State.REFUSED
    bounds = Bounds(2, 3, 4, fewer_after_s=0.01)
    keeping = asyncio.create_task(
        Scaling(tended.pool, bounds, tended.another, look_s=0.005).keep(tended.add, tended.remove)
    )
    await tended.reaches(2)
    keeping.cancel()
    assert tended.pool.replicas == (first, newest)


async def test_one_that_leaves_is_not_missed_and_one_that_an_operator_has_out_is(tended: Tended) -> None:
    def replicas() -> float | None:
        return tended.metrics.registry.get_sample_value("assay_replicas", {"tier": tended.pool.tier.name})

    for number in 2, 3:
        tended.add(tended.pool, tended.another(number))
    _, leaving, out = tended.pool.replicas
    leaving.leaving = True
    assert (replicas(), tended.pool.ready) == (2, 2), "no engine is missing"
    tended.pool.service.take_out(out)
    assert (replicas(), tended.pool.ready, tended.pool.drained) == (2, 1, 1)
