"""Requests to an engine and their answers, at an engine that does what it should not."""

import asyncio
import gc
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.engines import upstream
from server.engines.upstream import MOST_AHEAD, MOST_HEAD_BYTES, Upstream, UpstreamBroke

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"content-length: 2\r\n\r\n{}"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Engine:
    """A server that says what the test says, and what was said to it."""

    upstream: Upstream
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, body: bytes = b"{}") -> tuple[int, bytes, bytes]:
        """One request: status, type and body of its answer."""
        async with self.upstream.post("/v1/completions", body, "req-1") as answer:
            return answer.status, answer.content_type, await answer.read()


@asynccontextmanager
async def engine(*answers: bytes | Script) -> AsyncIterator[Engine]:
    """One that gives these answers in turn, and then the last one for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                made.heads.append(head)
                made.bodies.append(await reader.readexactly(length))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            made.left.set()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    made = Engine(Upstream(f"http://{host}:{port}", "secret"))
    yield made
    made.upstream.close()
    server.close()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End the connection."""
    writer.close()
    raise ConnectionError


def silent(asked: asyncio.Event) -> Script:
    """Say nothing, once asked, until the other side leaves."""

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.readexactly(1)

    return wait


async def test_a_request_carries_its_key_its_name_and_its_bytes() -> None:
    async with engine(WHOLE) as made:
        assert await made.ask(b'{"a": 1}') == (200, b"application/json", b"{}")
    lines = made.heads[0].split(b"\r\n")
    assert lines[0] == b"POST /v1/completions HTTP/1.1"
    assert {b"authorization: Bearer secret", b"x-request-id: req-1", b"content-length: 8"} < set(lines)
    assert made.bodies == [b'{"a": 1}']


async def test_connections_are_kept() -> None:
    async with engine(WHOLE, CHUNKED + b"2\r\n{}\r\n0\r\n\r\n") as made:
        for _ in range(5):
            assert (await made.ask())[2] == b"{}"
        assert made.connections == 1
        assert len(await asyncio.gather(*(made.ask() for _ in range(3)))) == 3
        assert made.connections == 3


async def test_one_that_was_idle_for_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine(WHOLE) as made:
        await made.ask()
        monkeypatch.setattr(upstream, "IDLE_S", 0)
        await made.ask()
    assert made.connections == 2


@pytest.mark.parametrize(
    "last",
    [
        HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        WHOLE + b"more",
        WHOLE + WHOLE,
    ],
)
async def test_a_connection_after_which_nothing_can_be_known_is_not_used_again(last: bytes) -> None:
    async with engine(last, WHOLE) as made:
        assert (await made.ask())[2] == b"{}"
        assert (await made.ask())[2] == b"{}"
    assert made.connections == 2


async def test_what_comes_unasked_ends_the_connection() -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await asyncio.sleep(0.02)
        writer.write(WHOLE)

    async with engine(late, HEAD + b"content-length: 5\r\n\r\nright") as made:
        assert (await made.ask())[2] == b"{}"
        await asyncio.wait_for(made.left.wait(), 5)
        assert (await made.ask())[2] == b"right"


async def test_a_kept_connection_that_the_engine_has_closed_is_not_used() -> None:
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await writer.drain()
        await cut(reader, writer)

    async with engine(answer_and_close, WHOLE) as made:
        await made.ask()
        await asyncio.wait_for(made.left.wait(), 5)
        await asyncio.sleep(0.02)
        assert (await made.ask())[2] == b"{}"


async def test_an_announcement_is_no_answer() -> None:
    async with engine(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + WHOLE) as made:
        assert await made.ask() == (200, b"application/json", b"{}")


async def test_a_trailer_is_no_header() -> None:
    async with engine(CHUNKED + b"2\r\n{}\r\n0\r\ncontent-type: text/event-stream\r\n\r\n") as made:
        assert await made.ask() == (200, b"application/json", b"{}")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (cut, "the connection ended"),
        (b"hello\r\n\r\n", "no HTTP"),
        (HEAD + b"x: " + b"y" * MOST_HEAD_BYTES, "does not end"),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nx", "no HTTP"),
    ],
)
async def test_what_is_no_answer_is_told(answer: bytes | Script, why: str) -> None:
    async with engine(answer, WHOLE) as made:
        with pytest.raises(UpstreamBroke, match=why):
            await made.ask()
        assert (await made.ask())[2] == b"{}"


@pytest.mark.parametrize("rest", [b"3\r\nabc\r\n", b"3\r\nabc\r\nzz\r\n"])
async def test_what_came_before_an_answer_broke_is_given_first(rest: bytes) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + rest)
        await writer.drain()
        await cut(reader, writer)

    async with engine(half) as made, made.upstream.post("/", b"", "req-1") as answer:
        assert await answer.part() == b"abc"
        with pytest.raises(UpstreamBroke):
            await answer.part()


async def test_an_engine_that_is_not_there_is_told() -> None:
    async with engine(WHOLE) as made:
        pass
    with pytest.raises(UpstreamBroke, match="no connection"):
        await made.ask()


async def test_who_leaves_an_answer_leaves_the_engine() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n")
        await reader.readexactly(1)

    async with engine(endless) as made:
        async with made.upstream.post("/", b"", "req-1") as answer:
            await answer.part()
        await asyncio.wait_for(made.left.wait(), 5)


async def test_who_is_interrupted_before_the_answer_leaves_the_engine() -> None:
    asked = asyncio.Event()
    async with engine(silent(asked)) as made:
        asking = asyncio.create_task(made.ask())
        await asyncio.wait_for(asked.wait(), 5)
        asking.cancel()
        await asyncio.wait_for(made.left.wait(), 5)


@pytest.mark.parametrize("size", [5, 2 * MOST_AHEAD])
async def test_what_was_not_taken_of_an_answer_is_in_nobody_elses(size: int) -> None:
    """It came whole, and whoever it was for left before they took it."""
    secret = HEAD + b"content-length: %d\r\n\r\n" % size + b"s" * size
    async with engine(secret, WHOLE) as made:
        async with made.upstream.post("/", b"", "req-1"):
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(made.ask(), 5) == (200, b"application/json", b"{}")
    assert made.connections == 2


async def test_nor_what_came_when_they_were_interrupted() -> None:
    async def in_parts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n")
        await asking_more.wait()
        writer.write(b"6\r\nsecret\r\n0\r\n\r\n")
        asyncio.get_running_loop().call_later(0.05, taking.cancel)

    async def take() -> None:
        async with made.upstream.post("/", b"", "req-1") as answer:
            await answer.part()
            asking_more.set()
            await asyncio.sleep(5)  # its caller reads slowly

    asking_more = asyncio.Event()
    async with engine(in_parts, WHOLE) as made:
        taking = asyncio.create_task(take())
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert (await asyncio.wait_for(made.ask(), 5))[2] == b"{}"


async def test_a_connection_that_ended_leaves_nothing_to_the_garbage_collector() -> None:
    gc.disable()
    try:
        async with engine(WHOLE) as made:
            async with made.upstream.post("/", b"", "req-1") as answer:
                left = weakref.ref(answer)
                await answer.read()
            made.upstream.close()
            del answer
            await asyncio.sleep(0.05)
        assert left() is None
    finally:
        gc.enable()


async def test_closing_breaks_off_what_is_under_way() -> None:
    asked = asyncio.Event()
    async with engine(silent(asked)) as made:
        asking = asyncio.create_task(made.ask())
        await asyncio.wait_for(asked.wait(), 5)
        made.upstream.close()
        with pytest.raises(UpstreamBroke):
            await asyncio.wait_for(asking, 5)


async def _slow_reader() -> int:
    """Take nothing of an endless answer for a while; how many bytes of it were sent."""
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(CHUNKED)
        while True:
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await writer.drain()
            sent += 0x10000

    async with engine(endless) as made:
        async with made.upstream.post("/", b"", "req-1") as answer:
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.1)
            stuck_at = sent
            assert len(await answer.part()) < 2 * MOST_AHEAD + 0x40000
            while sent == stuck_at:
                await answer.part()
        await asyncio.wait_for(made.left.wait(), 5)
    return stuck_at


async def test_an_answer_that_nobody_takes_is_not_read() -> None:
    assert await _slow_reader() < 32 << 20  # the system's own buffers hold some megabytes


def test_so_it_is_on_the_loop_of_the_server() -> None:
    async def everything() -> None:
        assert await _slow_reader() < 32 << 20
        await test_connections_are_kept()
        await test_what_comes_unasked_ends_the_connection()
        await test_who_is_interrupted_before_the_answer_leaves_the_engine()

    uvloop.run(everything())


async def test_an_engine_behind_tls_is_known_by_its_name_at_whichever_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = _certificate(tmp_path, "engine.test")
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(trusted)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=own)
    port = server.sockets[0].getsockname()[1]
    right = Upstream(f"https://engine.test:{port}", "key", "127.0.0.1")
    async with right.post("/v1/completions", b"", "req-1") as answer:
        assert (answer.status, await answer.read()) == (200, b"{}")
    other = Upstream(f"https://another.test:{port}", "key", "127.0.0.1")
    with pytest.raises(UpstreamBroke):
        async with other.post("/v1/completions", b"", "req-2"):
            pass
    right.close()
    other.close()
    server.close()


def _certificate(folder: Path, name: str) -> Path:
    """A key and the certificate that it has signed for itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "tls.pem"
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()) + made.public_bytes(pem))
    return file
