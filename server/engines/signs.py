"""Waiting for the first sign that an engine is to be started again. Knows neither engines nor states."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

WATCH_S = 2.0


async def first_of(signs: Iterable[Awaitable[object]]) -> None:
    """Wait until one of them is there; nobody waits for the others any more."""
    watching = [asyncio.ensure_future(sign) for sign in signs]
    try:
        await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for sign in watching:
            sign.cancel()


async def until_not(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, and return once it does not hold."""
    await asyncio.sleep(WATCH_S)
    while await holds():
        await asyncio.sleep(WATCH_S)
