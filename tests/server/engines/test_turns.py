"""Engines that share GPUs and sleep while idle: one is awake, nobody is starved, nothing is left half done."""

import asyncio

import pytest

from server.engines.turns import Turns, share


class Memory:
    """A GPU that holds one engine at a time."""

    def __init__(self) -> None:
        self.holder: Bed | None = None
        self.changes: list[str] = []


class Bed:
    """An engine that takes the memory when it wakes."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name, self._memory = name, memory
        self.broken = False

    async def sleep(self) -> None:
        await asyncio.sleep(0.01)
        assert self._memory.holder is self
        self._memory.holder = None
        self._memory.changes.append(f"{self.name} sleeps")

    async def wake(self) -> None:
        if self.broken:
            raise RuntimeError("no memory")
        assert self._memory.holder is None, "two are awake"
        self._memory.holder = self
        await asyncio.sleep(0.01)
        self._memory.changes.append(f"{self.name} wakes")


@pytest.fixture
def memory() -> Memory:
    return Memory()


async def use(turns: Turns, bed: Bed, memory: Memory, seconds: float = 0.0) -> None:
    async with turns.awake(bed):
        assert memory.holder is bed
        await asyncio.sleep(seconds)
        assert memory.holder is bed


async def test_many_callers_of_two_never_meet_both_awake(memory: Memory) -> None:
    turns, a, b = Turns(60), Bed("a", memory), Bed("b", memory)
    await asyncio.gather(*(use(turns, bed, memory, 0.002) for bed in [a, b, b, a, a, b] * 4))
    turns.close()


async def test_who_comes_first_goes_first(memory: Memory) -> None:
    """A steady stream of requests to one does not keep the other asleep."""
    turns, a, b = Turns(60), Bed("a", memory), Bed("b", memory)
    order: list[str] = []

    async def call(bed: Bed) -> None:
        async with turns.awake(bed):
            order.append(bed.name)
            await asyncio.sleep(0.005)

    calls = []
    for bed in (a, a, b, a):
        calls.append(asyncio.create_task(call(bed)))
        await asyncio.sleep(0)
    await asyncio.gather(*calls)
    assert order == ["a", "a", "b", "a"]
    turns.close()


async def test_an_idle_one_falls_asleep_and_wakes_for_the_next(memory: Memory) -> None:
    turns, a = Turns(0.02), Bed("a", memory)
    await use(turns, a, memory)
    await asyncio.sleep(0.08)
    assert memory.changes == ["a wakes", "a sleeps"]
    await use(turns, a, memory)
    assert memory.changes[-1] == "a wakes"
    turns.close()


async def test_one_in_use_does_not_fall_asleep(memory: Memory) -> None:
    turns, a = Turns(0.01), Bed("a", memory)
    await use(turns, a, memory, 0.05)
    assert memory.changes == ["a wakes"]
    turns.close()


async def test_a_caller_who_leaves_while_it_wakes_leaves_nothing_half_done(memory: Memory) -> None:
    turns, a, b = Turns(60), Bed("a", memory), Bed("b", memory)
    leaving = asyncio.create_task(use(turns, a, memory))
    await asyncio.sleep(0.005)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await use(turns, b, memory)
    assert memory.changes == ["a wakes", "a sleeps", "b wakes"]
    turns.close()


async def test_one_that_cannot_wake_tells_its_caller_and_frees_the_turn(memory: Memory) -> None:
    turns, a, b = Turns(60), Bed("a", memory), Bed("b", memory)
    a.broken = True
    with pytest.raises(RuntimeError, match="no memory"):
        await use(turns, a, memory)
    turns.forget(a)  # as its replica does when it ends the engine
    await use(turns, b, memory)
    turns.close()


async def test_an_engine_starts_with_the_memory_to_itself(memory: Memory) -> None:
    turns, a, b = Turns(60), Bed("a", memory), Bed("b", memory)
    await use(turns, a, memory)
    async with turns.starting(b):
        assert memory.holder is None
        memory.holder = b
    await use(turns, b, memory)
    await use(turns, a, memory)
    turns.close()


def test_overlapping_gpus_take_turns_also_through_others() -> None:
    assert share([frozenset({0}), frozenset({1}), frozenset({0, 1}), frozenset({2})]) in (
        [1, 1, 1, 3],
        [0, 0, 0, 3],
    )
    assert share([frozenset({0}), frozenset({1})]) == [0, 1]
