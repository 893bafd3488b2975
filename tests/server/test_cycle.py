"""How an answer's messages become bytes."""

import asyncio
import logging
from typing import Any, cast

import httptools
import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.cycle import Cycle
from server.errors import BodyTooLarge
from server.exchange import WHEN_GONE, Headers, Reply


class Transport(asyncio.Transport):
    """Remembers what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def resume_reading(self) -> None:
        pass


class Parsed:
    """What a client makes of it."""

    def __init__(self, data: bytes) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.whole = False
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(data)
        self.status = parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


def cycle(method: str = "POST", *, keep_alive: bool = True) -> tuple[Cycle, Transport]:
    """One that has read its request."""
    transport = Transport()
    log = logging.getLogger("uvicorn.error")
    made = RequestResponseCycle(
        scope=cast(Any, {"type": "http", "method": method}),
        transport=transport,
        flow=FlowControl(transport),
        logger=log,
        access_logger=log,
        access_log=False,
        default_headers=[(b"date", b"today")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=keep_alive,
        on_response=lambda: None,
    )
    return Cycle.of(made), transport


async def send(made: Cycle, headers: Headers, *parts: bytes, status: int = 200) -> None:
    await made.send({"type": "http.response.start", "status": status, "headers": headers})
    for number, part in enumerate(parts, 1):
        await made.send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


async def test_a_whole_answer_is_one_write() -> None:
    made, transport = cycle()
    await send(made, [(b"Content-Length", b"2"), (b"x-a", b"b")], b"{}")
    (data,) = transport.writes
    parsed = Parsed(data)
    assert (parsed.status, parsed.body, parsed.whole) == (200, b"{}", True)
    assert parsed.headers == {b"date": b"today", b"content-length": b"2", b"x-a": b"b"}
    assert not transport.closed


async def test_a_stream_is_a_write_a_part() -> None:
    made, transport = cycle()
    await send(made, [], b"one", b"two", b"")
    first, *others = transport.writes
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n3\r\none\r\n")
    assert others == [b"3\r\ntwo\r\n", b"0\r\n\r\n"]
    parsed = Parsed(b"".join(transport.writes))
    assert (parsed.body, parsed.whole, parsed.headers[b"transfer-encoding"]) == (b"onetwo", True, b"chunked")


@pytest.mark.parametrize("headers", [[], [(b"connection", b"close")]])
async def test_the_last_answer_of_a_connection_says_so(headers: Headers) -> None:
    made, transport = cycle(keep_alive=bool(headers))
    await send(made, headers, b"x", b"")
    assert Parsed(b"".join(transport.writes)).headers[b"connection"] == b"close"
    assert b"".join(transport.writes).count(b"connection") == 1
    assert transport.closed


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_where_no_body_may_be_there_is_none(method: str, status: int) -> None:
    made, transport = cycle(method)
    await send(made, [(b"content-length", b"5")] if method == "HEAD" else [], b"", status=status)
    (data,) = transport.writes
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert data.endswith(b"\r\n\r\n")
    assert b"chunked" not in data


@pytest.mark.parametrize("value", [b"a\r\nx-b: c", b"a\nb", b"a\rb", b"a\0b", b"a\r\n\r\n<html>"])
async def test_a_header_cannot_begin_another(value: bytes) -> None:
    made, transport = cycle()
    with pytest.raises(RuntimeError, match="line break"):
        await send(made, [(b"x-a", value)], b"")
    assert transport.writes == []


@pytest.mark.parametrize("parts", [(b"abc",), (b"a",), (b"a", b"bc"), (b"a", b"")])
async def test_a_body_of_another_length_than_announced_is_a_mistake(parts: tuple[bytes, ...]) -> None:
    made, _ = cycle()
    with pytest.raises(RuntimeError, match="length"):
        await send(made, [(b"content-length", b"2")], *parts)


async def test_messages_out_of_turn_are_a_mistake() -> None:
    made, _ = cycle()
    with pytest.raises(RuntimeError, match="turn"):
        await made.send({"type": "http.response.body", "body": b""})
    await send(made, [], b"")
    with pytest.raises(RuntimeError, match="turn"):
        await made.send({"type": "http.response.body", "body": b""})
    with pytest.raises(RuntimeError, match="turn"):
        await send(made, [])


async def test_who_has_gone_gets_nothing_and_is_told_of() -> None:
    made, transport = cycle()
    told: list[str] = []
    when_gone = cast(Any, made.scope)["extensions"][WHEN_GONE]
    when_gone(lambda: told.append("first"))
    assert told == []
    made.abandon()
    when_gone(lambda: told.append("too late to wait"))
    assert told == ["first", "too late to wait"]
    await send(made, [], b"x", b"")
    assert transport.writes == []


async def test_the_end_of_an_answer_is_nobodys_leaving() -> None:
    made, _ = cycle()
    told: list[str] = []
    made.when_gone(lambda: told.append("gone"))
    await send(made, [], b"")
    made.abandon()
    assert told == []


async def test_an_answer_that_was_interrupted_before_it_began_can_still_be_an_error() -> None:
    """The caller has not read the answer before on this connection, and the request's time is over."""
    made, transport = cycle()
    reply = Reply(cast(Any, made.send), made.when_gone, "req-1")
    made.flow.pause_writing()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await reply.begin_events()
    made.flow.resume_writing()
    await reply.refuse(BodyTooLarge(1))
    parsed = Parsed(b"".join(transport.writes))
    assert (parsed.status, parsed.whole) == (413, True)
    assert not reply.is_blocked
