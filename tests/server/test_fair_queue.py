"""Who is next for a place: bounded, fair, and nobody waits for one who has left."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from server.errors import QueueFull
from server.fair_queue import FairQueue


class Work:
    """Requests of several callers on one queue; each holds its places until it is let go."""

    def __init__(self, places: int, longest: int) -> None:
        self.places = places
        self.queue = FairQueue("tier", lambda: self.places, longest)
        self.order: list[str] = []
        self.refused: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, caller: str, name: str, places: int = 1) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._request(caller, name, places))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # for one that it pushes out to hear of it

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        await asyncio.sleep(0)

    def leave_unseen(self, name: str) -> None:
        self._tasks[name].cancel()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _request(self, caller: str, name: str, places: int) -> None:
        try:
            async with self.queue.place(caller, places):
                self.order.append(name)
                await self._ends[name].wait()
        except QueueFull:
            self.refused.append(name)


Make = Callable[[int, int], Work]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Work] = []

    def make(places: int, longest: int) -> Work:
        made.append(Work(places, longest))
        return made[-1]

    yield make
    for work in made:
        await work.close()


async def test_one_caller_with_many_requests_does_not_starve_another_with_one(make: Make) -> None:
    work = make(1, 2000)
    for i in range(1000):
        await work.ask("ann", f"a{i}")
    await work.ask("bob", "b")
    await work.end("a0")
    await work.end("a1")
    assert work.order == ["a0", "a1", "b"]


async def test_callers_take_turns(make: Make) -> None:
    work = make(1, 10)
    await work.ask("ann", "a0")
    for name in ("a1", "a2", "b1", "b2", "c1"):
        await work.ask({"a": "ann", "b": "bob", "c": "cid"}[name[0]], name)
    for name in ("a0", "a1", "b1", "c1", "a2"):
        await work.end(name)
    assert work.order == ["a0", "a1", "b1", "c1", "a2", "b2"]


async def test_beyond_the_queue_a_request_is_refused_at_once_and_told_when_to_come_back(make: Make) -> None:
    work = make(1, 2)
    for name in ("a0", "a1", "a2", "a3"):
        await work.ask("ann", name)
    assert work.refused == ["a3"]
    with pytest.raises(QueueFull) as refusal:
        async with work.queue.place("ann"):
            pass
    assert 1 <= int(refusal.value.headers["retry-after"]) <= 60


async def test_a_full_queue_makes_room_for_who_has_less(make: Make) -> None:
    work = make(1, 3)
    for name in ("a0", "a1", "a2", "a3"):
        await work.ask("ann", name)
    await work.ask("bob", "b1")
    assert work.refused == ["a3"]
    await work.ask("bob", "b2")
    assert work.refused == ["a3", "b2"], "who has as much as the longest line is refused himself"
    await work.end("a0")
    await work.end("a1")
    assert work.order == ["a0", "a1", "b1"]


async def test_who_leaves_the_queue_is_not_waited_for(make: Make) -> None:
    work = make(1, 10)
    for name in ("a0", "a1", "a2"):
        await work.ask("ann", name)
    await work.leave("a1")
    assert work.queue.waiting == 1
    await work.end("a0")
    assert work.order == ["a0", "a2"]
    assert work.queue.waiting == 0


async def test_who_leaves_in_the_moment_of_being_next_passes_the_place_on(make: Make) -> None:
    work = make(1, 10)
    for name in ("a0", "a1", "a2"):
        await work.ask("ann", name)
    work._ends["a0"].set()
    await asyncio.sleep(0)
    work.leave_unseen("a1")
    await asyncio.sleep(0.01)
    assert work.order == ["a0", "a2"]
    await work.end("a2")
    await work.ask("ann", "a4")
    assert work.order[-1] == "a4"


async def test_a_request_for_several_answers_takes_several_places(make: Make) -> None:
    work = make(4, 10)
    await work.ask("ann", "a0", places=3)
    await work.ask("ann", "a1", places=2)
    await work.ask("bob", "b1")
    assert work.order == ["a0"], "nobody slips past one who waits for more"
    await work.end("a0")
    assert work.order == ["a0", "a1", "b1"]


async def test_a_request_for_more_places_than_there_are_gets_all_of_them(make: Make) -> None:
    work = make(2, 10)
    await work.ask("ann", "a0", places=100)
    await work.ask("ann", "a1")
    assert work.order == ["a0"]
    await work.end("a0")
    assert work.order == ["a0", "a1"]


async def test_while_there_are_no_places_all_wait_and_get_them_once_it_is_told_that_they_are_back(
    make: Make,
) -> None:
    work = make(0, 10)
    await work.ask("ann", "a0", places=3)
    await work.ask("bob", "b0")
    assert work.order == []
    work.places = 1
    await asyncio.sleep(0)
    assert work.order == [], "nobody has been told"
    work.queue.look_again()
    await asyncio.sleep(0)
    assert work.order == ["a0"]
    assert work.queue.taken == 3, "one who wants more than there are gets them alone"
    await work.end("a0")
    assert work.order == ["a0", "b0"]


async def test_whoever_comes_finds_places_that_came_back_unsaid_and_takes_its_turn(make: Make) -> None:
    work = make(0, 10)
    await work.ask("ann", "a0")
    work.places = 1
    await work.ask("bob", "b0")
    assert work.order == ["a0"]
    assert (work.queue.taken, work.queue.waiting) == (1, 1)


async def test_nothing_is_left_of_callers_who_are_gone(make: Make) -> None:
    work = make(1, 10)
    for i in range(5):
        await work.ask(f"caller-{i}", f"r{i}")
    for i in range(5):
        await work.end(f"r{i}")
    assert not work.queue._lines
    assert work.queue._taken == 0
