"""Ends a request when its caller leaves or its time is over, and keeps its connection busy meanwhile.

Knows clocks and connections; knows nothing of what is sent.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from server.errors import FirstTokenLate, NextTokenLate, Refusal, RequestTooLong
from server.exchange import ClientLeft, Reply

HEARTBEAT_S = 15.0


@dataclass(frozen=True)
class TimeLimits:
    """How long a request may take, in seconds; infinite where there is no limit."""

    first_token: float = math.inf
    """From the request's arrival to a stream's first token."""
    next_token: float = math.inf
    """Between two parts of a stream."""
    whole: float = math.inf
    """From the request's arrival to the end of its answer."""
    heartbeat: float = HEARTBEAT_S
    """Of silence in a stream, after which it gets a comment."""


class Watch:
    """Within its block a request is interrupted by whichever comes first: its caller leaving, or a limit.

    One timer a request, which looks at the clock when it goes off and is set again: a part of a stream costs no
    more than noting when it came.

    Raises, out of the block:
        ClientLeft: the caller closed the connection, or does not read.
        FirstTokenLate, NextTokenLate, RequestTooLong: a limit.
    """

    def __init__(self, reply: Reply, limits: TimeLimits, began: float, *, streams: bool) -> None:
        self._reply = reply
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._began = began
        self._heard: float | None = None
        self._sent = began
        self._streams = streams
        self._blocked_since: float | None = None
        self._reason: Exception | None = None
        self._task: asyncio.Task[object] | None = None
        self._comment: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def heard(self) -> None:
        """The engine has sent something."""
        self._heard = self._sent = time.monotonic()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._reply.when_gone(self._client_left)
        self._set()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer:
            self._timer.cancel()
        if self._comment:
            self._comment.cancel()
        reason, self._reason = self._reason, None
        if reason and task and task.uncancel() == 0 and kind is asyncio.CancelledError:
            try:
                raise reason from None
            finally:
                # Its traceback knows this frame: with the frame knowing it, the request's body would be kept
                # until the garbage collector comes.
                del reason, error, trace, task

    def _client_left(self) -> None:
        self._interrupt(ClientLeft())

    def _interrupt(self, reason: Exception) -> None:
        if self._reason is None and self._task is not None:
            self._reason = reason
            self._task.cancel()

    def _set(self) -> None:
        due, _ = self._next()
        comment = self._sent + self._limits.heartbeat if self._streams else math.inf
        if (due := min(due, comment)) < math.inf:
            self._timer = self._loop.call_at(due, self._look)

    def _next(self) -> tuple[float, Callable[[], Refusal]]:
        """When the next limit is reached, and what to say then."""
        limits = self._limits
        due: tuple[float, Callable[[], Refusal]] = (
            self._began + limits.whole,
            lambda: RequestTooLong(limits.whole),
        )
        if self._streams and self._heard is None:
            late = self._began + limits.first_token
            due = min(due, (late, lambda: FirstTokenLate(limits.first_token)), key=lambda each: each[0])
        elif self._streams and self._heard is not None:
            late = self._heard + limits.next_token
            due = min(due, (late, lambda: NextTokenLate(limits.next_token)), key=lambda each: each[0])
        return due

    def _look(self) -> None:
        now = time.monotonic()
        if self._reply.is_blocked and now < self._began + self._limits.whole:
            # It is the caller who is slow, and not the engine; for as long as an engine might be.
            self._blocked_since = self._blocked_since or now
            if now - self._blocked_since >= self._limits.next_token:
                self._interrupt(ClientLeft())
                return
            self._sent = now
            if self._heard is not None:
                self._heard = now
        else:
            self._blocked_since = None
        due, refusal = self._next()
        if now >= due:
            self._interrupt(refusal())
            return
        if self._streams and now >= self._sent + self._limits.heartbeat:
            self._sent = now
            self._comment = asyncio.create_task(self._fill_silence())
        self._set()

    async def _fill_silence(self) -> None:
        with contextlib.suppress(OSError):  # a connection that is gone is noticed by whoever waits for it to be
            await self._reply.comment()
