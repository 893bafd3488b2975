"""One HTTP exchange with a caller: the body read within its bounds, the reply sent. Knows ASGI, and no engine."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from server.errors import BodyTooLarge, BodyTooSlow, Refusal, envelope, error_event
from server.record import Record
from server.tracing.trace import UNTRACED, Trace

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Tell = Callable[[], None]

WHEN_GONE = "assay.when_gone"
"""An extension of ASGI by `server.cycle`: given a function, it calls that once the caller has left.

ASGI's own way is a task for each request that waits for a message, and mostly has to be cancelled.
"""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
OTHER = "_OTHER"
"""In place of a method, or of a path, that nobody knows: it would be the caller's words."""

_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = b": still working\n\n"


def known_method(method: str) -> str:
    """The method, for logs and traces."""
    return method if method in METHODS else OTHER


class ClientLeft(Exception):
    """The caller closed the connection; there is nobody left to answer."""


class Reply:
    """The answer to one caller.

    Knows when they leave. Remembers its status once it has begun, for then an error can only be an event, and when
    its body began.
    """

    def __init__(
        self, send: Send, when_gone: Callable[[Tell], None], request_id: str, trace: Trace = UNTRACED
    ) -> None:
        self._send = send
        self.when_gone = when_gone
        """Given a function, calls it once there is nobody left to answer."""
        self.request_id = request_id
        self.record = Record(request_id, trace)
        self.request_began = time.monotonic()
        self.headers: Headers = [(b"x-request-id", request_id.encode())]
        self.status: int | None = None
        self.body_began: float | None = None
        self.error_event: Callable[[Refusal], bytes] = error_event
        """How the stream that has begun ends with an error."""
        self.has_ended = False
        self.is_blocked = False
        """Whether the caller reads more slowly than it is written to."""

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the status and all headers."""
        self.status = status
        all_headers = [*self.headers, self._processing_ms(), *headers]
        try:
            await self._write({"type": "http.response.start", "status": status, "headers": all_headers})
        except asyncio.CancelledError:
            self.status = None  # interrupted while it waited to be sent
            raise

    def _processing_ms(self) -> tuple[bytes, bytes]:
        return b"openai-processing-ms", b"%d" % ((time.monotonic() - self.request_began) * 1000)

    async def pass_on(self, message: Message) -> None:
        """Send what a framework has made, with the headers of this reply."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], *self.headers, self._processing_ms()]
        else:
            self.has_ended = not message.get("more_body", False)
        await self._send(message)

    async def begin_events(self) -> None:
        """Send the headers of a stream, if they have not been."""
        if self.status is None:
            await self.begin(200, _EVENTS)

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body; waits while the caller reads more slowly than the engine writes."""
        self.body_began = self.body_began or time.monotonic()
        self.has_ended = not more
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def comment(self) -> None:
        """Send what every client skips, so that nobody between takes the connection for dead."""
        await self.begin_events()
        await self._send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

    async def _write(self, message: Message) -> None:
        self.is_blocked = True
        try:
            await self._send(message)
        finally:
            self.is_blocked = False

    async def whole(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Send a complete JSON answer."""
        length = (b"content-length", b"%d" % len(body))
        await self.begin(status, [(b"content-type", b"application/json"), length, *(headers or [])])
        await self.send(body, more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: as the answer, or, when that has begun, as the last event of the stream."""
        if self.status is None:
            extra = [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
            await self.whole(refusal.status, envelope(refusal), extra)
        else:
            await self.send(self.error_event(refusal), more=False)


async def read_body(headers: Headers, receive: Receive, limit: int, timeout_s: float) -> bytes:
    """The request body.

    Raises:
        BodyTooLarge: more than ``limit`` bytes are announced, or have come.
        BodyTooSlow: it was not whole within ``timeout_s``.
        ClientLeft: the caller went away before the end.
    """
    for name, value in headers:
        # Before anything is read: a client that waits for 100 Continue has not sent it yet.
        if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
            raise BodyTooLarge(limit)
    deadline = time.monotonic() + timeout_s
    message = await _next(receive, timeout_s)
    if not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body
    whole = bytearray(message.get("body", b""))
    while message.get("more_body"):
        if len(whole) > limit:
            raise BodyTooLarge(limit)
        message = await _next(receive, deadline - time.monotonic())
        whole += message.get("body", b"")
    if len(whole) > limit:
        raise BodyTooLarge(limit)
    return bytes(whole)


async def _next(receive: Receive, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise BodyTooSlow from None
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return message
