"""What happens below ASGI: who may connect, how long a request's head may take, and how a connection ends.

Stands on uvicorn's HTTP/1.1 protocol; how an answer's bytes are written is `server.cycle`'s. Knows no routes and
no tiers.
"""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.cycle import Cycle
from server.errors import Refusal, RetryLater, envelope
from server.line import LINGER_S, Line
from server.request_id import request_id_of
from tiers.errors import ConfigError

MOST_HEAD_BYTES = 64 << 10
"""Of a request's line and headers; also of whatever else the parser keeps to itself: trailers, chunk sizes."""

MOST_PIPELINED = 64
"""Requests of one connection that may wait for the answers before theirs."""

_REFUSED_PATIENTLY = 256
"""Connections over the limit that are answered once they ask; those above that at once, read or not."""

_OTHER_FILES = 256
"""What the gateway has open besides its callers and their engines: logs, pipes, checkpoints."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take."""

    header_timeout_s: float
    keep_alive_s: float
    max_connections: int


def room_for(connections: int) -> int:
    """As many of these connections as this process may open files for; raises its limit as far as that needs.

    Each connection counts twice: its request has a connection to an engine.

    Raises:
        ConfigError: there is room for none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    # No further than needed: some programs, which an engine may start, close every number up to the limit.
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    room = (allowed - _OTHER_FILES) // 2
    if room < 1:
        raise ConfigError(f"This process may open {allowed} files, too few to serve: raise it with `ulimit -n`.")
    return room


class MalformedRequest(Refusal):
    """What came is not HTTP, or not as this server reads it; where the next request begins is not known."""

    code = "malformed_request"


class HeadersTooLarge(Refusal):
    """The request's line and headers are over what is read of them."""

    status, code = 431, "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request line and headers are larger than {limit} bytes, the limit of this server.")


class HeadTooSlow(Refusal):
    """The request's line and headers did not come in time."""

    status, code = 408, "headers_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request line and headers did not all come within {limit_s:g} s.")


class TooManyConnections(RetryLater):
    """The gateway has as many callers connected as it may have."""

    status, type, code = 503, "server_error", "too_many_connections"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} connections are open, the limit of this server; try again in a moment.", 1)


class Connection(HttpToolsProtocol):
    """One caller's connection: uvicorn's, with a bound on all that a caller can draw out, and OpenAI's errors."""

    limits: ClassVar[ConnectionLimits]

    @staticmethod
    def refused(refusal: Refusal) -> None:
        """Told of every refusal made here."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.timeout_keep_alive = self.limits.keep_alive_s  # type: ignore[assignment]  # only ever given to a timer
        self._line: Line
        self._surplus = False
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: Refusal | None = None
        # Of the message that is being read.
        self._in_head = True
        self._begun = False
        self._held = 0
        self._keep_alive = False
        # The cycle that writes; uvicorn's own `cycle` is the one that was read last.
        self._answering: Cycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Somebody is there, and has so long to say what they want."""
        self._line = Line(transport)
        super().connection_made(cast(asyncio.Transport, self._line))
        surplus = len(self.connections) - self.limits.max_connections
        self._surplus = surplus > 0
        if surplus > _REFUSED_PATIENTLY:
            self._refuse(TooManyConnections(self.limits.max_connections), wait=False)
            return
        patience = LINGER_S if self._surplus else self.limits.header_timeout_s
        self._deadline = self.loop.call_later(patience, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there: whoever works for them learns it."""
        self._line.lost()
        self._set_no_deadline()
        self._unset_keepalive_if_required()
        if self._answering:
            self._answering.abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; nothing is held that is no body and over the limit, and nothing begun may take for ever."""
        if self._line.closed:
            self._line.discard(len(data))
            return
        if self._surplus:
            self._refuse(TooManyConnections(self.limits.max_connections))
            return
        self._unset_keepalive_if_required()
        self._held += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            mistake = "its target has no path" if isinstance(error, httptools.HttpParserCallbackError) else error
            self._refuse(self._refusal or MalformedRequest(f"This is not HTTP as read here: {mistake}."))
            return
        if self._held > MOST_HEAD_BYTES:
            self._refuse(HeadersTooLarge(MOST_HEAD_BYTES))
        elif self._in_head and (self._begun or self._held) and self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)

    def _feed(self, data: bytes) -> None:
        """Parse; who offers another protocol is answered in this one, as if they had not.

        The parser takes such a request's body for the other protocol's: the head is read again without the offer.
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                line = (self.parser.get_method(), self.url, f"HTTP/{self.parser.get_http_version()}".encode())
                kept = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
                self.parser.feed_data(b"\r\n".join([b" ".join(line), *kept, b"", b""]))
            else:
                return

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A whole head: its answer can begin."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._stop(MalformedRequest("CONNECT is not offered here."))
            return  # it comes again
        if self._held > MOST_HEAD_BYTES:  # with what else came in the same packet
            head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head > MOST_HEAD_BYTES:
                self._stop(HeadersTooLarge(MOST_HEAD_BYTES))
        if len(self.pipeline) >= MOST_PIPELINED:
            self._stop(MalformedRequest(f"More than {MOST_PIPELINED} requests wait on this connection."))
        super().on_headers_complete()
        cycle = Cycle.of(self.cycle)
        self.headers = []  # those that follow a chunked body are no headers of the request
        self._in_head = False
        self._set_no_deadline()
        if not self.pipeline:
            self._answering = cycle
        elif len(self.pipeline) < MOST_PIPELINED // 2:
            self.flow.resume_reading()  # else nobody would see the caller leave
        # Until its body has been read to the end: an answer before that is the last one, and says so.
        self._keep_alive = self.cycle.keep_alive
        self.cycle.keep_alive = False
        self._line.unread = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body, which is the application's to bound."""
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; what follows is another one."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_head = True
        self._begun = False
        self._held = 0
        self._line.unread = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive

    def on_response_complete(self) -> None:
        """The next of those that wait is answered."""
        if self.pipeline:
            self._answering = cast(Cycle, self.pipeline[-1][0])
        super().on_response_complete()

    def shutdown(self) -> None:
        """The server stops: the answer under way is the last one."""
        self._keep_alive = False
        super().shutdown()

    def _stop(self, refusal: Refusal) -> None:
        """From inside the parser, which knows only its own errors."""
        self._refusal = refusal
        raise httptools.HttpParserError

    def _head_is_late(self) -> None:
        self._deadline = None
        if self._answering and not self._answering.response_complete:
            # Nobody waits for this request, and reading may be paused.
            self._deadline = self.loop.call_later(self.limits.header_timeout_s, self._head_is_late)
        elif self._begun:
            self._refuse(HeadTooSlow(self.limits.header_timeout_s))
        else:
            self._line.close()

    def _set_no_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, refusal: Refusal, *, wait: bool = True) -> None:
        """Say what is wrong, unless that would be in the middle of an answer or in place of another's, and end."""
        self._set_no_deadline()
        self.refused(refusal)
        answering = self._answering
        under_way = answering and not answering.response_complete and answering.response_started
        if not under_way and not self.pipeline:
            self._write(refusal)
        if answering:
            answering.abandon()
        self._line.unread = wait
        self._line.close()

    def _write(self, refusal: Refusal) -> None:
        body = envelope(refusal)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": request_id_of([]),
            **refusal.headers,
        }
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        head = b"".join(b"%b: %b\r\n" % line for line in [*self.server_state.default_headers, *lines])
        self._line.write(STATUS_LINE[refusal.status] + head + b"\r\n" + body)


def connection_class(limits: ConnectionLimits, on_refusal: Callable[[Refusal], None]) -> type[Connection]:
    """The protocol for `uvicorn.Config`, which takes a class; ``on_refusal`` is told of what is refused here."""

    class Limited(Connection):
        """Of one server."""

        @staticmethod
        def refused(refusal: Refusal) -> None:
            on_refusal(refusal)

    Limited.limits = limits
    return Limited
