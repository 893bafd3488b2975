"""How an answer's bytes reach its connection: the head together with the first part of the body.

Stands on uvicorn's cycle of one request and its response, and differs in how that writes: a write is a call of the
system, and the headers, which are ours, are looked over together instead of one by one.
"""

from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from server.exchange import WHEN_GONE, Message, Tell

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

NO_BODY = (204, 304)


class Cycle(RequestResponseCycle):
    """One request and its response; uvicorn makes it, and it becomes this by `of`, with nothing sent so far."""

    _head: bytes | None = None
    """What waits for the first part of the body."""
    _tell: Tell | None = None

    @classmethod
    def of(cls, cycle: RequestResponseCycle) -> "Cycle":
        """The same object."""
        cycle.__class__ = cls
        ours = cast(Cycle, cycle)
        ours.scope["extensions"] = {WHEN_GONE: ours.when_gone}  # type: ignore[dict-item]  # no dict of options
        return ours

    def when_gone(self, tell: Tell) -> None:
        """Call ``tell`` once the caller has left; see `server.exchange.WHEN_GONE`."""
        # A body that was read in large pieces stops the reading, and with it the notice that the caller left.
        self.flow.resume_reading()
        if self.disconnected:
            tell()
        else:
            self._tell = tell

    def abandon(self) -> None:
        """Let whoever works for this caller know that nobody will read it."""
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        self.flow.resume_writing()
        tell, self._tell = self._tell, None
        if tell:
            tell()

    async def send(self, message: "ASGISendEvent") -> None:
        """Send one of ASGI's messages; waits while the caller reads more slowly than it is written to."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start" and not self.response_started:
            self._begin(cast(Message, message))
        elif message["type"] == "http.response.body" and self.response_started and not self.response_complete:
            self._part(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} is out of turn")

    def _begin(self, message: Message) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        status: int = message["status"]
        lines = [STATUS_LINE[status]]
        for name, value in [*self.default_headers, *message.get("headers", ())]:
            name = name.lower()
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in NO_BODY:
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header with a line break in it")
        self._head = head + b"\r\n"

    def _part(self, body: bytes, *, more: bool) -> None:
        data: tuple[Any, ...]
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            data = ()
        elif self.chunked_encoding:
            data = (b"%x\r\n" % len(body), body, b"\r\n") if body else ()
            if not more:
                data += (b"0\r\n\r\n",)
        else:
            self.expected_content_length -= len(body)
            data = (body,)
        if self.expected_content_length < 0 or (self.expected_content_length and not more):
            raise RuntimeError("a body of another length than is announced")
        if self._head is not None:
            data = (self._head, *data)
            self._head = None
        self.transport.write(b"".join(data))
        if not more:
            self._end()

    def _end(self) -> None:
        self.response_complete = True
        self._tell = None  # what refers to itself is left for the garbage collector: a tenth of a request's cost
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
