"""HTTP to one engine, for callers' requests: connections kept, requests written, answers read.

A client library does for every request what an engine never asks for (redirects, cookies, proxies, compression),
and that cost more than all else the gateway does: CONTRIBUTING.md has the figures. The parser is the one that
reads callers' requests too. Knows HTTP/1.1, and nothing of tiers or of what an answer says.
"""

import asyncio
import ssl
import time
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

from tiers.probe.reading import DRAINING

_DRAINING = DRAINING.encode()
IDLE_S = 3.0
"""vLLM closes a connection that was idle for 5 s; a request sent into that would fail."""
CONNECT_TIMEOUT_S = 5.0
MOST_HEAD_BYTES = 64 << 10
MOST_AHEAD = 128 << 10
"""Bytes of an answer that are held until somebody takes them; then the engine has to wait."""


class UpstreamBroke(Exception):
    """The engine could not be reached, or its answer ended before it was whole, or is no HTTP."""


class NotReached(UpstreamBroke):
    """The engine could not be reached: it has seen nothing of the request, which cannot be what ended it."""


class Draining(NotReached):
    """The engine is about to end and let the request in no further than its lock; nothing is wrong with it."""

    def __init__(self) -> None:
        super().__init__("it drains, and takes no further request")


def tls_for(url: str) -> ssl.SSLContext | None:
    """By which the engine there is known, if it is asked for: authorities are the system's, or SSL_CERT_FILE's."""
    return ssl.create_default_context() if urlsplit(url).scheme == "https" else None


class Upstream:
    """The connections to one engine, as many as there are requests at once."""

    def __init__(self, url: str, key: str, address: str | None = None) -> None:
        """``address`` is where to connect, for a name that has several; by default any that the URL's name has."""
        parts = urlsplit(url)
        self._host, self._port = address or parts.hostname or "", parts.port or 80
        self._tls = tls_for(url)
        self._name = parts.hostname if self._tls else None
        self._head = (
            f"host: {parts.netloc}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        ).encode()
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        """Whoever was used last comes last, and is used next: the others may age."""

    def post(self, path: str, body: bytes, request_id: str, trace: str = "") -> "Exchange":
        """One request, and its answer within the block; leaving that early breaks the answer off.

        The id must be one that `request_id` has cleaned, for it becomes a header as it is; ``trace`` is of
        whole headers.

        Raises:
            UpstreamBroke: into the block and out of whatever reads the answer.
        """
        head = f"POST {path} HTTP/1.1\r\nx-request-id: {request_id}\r\n{trace}content-length: {len(body)}\r\n"
        return Exchange(self, b"".join((head.encode(), self._head, b"\r\n", body)))

    async def take(self) -> "Connection":
        """A connection for one request; `give` it back."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_free and time.monotonic() - connection.idle_since < IDLE_S:
                return connection
            connection.abort()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(
                    self._connection, self._host, self._port, ssl=self._tls, server_hostname=self._name
                )
        except OSError as error:  # the timeout is one
            raise NotReached(f"no connection ({type(error).__name__})") from error
        return connection

    def give(self, connection: "Connection") -> None:
        """Keep it for the next request, if its answer came whole and was taken to the last byte; else close it."""
        if connection.is_free:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def opened(self, connection: "Connection") -> None:
        """There is one more."""
        self._connections.add(connection)

    def lost(self, connection: "Connection") -> None:
        """There is one less."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Break off whatever is under way."""
        for connection in tuple(self._connections):
            connection.abort()

    def _connection(self) -> "Connection":
        return Connection(self)


class Connection(asyncio.Protocol):
    """One connection and the answer that comes on it; httptools' parser calls what begins with ``on_``."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._broke: str | None = None
        self._is_last = False
        self.idle_since = 0.0
        self._parts: list[bytes] = []
        self._ahead = 0
        self._is_paused = False
        self._begin_answer()
        self._is_whole = True  # nobody has asked anything yet, which is as good as after an answer

    def _begin_answer(self) -> None:
        self.status = 0
        self.content_type = b""
        self.drains = False
        """Whether the engine said so with its answer."""
        self._head_bytes = 0
        self._in_body = False
        self._is_whole = False

    @property
    def is_free(self) -> bool:
        """Whether the next request can be sent."""
        # What was not taken of this answer would be read as the beginning of the next one.
        is_taken = self._is_whole and not self._parts and not self._is_paused
        ended = self._is_last or self._broke is not None or self._transport.is_closing()
        return is_taken and not ended and not self._transport.get_write_buffer_size()

    async def ask(self, request: bytes) -> None:
        """Send a request; returns when the head of its answer has come.

        Raises:
            UpstreamBroke: it has not.
        """
        self._begin_answer()
        self._transport.write(request)
        while not self._in_body:
            await self._more()

    async def part(self) -> bytes:
        """What has come of the body since the last time; waits for it, and is empty at the end.

        Raises:
            UpstreamBroke: the answer is not whole, and no more of it will come.
        """
        while not self._parts:
            if self._is_whole:
                return b""
            await self._more()
        parts = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._ahead = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return parts

    async def read(self) -> bytes:
        """All of the body.

        Raises:
            UpstreamBroke: as `part`.
        """
        parts = []
        while part := await self.part():
            parts.append(part)
        return b"".join(parts)

    def abort(self) -> None:
        """Close it without a word; an engine takes that for its caller's leaving."""
        self._end("it was closed here")
        self._transport.abort()

    async def _more(self) -> None:
        if self._broke is not None:
            raise UpstreamBroke(self._broke)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, why: str) -> None:
        if self._broke is None:
            self._broke = why
            self._upstream.lost(self)
        self._wake()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._upstream.opened(self)

    def eof_received(self) -> None:
        self._end("the connection ended")  # before it is lost, it would seem to be free

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the connection ended")
        self._parser = None  # which knows this object, and this it: a ring is left for the garbage collector

    def data_received(self, data: bytes) -> None:
        if self._is_whole or self._parser is None:
            self._break("it sent more than its answer")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break("what it sent is no HTTP")
            return
        if not self._in_body:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._break("its answer's head does not end")
        elif self._ahead > MOST_AHEAD and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        if self._in_body:
            self._wake()

    def _break(self, why: str) -> None:
        self._end(why)
        self._transport.abort()

    def on_message_begin(self) -> None:
        if self._is_whole:
            raise httptools.HttpParserError  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            return  # as trailers are
        name = name.lower()
        if name == b"content-type":
            self.content_type = value
        elif name == _DRAINING:
            self.drains = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
            self._in_body = True
        else:
            self.content_type = b""  # of an announcement, which is no answer

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._ahead += len(body)

    def on_message_complete(self) -> None:
        if self._in_body:
            self._is_whole = True
            self._is_last = self._parser is None or not self._parser.should_keep_alive()


class Exchange:
    """One request, and within the block the connection that its answer comes on."""

    def __init__(self, upstream: Upstream, request: bytes) -> None:
        self._upstream = upstream
        self._request = request
        self._connection: Connection

    async def __aenter__(self) -> Connection:
        self._connection = await self._upstream.take()
        try:
            await self._connection.ask(self._request)
        except BaseException:
            self._connection.abort()
            raise
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upstream.give(self._connection)
