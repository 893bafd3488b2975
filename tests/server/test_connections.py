"""Callers who are slow, many, or speak no HTTP, over real sockets and against the event loop that serves."""

import asyncio
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import uvicorn

from server import line
from server.connections import MOST_HEAD_BYTES, MOST_PIPELINED, ConnectionLimits, connection_class, room_for
from server.errors import BodyTooLarge, Refusal
from server.exchange import WHEN_GONE, ClientLeft, Reply, read_body
from server.listener import Server, listening_socket
from tests.server.conftest import Gateway
from tiers.errors import ConfigError

BODY_LIMIT = 1 << 20
PIECE, PIECES = bytes(64 << 10), 1024
POST = b"POST / HTTP/1.1\r\n"
LATE_S = 5.0
"""Nothing but a bound that is missing takes so long, not on a busy machine either."""
HELLO = b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass
class App:
    """Answers by path, and remembers what it went through."""

    pieces_sent: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.set()
        self.path = scope["path"]
        self.headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        reply = Reply(send, scope["extensions"][WHEN_GONE], "req-1")
        try:
            await self._answer(scope["path"], reply, receive)
        except Refusal as refusal:
            await reply.refuse(refusal)
        except ClientLeft:
            self.left.set()

    async def _answer(self, path: str, reply: Reply, receive: Any) -> None:
        if path == "/refuse":
            raise BodyTooLarge(BODY_LIMIT)
        body = await read_body([], receive, BODY_LIMIT, 30)
        if path == "/flood":
            await reply.begin(200, [])
            for self.pieces_sent in range(1, PIECES + 1):
                await reply.send(PIECE, more=self.pieces_sent < PIECES)
            return
        if path in ("/wait", "/stream"):
            if path == "/stream":
                await reply.begin(200, [])
                await reply.send(b"first")
            gone = asyncio.Event()
            reply.when_gone(gone.set)
            await gone.wait()
            raise ClientLeft
        await reply.whole(200, json.dumps({"path": path, "body": body.decode()}).encode())


@dataclass
class Served:
    """A server on loopback, in a thread with the event loop of the real one."""

    address: tuple[str, int]
    app: App
    connections: set[Any]
    refused: list[str]

    def connect(self) -> socket.socket:
        caller = socket.create_connection(self.address, timeout=LATE_S)
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return caller

    def ask(self, request: bytes) -> bytes:
        """All that comes until the server closes."""
        with self.connect() as caller:
            caller.sendall(request)
            return everything(caller)


@contextmanager
def serving(**limits: Any) -> Iterator[Served]:
    app, refused = App(), []
    bounds = ConnectionLimits(**{"header_timeout_s": 30, "keep_alive_s": 30, "max_connections": 5000, **limits})
    protocol = connection_class(bounds, lambda refusal: refused.append(str(refusal.code)))
    listener = listening_socket("127.0.0.1", 0)
    server = Server(
        uvicorn.Config(app, http=protocol, ws="none", loop="uvloop", lifespan="off", log_config=None, backlog=4096)
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield Served(listener.getsockname(), app, server.server_state.connections, refused)
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def patient() -> Iterator[Served]:
    """Has time for everybody."""
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def hasty() -> Iterator[Served]:
    """Waits for nobody."""
    with serving(header_timeout_s=0.2, keep_alive_s=0.45) as served:
        yield served


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """What the last test left behind is forgotten."""
    for name in ("patient", "hasty"):
        if name in request.fixturenames:
            served = request.getfixturevalue(name)
            served.app.__init__()
            served.refused.clear()


def everything(caller: socket.socket) -> bytes:
    parts = []
    while part := caller.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def send_until_cut(caller: socket.socket, data: bytes, *, pause_s: float = 0) -> int:
    """How many bytes could be sent until the server would have no more."""
    for sent in range(0, 1 << 30, len(data)):
        try:
            caller.sendall(data)
        except OSError:
            return sent
        time.sleep(pause_s)
    raise AssertionError("The server never had enough.")


def one_answer(caller: socket.socket) -> bytes:
    """Up to the end of one answer with a content-length; the connection stays."""
    got = b""
    while not (head := re.match(rb"(?s)(.*?content-length: (\d+).*?\r\n\r\n)", got)) or len(got) < (
        head.end() + int(head[2])
    ):
        part = caller.recv(1 << 16)
        assert part, got
        got += part
    return got


def error_of(answer: bytes) -> dict[str, Any]:
    """The envelope, in an answer that says whose it is and that it is the last one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    assert re.search(rb"content-length: %d\b" % len(body), head)
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error | {"status": int(head.split()[1])}


def until(condition: Callable[[], object], within_s: float = LATE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


# Slow senders


def test_a_head_that_does_not_come_to_its_end_is_cut_off(hasty: Served) -> None:
    began = time.monotonic()
    answer = hasty.ask(HELLO[:-2])
    assert 0.2 <= time.monotonic() - began < LATE_S
    assert error_of(answer)["status"] == 408
    assert error_of(answer)["code"] == "headers_timeout"
    assert b"x-request-id: req-" in answer
    assert hasty.refused == ["headers_timeout"]
    assert not hasty.app.begun.is_set()


def test_a_head_that_comes_byte_by_byte_has_no_more_time(hasty: Served) -> None:
    with hasty.connect() as caller:
        began = time.monotonic()
        caller.sendall(b"GET /")
        threading.Thread(target=send_until_cut, args=(caller, b"a"), kwargs={"pause_s": 0.01}).start()
        assert error_of(everything(caller))["status"] == 408
        assert time.monotonic() - began < LATE_S


def test_who_says_nothing_is_cut_off_without_a_word(hasty: Served) -> None:
    assert hasty.ask(b"") == b""
    assert hasty.ask(b"\r\n") == b""
    assert hasty.refused == []


def test_the_second_request_of_a_connection_has_as_much_time_from_its_first_byte(hasty: Served) -> None:
    with hasty.connect() as caller:
        caller.sendall(HELLO)
        one_answer(caller)
        time.sleep(0.25)
        caller.sendall(HELLO[:9])
        time.sleep(0.05)
        caller.sendall(HELLO[9:])
        one_answer(caller)
        began = time.monotonic()
        caller.sendall(HELLO + HELLO[:9])
        one_answer(caller)
        assert error_of(everything(caller))["status"] == 408
        assert time.monotonic() - began >= 0.15


def test_empty_lines_between_requests_keep_no_connection_open(hasty: Served) -> None:
    with hasty.connect() as caller:
        caller.sendall(HELLO)
        one_answer(caller)
        began = time.monotonic()
        send_until_cut(caller, b"\r\n", pause_s=0.05)
        assert time.monotonic() - began < LATE_S


def test_an_idle_connection_is_kept_for_a_while(hasty: Served) -> None:
    chunked = POST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    with hasty.connect() as caller:
        caller.sendall(chunked)
        time.sleep(0.02)
        caller.sendall(b"\r\n")
        one_answer(caller)
        time.sleep(0.25)
        began = time.monotonic()  # before the server's clock, which starts with its answer
        caller.sendall(HELLO)
        one_answer(caller)
        assert everything(caller) == b""
        assert time.monotonic() - began >= 0.4


def test_an_answer_under_way_is_not_broken_by_what_its_connection_was_kept_for(hasty: Served) -> None:
    with hasty.connect() as caller:
        caller.sendall(HELLO)
        one_answer(caller)
        caller.sendall(b"GET /stream HTTP/1.1\r\n\r\n" + HELLO[:9])
        time.sleep(0.5)
        assert caller.recv(1 << 16).endswith(b"5\r\nfirst\r\n")
        assert not hasty.app.left.is_set()
    assert hasty.app.left.wait(LATE_S)


# Many


def test_two_thousand_idle_connections_do_not_stop_others(patient: Served) -> None:
    room_for(5000)
    with ExitStack() as idle:
        patient.ask(b"GET /hello HTTP/1.1\r\nconnection: close\r\n\r\n")
        before = memory()
        for _ in range(1000):
            idle.enter_context(patient.connect())
            idle.enter_context(patient.connect()).sendall(HELLO[:-2])
        until(lambda: len(patient.connections) >= 2000)
        began = time.monotonic()
        assert b"200 OK" in patient.ask(b"GET /hello HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert time.monotonic() - began < LATE_S
        assert (memory() - before) / 2000 < 16 << 10
    until(lambda: not patient.connections)


def test_a_connection_too_many_is_told_so_and_closed() -> None:
    with serving(max_connections=2) as served, ExitStack() as stack:
        first, _ = (stack.enter_context(served.connect()) for _ in range(2))
        until(lambda: len(served.connections) == 2)
        answer = served.ask(HELLO)
        assert error_of(answer)["status"] == 503
        assert error_of(answer)["code"] == "too_many_connections"
        assert b"retry-after: 1\r\n" in answer
        assert served.refused == ["too_many_connections"]
        first.sendall(HELLO)
        assert b"200 OK" in one_answer(first)
        first.close()
        until(lambda: len(served.connections) == 1)
        assert b"200 OK" in served.ask(HELLO.replace(b"host: x", b"connection: close"))


def test_far_too_many_are_not_even_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.connections._REFUSED_PATIENTLY", 1)
    with serving(max_connections=1) as served, served.connect(), served.connect():
        until(lambda: len(served.connections) == 2)
        with served.connect() as caller:
            assert error_of(everything(caller))["code"] == "too_many_connections"
        assert len(served.connections) == 2


def test_connections_are_no_more_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (1024, 4096)
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    raised = []
    monkeypatch.setattr("resource.setrlimit", lambda _, new: raised.append(new))
    assert room_for(100) == 100
    assert raised == []
    assert room_for(1000) == 1000
    assert room_for(10_000) == 1920
    assert raised == [(2256, 4096), (4096, 4096)]
    limits = (64, 64)
    with pytest.raises(ConfigError, match="64 files"):
        room_for(1)


# What is not HTTP, and what is too much of it


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"\x16\x03\x01\x00\xf8\x01\x00\x00\xf4\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"get / HTTP/1.1\r\n\r\n", id="method"),
        pytest.param(b"GET /\xff HTTP/1.1\r\n\r\n", id="target of raw bytes"),
        pytest.param(b"GET /\x00 HTTP/1.1\r\n\r\n", id="NUL in the target"),
        pytest.param(b"GET http://x HTTP/1.1\r\n\r\n", id="target without a path"),
        pytest.param(b"CONNECT x:80 HTTP/1.1\r\n\r\n", id="CONNECT"),
        pytest.param(b"GET / HTTP/1.1\r\na: b\x00c\r\n\r\n", id="NUL in a value"),
        pytest.param(b"GET / HTTP/1.1\r\na: \x1b[31m\r\n\r\n", id="ESC in a value"),
        pytest.param(b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n", id="folded value"),
        pytest.param(b"GET / HTTP/1.1\r\na: b\nc: d\r\n\r\n", id="bare LF"),
        pytest.param(b"GET / HTTP/1.1\r\na : b\r\n\r\n", id="space in a name"),
        pytest.param(POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", id="CL+TE"),
        pytest.param(POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", id="TE+CL"),
        pytest.param(POST + b"transfer-encoding: chunked, x\r\n\r\n0\r\n\r\n", id="TE ending in another"),
        pytest.param(POST + b"transfer-encoding: x\r\n\r\n", id="TE unknown"),
        pytest.param(POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", id="two lengths"),
        pytest.param(POST + b"content-length: +5\r\n\r\nabcde", id="length with a sign"),
        pytest.param(POST + b"content-length: %d\r\n\r\nabcde" % 10**30, id="length without end"),
        pytest.param(POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n", id="chunk size"),
        pytest.param(POST + b"content-length: 5\r\n\r\nabcdeFGH", id="more body than its length"),
    ],
)
def test_what_is_not_http_is_refused_in_the_envelope(patient: Served, request_bytes: bytes) -> None:
    answer = patient.ask(request_bytes)
    assert error_of(answer)["status"] == 400
    assert error_of(answer)["code"] == "malformed_request"
    assert answer.count(b"HTTP/1.1 ") == 1
    assert patient.refused == ["malformed_request"]


def test_an_answer_under_way_is_cut_and_not_mixed_with_an_error(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(b"GET /stream HTTP/1.1\r\n\r\n")
        got = b""
        while not got.endswith(b"first\r\n"):
            got += caller.recv(1 << 16)
        caller.sendall(b"\x00\x00\x00")
        assert everything(caller) == b""
    assert patient.app.left.wait(LATE_S)


def test_an_answer_that_is_not_read_ends_as_well(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(b"GET /flood HTTP/1.1\r\n\r\n")
        until(lambda: patient.app.pieces_sent)
        caller.sendall(b"\x00\x00\x00")
        until(lambda: patient.app.pieces_sent == PIECES)


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"x: " + b"y" * 1000 + b"\r\n", id="headers"),
        pytest.param(b"y" * 1000, id="one value"),
    ],
)
def test_headers_without_end_are_refused(patient: Served, endless: bytes) -> None:
    with patient.connect() as caller:
        caller.sendall(HELLO[:-2] + b"z: ")
        while not patient.refused:
            caller.sendall(endless)
        answer = everything(caller)
    assert error_of(answer)["status"] == 431
    assert error_of(answer)["code"] == "headers_too_large"


def test_headers_are_measured_however_they_come(patient: Served) -> None:
    request = b"POST /hello HTTP/1.1\r\nconnection: close\r\ncontent-length: 100000\r\nx: %b\r\n\r\n"
    fits = request % (b"y" * (MOST_HEAD_BYTES - 200)) + b"z" * 100000
    assert b"200 OK" in patient.ask(fits)
    assert error_of(patient.ask(request % (b"y" * MOST_HEAD_BYTES)))["status"] == 431
    target = HELLO.replace(b"/hello", b"/" + b"a" * MOST_HEAD_BYTES)
    assert error_of(patient.ask(target))["status"] == 431


def test_what_follows_a_chunked_body_is_bounded_and_no_header(patient: Served) -> None:
    chunked = b"POST /hello HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    answer = patient.ask(chunked + b"authorization: Bearer x\r\n\r\n")
    assert b'"body": "abc"' in answer
    assert patient.app.headers.keys() == {"connection", "transfer-encoding"}
    patient.app.__init__()  # type: ignore[misc]
    with patient.connect() as caller:
        caller.sendall(chunked)
        while not patient.refused:
            caller.sendall(b"x: " + b"y" * 60000 + b"\r\n")
            time.sleep(0.001)
        assert error_of(everything(caller))["status"] == 431
    assert patient.app.left.wait(LATE_S)


def test_nothing_more_is_read_from_a_connection_that_was_refused(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(HELLO[:-2] + b"x: " + b"y" * 2 * MOST_HEAD_BYTES)
        until(lambda: patient.refused)
        caller.sendall(b"\r\n\r\n" + HELLO)
        assert everything(caller).count(b"HTTP/1.1 ") == 1
    assert not patient.app.begun.is_set()


@pytest.mark.parametrize(
    "path",
    ["/%00%0d%0a%1b[31m%ff", "/\r\n\x00", "/\ud800", "/%ed%a0%80", "/a?b#c", "//x/y", "/é"],
)
async def test_a_path_that_does_not_exist_is_quoted_harmlessly(gateway: Gateway, path: str) -> None:
    answer = await gateway.post(path=path, method="GET")
    assert answer.status == 404
    message = json.loads(answer.body)["error"]["message"]
    assert message == f"GET {path!r}: Not Found."
    assert message.isprintable()


async def test_of_a_long_path_the_beginning_is_quoted(gateway: Gateway) -> None:
    answer = await gateway.post(path="/" + "a" * 60000)
    assert json.loads(answer.body)["error"]["message"] == f"POST '/{'a' * 199}': Not Found."


async def test_a_path_with_a_slash_too_many_does_not_exist(gateway: Gateway) -> None:
    answer = await gateway.post(path="/v1/chat/completions/", headers={"host": "elsewhere"})
    assert answer.status == 404
    assert "location" not in answer.headers


# Requests one after the other


def test_pipelined_requests_are_answered_in_their_order(patient: Served) -> None:
    requests = [b"POST /%d HTTP/1.1\r\ncontent-length: 1\r\n\r\n%d" % (n, n) for n in range(9)]
    with patient.connect() as caller:
        caller.sendall(b"".join(requests) + HELLO.replace(b"host: x", b"connection: close"))
        answers = [json.loads(body) for body in re.findall(rb"\{.*?\}", everything(caller))]
    assert answers == [{"path": f"/{n}", "body": str(n)} for n in range(9)] + [{"path": "/hello", "body": ""}]


@pytest.mark.parametrize("size", [1_000, 100_000, BODY_LIMIT])
def test_a_caller_who_leaves_after_a_large_body_is_noticed(patient: Served, size: int) -> None:
    """Head first and then the body, as many clients send them: reading stops where a piece of it is large."""
    with patient.connect() as caller:
        caller.sendall(b"POST /wait HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size)
        assert patient.app.begun.wait(LATE_S)
        time.sleep(0.05)
        caller.sendall(b"x" * size)
        time.sleep(0.05)
    assert patient.app.left.wait(LATE_S)


def test_only_so_many_pipelined_requests_wait(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(b"GET /wait HTTP/1.1\r\n\r\n" + HELLO * (MOST_PIPELINED + 1))
        assert everything(caller) == b""
    assert patient.app.left.wait(LATE_S)


@pytest.mark.parametrize("before", [b"", HELLO])
def test_who_leaves_with_requests_waiting_leaves_the_one_under_way(patient: Served, before: bytes) -> None:
    with patient.connect() as caller:
        caller.sendall(before + b"GET /wait HTTP/1.1\r\n\r\n" + HELLO)
        until(lambda: patient.app.path == "/wait")
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert patient.app.left.wait(LATE_S)


@pytest.mark.parametrize("offer", ["websocket", "h2c"])
def test_who_offers_another_protocol_is_answered_in_this_one(patient: Served, offer: str) -> None:
    head = (
        f"POST /hello HTTP/1.1\r\nupgrade: {offer}\r\nconnection: upgrade\r\nhost: x\r\ncontent-length: 4\r\n\r\n"
    )
    with patient.connect() as caller:
        for _ in range(2):
            caller.sendall(head.encode() + b"body")
            answer = one_answer(caller)
            assert b"200 OK" in answer
            assert b'"body": "body"' in answer
        caller.sendall(head.encode())
        caller.sendall(b"body" + HELLO)
        got = one_answer(caller)
        while b"/hello" not in got.partition(b'"body": "body"')[2]:
            got += caller.recv(1 << 16)
    assert patient.app.headers.get("upgrade") is None


# Bodies, and answers given before their end


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_body_comes_whole_however_it_is_framed(patient: Served, framing: str) -> None:
    head = b"POST /hello HTTP/1.1\r\nconnection: close\r\n"
    chunked = head + b"transfer-encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    request = chunked if framing == "chunked" else head + b"content-length: 3\r\n\r\nabc"
    assert b'"body": "abc"' in patient.ask(request)


def test_a_body_shorter_than_its_length_is_a_caller_who_left(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(b"POST /hello HTTP/1.1\r\ncontent-length: 5\r\n\r\nabc")
        assert patient.app.begun.wait(LATE_S)
    assert patient.app.left.wait(LATE_S)


def test_who_asks_first_is_told_to_go_on_only_if_the_body_is_wanted(patient: Served) -> None:
    ask = b"POST /%b HTTP/1.1\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
    with patient.connect() as caller:
        caller.sendall(ask % b"hello")
        assert caller.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        caller.sendall(b"abc")
        assert b'"body": "abc"' in everything(caller)
    answer = patient.ask(ask % b"refuse")
    assert error_of(answer)["status"] == 413


@pytest.mark.parametrize("path", ["refuse", "hello"])
def test_a_refusal_is_read_by_who_sends_all_of_a_body_too_large(patient: Served, path: str) -> None:
    with patient.connect() as caller:
        caller.sendall(f"POST /{path} HTTP/1.1\r\ncontent-length: {9 << 20}\r\n\r\n".encode())
        for _ in range(9 << 4):
            caller.sendall(PIECE)
        assert error_of(everything(caller))["code"] == "request_too_large"


def test_what_follows_a_refusal_is_bounded_in_bytes(patient: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "LINGER_BYTES", 1 << 20)
    with patient.connect() as caller:
        caller.sendall(b"POST /refuse HTTP/1.1\r\ncontent-length: 1000000000\r\n\r\n")
        assert send_until_cut(caller, PIECE) < 64 << 20  # most of it waits in the system's buffers


def test_what_follows_a_refusal_is_bounded_in_time(patient: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "LINGER_S", 0.1)
    with patient.connect() as caller:
        caller.sendall(b"POST /refuse HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n")
        assert error_of(everything(caller))["status"] == 413
        began = time.monotonic()
        send_until_cut(caller, HELLO, pause_s=0.01)
        assert time.monotonic() - began < LATE_S
    until(lambda: not patient.connections)


def test_the_rest_of_a_refused_body_is_not_read_as_a_request(patient: Served) -> None:
    with patient.connect() as caller:
        caller.sendall(b"POST /refuse HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (len(HELLO) + 1))
        assert patient.app.begun.wait(LATE_S)
        patient.app.begun.clear()
        caller.sendall(HELLO + HELLO)
        assert everything(caller).count(b"HTTP/1.1 ") == 1
    assert not patient.app.begun.is_set()


# Slow readers


def test_who_does_not_read_stops_the_answer_and_grows_no_memory(patient: Served) -> None:
    before = memory()
    with patient.connect() as caller:
        caller.sendall(b"GET /flood HTTP/1.1\r\nconnection: close\r\n\r\n")
        until(lambda: patient.app.pieces_sent)
        stopped_at = -1
        while patient.app.pieces_sent != stopped_at:
            stopped_at = patient.app.pieces_sent
            time.sleep(0.05)
        assert 0 < stopped_at < PIECES
        assert memory() - before < 8 << 20
        got = 0
        while part := caller.recv(1 << 20):
            got += len(part)
        assert got > PIECES * len(PIECE)


def test_who_vanishes_or_stops_reading_for_good_is_cut_off_by_the_system(patient: Served) -> None:
    with patient.connect():
        until(lambda: len(patient.connections) == 1)
        (connection,) = patient.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == line.GONE_AFTER_S * 1000


async def test_a_stopping_server_ends_what_is_idle_and_finishes_what_is_not() -> None:
    with serving() as served, served.connect() as idle, served.connect() as busy:
        busy.sendall(b"POST /hello HTTP/1.1\r\ncontent-length: 1\r\n\r\n")
        until(lambda: len(served.connections) == 2)
        assert served.app.begun.wait(LATE_S)
        for connection in list(served.connections):
            connection.loop.call_soon_threadsafe(connection.shutdown)
        assert everything(idle) == b""
        busy.sendall(b"x")
        answer = everything(busy)
    assert b'"body": "x"' in answer
    assert b"connection: close" in answer
