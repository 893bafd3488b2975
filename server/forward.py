"""One request to one replica and back: the same bytes there, whole events straight back.

Knows ASGI and the engine's stream format; does not read what a chunk says.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

import aiohttp
import msgspec

from server.errors import BodyRefused, BodyTooLarge, EngineFailed, EngineRefused, Refusal, envelope
from server.metrics import Metrics
from server.replica import Replica

log = logging.getLogger("assay.forward")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_ERROR_EVENT = b'data: {"error"'
"""How vLLM begins an error inside a stream. Quotes inside a chunk's text are escaped, so text never matches."""
_END = b"data: [DONE]\n\n"


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class ClientLeft(Exception):
    """The caller closed the connection; there is nobody left to answer."""


class Call(msgspec.Struct):
    """What routing needs of a request body; the rest is for the engine to judge."""

    model: str
    precision: str | msgspec.UnsetType | None = msgspec.UNSET
    """Assay's own field: the precision that the caller insists on."""


class Reply:
    """The answer to one caller.

    Remembers its status once it has begun, for then an error can only be an event, and when its body began.
    """

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self.headers = headers
        self.status: int | None = None
        self.body_began: float | None = None

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the status and all headers."""
        self.status = status
        start = {"type": "http.response.start", "status": status, "headers": [*self.headers, *headers]}
        await self._send(start)

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the body; waits while the caller reads more slowly than the engine writes."""
        self.body_began = self.body_began or time.monotonic()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

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
            await self.send(b"data: " + envelope(refusal) + b"\n\n", more=False)


async def read_body(receive: Receive, limit: int) -> bytes:
    """The request body.

    Raises:
        BodyTooLarge: as soon as more than ``limit`` bytes have come.
        ClientLeft: the caller went away before the end.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body"):
            return bytes(body)


def parse_call(body: bytes) -> Call:
    """What routing needs.

    Raises:
        BodyRefused: not JSON, or ``model`` is missing or not a string.
    """
    try:
        return msgspec.json.decode(body, type=Call)
    except _UNREADABLE as error:
        raise BodyRefused(f"The request body cannot be read: {error}.") from None


def without_pin(body: bytes) -> bytes:
    """The body without Assay's own field; every other field keeps its bytes.

    Raises:
        BodyRefused: one of the other fields' names is no text.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except _UNREADABLE as error:
        raise BodyRefused(f"The request body cannot be read: {error}.") from None
    del fields["precision"]
    return msgspec.json.encode(fields)


async def forward(
    path: str, body: bytes, replica: Replica, reply: Reply, request_id: str, metrics: Metrics
) -> None:
    """Send ``body`` to the replica's ``path`` and its answer to the caller.

    Raises:
        Refusal: the tier is not ready, the engine refuses the request, or it broke; when the reply has already
            begun, the refusal is still to be sent, as an event.
    """
    headers = {"content-type": "application/json", "x-request-id": request_id}
    try:
        async with (
            replica.slot() as engine,
            engine.post(path, data=body, headers=headers) as answer,
        ):
            if answer.status >= 500:
                replica.erred()
            if answer.status != 200:
                await _refuse_like(answer)
            elif answer.content_type == "text/event-stream":
                await reply.begin(200, _STREAM_HEADERS)
                await _copy_events(answer.content, reply, replica)
            else:
                await reply.whole(200, await answer.read())
            replica.answered()
    except (aiohttp.ClientError, TimeoutError, _Broken) as error:
        log.warning("%s: request %s broke off: %r", replica.tier.name, request_id, error)
        alive = await replica.is_alive()
        if reply.status is not None:
            metrics.broken.labels(replica.tier.name).inc()
            raise EngineFailed(f"The engine of {replica.tier.name} broke off this answer.") from error
        if not alive:
            raise replica.unavailable() from error
        raise EngineFailed(f"The engine of {replica.tier.name} failed on this request.") from error


_STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Broken(Exception):
    """The engine's answer ended, or said itself that it failed, before it was whole."""


async def _copy_events(content: aiohttp.StreamReader, reply: Reply, replica: Replica) -> None:
    """Copy whole events only, so that what breaks off never leaves half of one."""
    pending, ended = b"", False
    async for chunk in content.iter_any():
        replica.heard()
        pending += chunk
        cut = pending.rfind(b"\n\n") + 2
        if cut < 2:
            continue
        events, pending = pending[:cut], pending[cut:]
        failure = events.find(_ERROR_EVENT)
        if failure >= 0:
            if failure:
                await reply.send(events[:failure])
            raise _Broken(events[failure:].decode(errors="replace").strip())
        ended = ended or events.endswith(_END)
        await reply.send(events)
    if not ended:
        raise _Broken("the stream ended without [DONE]")
    await reply.send(b"", more=False)


async def _refuse_like(answer: aiohttp.ClientResponse) -> None:
    body = await answer.read()
    if answer.status >= 500:
        raise _Broken(f"{answer.status}: {body[:300].decode(errors='replace')}")
    raise EngineRefused.read(answer.status, body)


async def while_client_stays(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``, and stop it the moment the caller leaves: the engine must not go on for nobody.

    Raises:
        ClientLeft: the caller left first.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_until_client_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        await working
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _until_client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
