"""What blocks, done in a thread that nobody waits for, not even the end of the process. Knows not what it does."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """What ``work`` returns; who stops waiting for it leaves it to its end.

    The loop's own threads are waited for when it ends, and what is out of reach would hold that up.
    """
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()  # from here on nobody can cancel it, only leave
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)
