"""An operator's work on a tier loses no accepted request, and ends with everything in its place."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.engines.drains import Drains, NotDrained, Work
from server.engines.following import Following
from server.engines.state import State
from server.engines.turns import Turns
from server.fair_queue import FairQueue
from tests.server.engines.drained import (
    STREAM,
    TIER,
    Engines,
    a_moment,
    drained_gateway,
    is_whole,
    slow_to_wake,
    until,
)
from tiers.probe.reading import SLEEP_ROUTE, WAKE_ROUTE


@pytest.fixture
async def tier(tmp_path: Path) -> AsyncIterator[tuple[Engines, Drains]]:
    async with drained_gateway(tmp_path) as made:
        yield made


Tier = tuple[Engines, Drains]


async def test_all_that_was_accepted_before_and_during_a_restart_is_answered_whole(
    tier: Tier, caplog: pytest.LogCaptureFixture
) -> None:
    engines, drains = tier
    replica = engines.gateway.replica
    before, engine = engines.ask(5), replica.engine  # two run, for there are as many places, and three wait
    await until(lambda: engines.begun == 2)
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    during = engines.ask(2)
    await a_moment()
    assert drain.at is not None
    assert (drain.at.doing, drain.at.running) == ("waiting for its requests to end", 2)
    assert engines.pool.state is State.DRAINING
    engines.may_end.set()
    await until(lambda: replica.state is State.RESTARTING)
    during += engines.ask(2)
    await a_moment()
    assert engines.begun == 2, "nothing reaches the engine that is to be ended"
    assert not any(request.done() for request in during), "who comes while it starts waits"
    engines.may_start.set()
    await drain.task
    assert all(is_whole(answer) for answer in await asyncio.gather(*before, *during))
    assert replica.engine is not engine
    assert engines.gateway.metric("assay_engine_restarts_total") == 0, "it did not fail"
    assert engines.gateway.metric("assay_engine_planned_restarts_total") == 1
    assert engines.gateway.metric("assay_replicas_drained") == 0
    await a_moment()
    assert "the engine ended" not in caplog.text, "nor does anybody start it another time"


async def test_who_has_a_place_and_is_not_on_the_engine_yet_is_waited_for(tier: Tier) -> None:
    """Between one request's end and the next one's beginning the engine works on nothing, for a moment."""
    engines, drains = tier
    engine = engines.gateway.replica.engine
    generating, _ = engines.pool.service._queues
    assert isinstance(generating, FairQueue)
    async with generating.place("ann"):
        drain = drains.begin(TIER, Work.RESTART)
        await a_moment()
        assert engines.pool.pick().engine is engine, "it finds its engine"
    await drain.task
    assert engines.gateway.replica.engine is not engine


async def test_tokenizing_waits_as_well(tier: Tier) -> None:
    engines, drains = tier
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    body = json.dumps({"model": TIER, "prompt": "a"}).encode()
    asked = asyncio.create_task(engines.gateway.post(body, path="/tokenize"))
    await a_moment()
    assert not asked.done()
    engines.may_start.set()
    assert (await asked).status == 200
    await drain.task


async def test_when_the_time_is_over_it_serves_as_before_and_breaks_nothing_off(tier: Tier) -> None:
    engines, drains = tier
    running = engines.ask()
    await until(lambda: engines.begun == 1)
    with pytest.raises(NotDrained, match=r"1 requests still ran after 0\.1 s.*--timeout"):
        await drains.begin(TIER, Work.RESTART, timeout_s=0.1).task
    assert engines.pool.state is State.READY
    running += engines.ask()
    await until(lambda: engines.begun == 2)
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))


async def test_given_up_before_its_requests_have_ended_an_engine_serves_on(tier: Tier) -> None:
    engines, drains = tier
    engine = engines.gateway.replica.engine
    running = engines.ask()
    await until(lambda: engines.begun == 1)
    drain = drains.begin(TIER, Work.RESTART)
    waiting = engines.ask()
    await a_moment()
    drain.give_up()
    with pytest.raises(NotDrained, match="given up"):
        await drain.task
    await until(lambda: engines.begun == 2)
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running, *waiting))
    assert engines.gateway.replica.engine is engine


async def test_given_up_while_an_engine_starts_it_comes_back_and_the_next_one_is_left_alone(
    tier: Tier, tmp_path: Path
) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    untouched = second.engine
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    drain.give_up()
    engines.may_start.set()
    with pytest.raises(NotDrained):
        await drain.task
    assert engines.pool.ready == 2
    assert second.engine is untouched


async def test_while_one_of_two_is_drained_the_other_takes_all_within_its_own_places(
    tier: Tier, tmp_path: Path
) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    assert engines.pool.requests_at_once == 4
    running = engines.ask(4)
    await until(lambda: engines.gateway.replica.running == 2)
    drain = drains.begin(TIER, Work.RESTART, number=1)
    await a_moment()
    waiting = engines.ask()
    await a_moment()
    assert engines.pool.requests_at_once == 2 + 2, "what the one still works on, beside the other's own"
    assert not waiting[0].done()
    assert (engines.gateway.replica.running, second.running) == (2, 2), "it waits rather than crowd the other"
    engines.may_start.clear()
    engines.may_end.set()
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    assert all(is_whole(answer) for answer in await asyncio.gather(*running, *waiting, *engines.ask(3)))
    assert not drain.task.done(), "nobody has to wait for the one that starts"
    engines.may_start.set()
    await drain.task
    assert engines.pool.requests_at_once == 4


async def test_one_that_is_drained_gets_nothing_that_another_can_take(tier: Tier, tmp_path: Path) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    running = engines.ask(2)
    await until(lambda: engines.begun == 2)
    drain = drains.begin(TIER, Work.RESTART, number=1)
    await a_moment()
    running += engines.ask()
    await until(lambda: engines.begun == 3)
    assert (engines.gateway.replica.running, second.running) == (1, 2)
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))
    await drain.task


async def test_replicas_are_restarted_one_after_the_other(tier: Tier, tmp_path: Path) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    before = (engines.gateway.replica.engine, second.engine)
    ready: list[int] = []
    drain = drains.begin(TIER, Work.RESTART)
    while not drain.task.done():
        ready.append(engines.pool.ready)
        await asyncio.sleep(0)
    await drain.task
    assert min(ready) == 1
    assert not {*before} & {engines.gateway.replica.engine, second.engine}


async def test_an_engine_that_does_not_come_back_is_said_and_nobody_waits_for_it(tier: Tier) -> None:
    engines, drains = tier
    engines.fails = True
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    waiting = engines.ask()
    await a_moment()
    engines.may_start.set()
    with pytest.raises(NotDrained, match=r"as the test wants\. The server goes on trying"):
        await drain.task
    answer = await waiting[0]
    assert (answer.status, answer.error["code"]) == (503, "tier_unavailable")


async def test_an_engine_that_dies_while_it_is_drained_is_started_at_once(tier: Tier) -> None:
    engines, drains = tier
    running = engines.ask()
    await until(lambda: engines.begun == 1)
    drain = drains.begin(TIER, Work.RESTART)
    await a_moment()
    waiting = engines.ask()
    await a_moment()
    await engines.gateway.replica.clear_away(0)  # as its keeper does
    engines.may_end.set()
    await asyncio.wait_for(drain.task, 0.9)  # less than a keeper waits
    assert "broke off" in (await running[0]).body.decode()
    assert is_whole(await waiting[0])


async def test_a_second_drain_of_the_same_tier_is_refused(tier: Tier) -> None:
    engines, drains = tier
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    with pytest.raises(NotDrained, match="is being drained already"):
        drains.begin(TIER, Work.STOP)
    engines.may_start.set()
    await drain.task
    await drains.begin(TIER, Work.RESTART).task


async def test_what_is_stopped_answers_whom_it_accepted_refuses_the_rest_and_is_resumed(tier: Tier) -> None:
    engines, drains = tier
    accepted = engines.ask(5)
    await until(lambda: engines.begun == 2)
    drain = drains.begin(TIER, Work.STOP)
    await a_moment()
    for _ in range(2):
        refused = await engines.gateway.post(STREAM)
        assert (refused.status, refused.error["code"]) == (503, "tier_drained")
        assert "an operator has drained it" in refused.error["message"]
        assert int(refused.headers["retry-after"]) >= 60
        engines.may_end.set()
        await drain.task
    assert all(is_whole(answer) for answer in await asyncio.gather(*accepted))
    assert engines.begun == 5, "those in the queue too"
    assert engines.pool.state is State.DRAINED
    assert engines.gateway.metric("assay_replicas_drained") == 1
    for work in (Work.STOP, Work.RESTART):
        with pytest.raises(NotDrained, match="drained already"):
            drains.begin(TIER, work)
    await drains.begin(TIER, Work.RESUME).task
    assert is_whole(await engines.gateway.post(STREAM))
    with pytest.raises(NotDrained, match="is not drained"):
        drains.begin(TIER, Work.RESUME)


async def test_a_stop_that_is_not_reached_in_time_leaves_the_tier_in_service(tier: Tier) -> None:
    engines, drains = tier
    running = engines.ask()
    await until(lambda: engines.begun == 1)
    with pytest.raises(NotDrained):
        await drains.begin(TIER, Work.STOP, timeout_s=0.1).task
    running += engines.ask()
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))


async def test_one_of_two_can_be_stopped_and_the_last_one_closes_the_tier(tier: Tier, tmp_path: Path) -> None:
    engines, drains = tier
    engines.add(tmp_path)
    engines.may_end.set()
    await drains.begin(TIER, Work.STOP, number=2).task
    assert engines.pool.requests_at_once == 2
    assert is_whole(await engines.gateway.post(STREAM))
    await drains.begin(TIER, Work.STOP, number=1).task
    assert (await engines.gateway.post(STREAM)).status == 503
    with pytest.raises(NotDrained, match="has no replica 3; it has 1, 2"):
        drains.begin(TIER, Work.RESUME, number=3)
    await drains.begin(TIER, Work.RESUME).task
    assert engines.pool.ready == 2


async def test_an_engine_that_comes_back_by_itself_while_another_is_restarted_takes_those_who_wait(
    tier: Tier, tmp_path: Path
) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    engines.may_end.set()
    second.state = State.RESTARTING  # it has failed
    first_may_start = engines.may_start = asyncio.Event()
    drain = drains.begin(TIER, Work.RESTART, number=1)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    waiting = engines.ask()
    await a_moment()
    assert not waiting[0].done(), "there is nobody to take it"
    engines.may_start = asyncio.Event()
    engines.may_start.set()
    await second.start_again()
    assert is_whole(await asyncio.wait_for(waiting[0], 1))
    assert not drain.task.done()
    first_may_start.set()
    await drain.task


async def test_requests_beyond_what_is_ready_wait_for_an_engine_that_starts_for_the_first_time(
    tier: Tier, tmp_path: Path
) -> None:
    engines, _ = tier
    running = engines.ask(4)
    await until(lambda: engines.begun == 2)
    engines.may_start.clear()
    second = engines.coming(tmp_path)
    engines.gateway.fleet.add(engines.pool, second)
    await a_moment()
    assert second.state is not State.READY
    assert (engines.begun, engines.gateway.replica.running) == (2, 2), "they would wait inside the first engine"
    engines.may_start.set()
    await until(lambda: engines.begun == 4)
    assert (engines.gateway.replica.running, second.running) == (2, 2)
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))


async def test_while_no_engine_is_ready_at_all_nobody_waits_for_one(tier: Tier, tmp_path: Path) -> None:
    engines, _ = tier
    engines.gateway.replica.state = State.STARTING
    engines.pool.add(engines.coming(tmp_path))
    assert engines.pool.requests_at_once == 4
    answers = await asyncio.wait_for(asyncio.gather(*engines.ask(6)), 1)
    assert {answer.status for answer in answers} == {503}


async def test_a_replica_goes_by_its_number_whatever_others_there_are(tier: Tier, tmp_path: Path) -> None:
    engines, drains = tier
    second, third = engines.add(tmp_path), engines.add(tmp_path, 3)
    engines.pool.remove(second)
    before = (engines.gateway.replica.engine, third.engine)
    with pytest.raises(NotDrained, match="has no replica 2; it has 1, 3"):
        drains.begin(TIER, Work.RESTART, number=2)
    await drains.begin(TIER, Work.RESTART, number=3).task
    assert engines.gateway.replica.engine is before[0]
    assert third.engine is not before[1]


async def test_one_that_has_left_the_tier_meanwhile_is_not_brought_back_to_life(
    tier: Tier, tmp_path: Path
) -> None:
    engines, drains = tier
    second, third = engines.add(tmp_path), engines.add(tmp_path, 3)
    before = third.engine
    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    third.leaving = True
    await engines.gateway.fleet.remove(engines.pool, second, 1)
    engines.may_start.set()
    await drain.task
    assert second.state is State.STOPPED
    assert third.leaving
    assert third.engine is before, "it finishes what it works on"


async def test_what_leaves_by_itself_is_no_operators_to_resume(tier: Tier, tmp_path: Path) -> None:
    engines, drains = tier
    second = engines.add(tmp_path)
    running = engines.ask(4)
    await until(lambda: engines.begun == 4)
    second.leaving = True
    with pytest.raises(NotDrained, match="is not drained"):
        drains.begin(TIER, Work.RESUME)
    with pytest.raises(NotDrained, match="ends by itself"):
        drains.begin(TIER, Work.RESTART, number=2)
    assert (second.leaving, second.running) == (True, 2)
    engines.may_end.set()
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))


async def test_a_server_that_ends_leaves_no_engine_that_it_watches_and_none_that_leaves(
    tier: Tier, tmp_path: Path
) -> None:
    engines, _ = tier
    fleet = engines.gateway.fleet
    second, third = engines.add(tmp_path), engines.add(tmp_path, 3)
    fleet.watch()
    engines.pool.remove(second)
    ending = third.end
    ends = asyncio.Event()

    async def slow_to_end() -> None:
        await ends.wait()
        await ending()

    third.end = slow_to_end  # type: ignore[method-assign]
    leaving = asyncio.create_task(fleet.remove(engines.pool, third, 1))
    await a_moment()
    leaving.cancel()  # as the server's end does
    ends.set()
    await fleet.stop()
    assert (second.state, third.state) == (State.STOPPED, State.STOPPED)


async def test_a_tier_that_is_restarted_does_not_take_the_server_out_of_service(tier: Tier) -> None:
    engines, drains = tier

    async def ready() -> int:
        return (await engines.gateway.post(b"", path="/readyz", method="GET")).status

    engines.may_start.clear()
    drain = drains.begin(TIER, Work.RESTART)
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    assert await ready() == 200, "what comes is accepted"
    engines.may_start.set()
    await drain.task
    await drains.begin(TIER, Work.STOP).task
    assert await ready() == 503, "nothing else is served here"


async def test_who_waited_for_an_engine_is_held_to_what_that_engine_is(tmp_path: Path) -> None:
    """It may be another than the one that the certificate speaks of."""
    async with drained_gateway(tmp_path, gate="enforce") as (engines, drains):
        engines.may_start.clear()
        drain = drains.begin(TIER, Work.RESTART)
        await until(lambda: engines.gateway.replica.state is State.RESTARTING)
        waiting = engines.ask()
        await a_moment()
        assert not waiting[0].done()
        engines.may_start.set()
        await drain.task
        assert (await waiting[0]).error["code"] == "tier_not_certified"
        assert engines.begun == 0


async def test_a_request_that_an_engine_wakes_for_is_answered_before_it_is_restarted(tier: Tier) -> None:
    engines, drains = tier
    replica = engines.gateway.replica
    waking = asyncio.Event()

    engines.gateway.handler = slow_to_wake(waking)
    replica.take_turns(Turns(60))
    await replica.sleep()
    request = asyncio.create_task(engines.gateway.post())
    await until(lambda: replica.running)
    drain = drains.begin(TIER, Work.RESTART)
    await a_moment()
    waking.set()
    assert (await request).status == 200
    await drain.task
    assert [each.path for each in engines.gateway.seen[:3]] == [SLEEP_ROUTE, WAKE_ROUTE, "/v1/chat/completions"]


async def test_a_server_that_ends_begins_nothing_more(tier: Tier) -> None:
    _, drains = tier
    drains.give_up()
    with pytest.raises(NotDrained, match="stopping"):
        drains.begin(TIER, Work.RESTART)


async def test_engines_that_somebody_else_runs_are_theirs_to_stop(tier: Tier) -> None:
    engines, drains = tier
    engines.gateway.fleet.followings = (Following(engines.pool, (), lambda place: engines.gateway.replica),)
    with pytest.raises(NotDrained, match="Somebody else runs the engines"):
        drains.begin(TIER, Work.RESTART)
