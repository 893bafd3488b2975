"""The time in which an engine that erred at every request gets none, and the probe at its end. Knows no states."""

import asyncio
from collections.abc import Awaitable, Callable


class Probation:
    """Of one engine; a new one takes the place of the last."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def begin(self, rest_s: float, at_the_end: Callable[[], Awaitable[None]]) -> None:
        """Have the engine judged after ``rest_s``."""
        self.end()
        self._task = asyncio.create_task(_judge_later(rest_s, at_the_end))

    def end(self) -> None:
        """Nobody is to be judged any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None


async def _judge_later(rest_s: float, at_the_end: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(rest_s)
    await at_the_end()
