"""What asks the gateways: keep-alive connections over raw sockets, and a check of every single answer.

`Load` is a process of its own, so that what asking costs is nobody's. It warms its connections up, says so, and
begins at a word: what its holder reads of a gateway's clock before and after belongs to the answers counted.

usage: python -m tests.bench.load ORDER     the JSON of an `Order`; used by `Load`
"""

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import psutil
import uvloop

from tests.bench import upstream
from tests.bench.answers import Answer, WrongAnswer, check_stream, check_whole
from tests.bench.machine import other_cores

ROOT = Path(__file__).parents[2]
WARM_UP = 64
"""Answers before anything counts, over all connections, but one each at least; one stream each."""
LONGEST_S = 60.0
"""An answer that takes longer is a wrong one."""


Kind = Literal["whole", "stream", "generate"]
"""An answer in one piece, one in events, and one in events from a real engine, whose text nobody knows."""


class Order(msgspec.Struct, frozen=True):
    """What to ask: ``kinds`` in turn over every connection, until the time is over or so many were asked."""

    url: str
    connections: int
    kinds: tuple[Kind, ...]
    headers: dict[str, str] = {}
    tokens: int = 64
    """Of a streamed answer: as many events."""
    seconds: float | None = None
    requests: int | None = None


class Result(msgspec.Struct, frozen=True):
    """What came back; all of it was right."""

    requests: int
    chunks: int
    seconds: float
    p50_ms: float
    p99_ms: float
    first_ms: float
    """Until the first byte of a body: the median."""
    chunks_per_read: float
    """1 where each chunk was passed on by itself: no gateway looks cheap by having been too slow."""


class Connection(asyncio.Protocol):
    """One keep-alive connection to a gateway; one request at a time."""

    def __init__(self) -> None:
        self.is_open = True
        self._loop = asyncio.get_running_loop()
        self._answer = Answer()
        self._began = 0.0
        self._done: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to be asked."""
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> Answer:
        """The answer to one request, headers and all."""
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._done = self._loop.create_future()
        self._began = time.perf_counter()
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        """A part of the answer."""
        self._answer.reads += 1
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Called by the parser, like what follows."""
        if not self._answer.body:
            self._answer.first_s = time.perf_counter() - self._began
        self._answer.body += body

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self._answer.status = self._parser.get_status_code()
        self._answer.seconds = time.perf_counter() - self._began
        if self._done and not self._done.done():
            self._done.set_result(self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody will answer any more."""
        self.is_open = False
        if self._done and not self._done.done():
            self._done.set_exception(WrongAnswer(f"the connection was closed ({error!r})"))

    def close(self) -> None:
        """Leave."""
        self._transport.close()


class Asker:
    """Asks as ordered."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._requests = {kind: _request(order, kind) for kind in order.kinds}
        self._answers: list[Answer] = []
        self._chunks = 0
        self._chunk_reads = 0
        self._left: Iterator[int] = itertools.count()
        self._deadline = float("inf")

    async def connect(self) -> list[Connection]:
        """The connections, warmed up."""
        made = [await self._open() for _ in range(self._order.connections)]
        times: dict[Kind, int] = {"whole": max(1, WARM_UP // len(made)), "stream": 1, "generate": 0}
        kinds = [kind for kind in self._order.kinds for _ in range(times[kind])]
        await asyncio.gather(*(self._ask_all(connection, kinds) for connection in made))
        self._answers.clear()
        self._chunks = self._chunk_reads = 0
        # Those that were ready first may have been idle for longer than a gateway keeps idle connections.
        return [connection if connection.is_open else await self._open() for connection in made]

    async def _open(self) -> Connection:
        address = urlsplit(self._order.url)
        loop = asyncio.get_running_loop()
        made = await loop.create_connection(Connection, str(address.hostname), int(address.port or 80))
        return made[1]

    async def run(self, connections: list[Connection]) -> Result:
        """Ask, and check what is answered."""
        began = time.perf_counter()
        if self._order.seconds is not None:
            self._deadline = began + self._order.seconds
        if self._order.requests is not None:
            self._left = iter(range(self._order.requests))
        await asyncio.gather(*(self._ask_on(connection) for connection in connections))
        seconds = time.perf_counter() - began
        times = sorted(answer.seconds * 1e3 for answer in self._answers)
        return Result(
            requests=len(times),
            chunks=self._chunks,
            seconds=seconds,
            p50_ms=statistics.median(times),
            p99_ms=times[int(0.99 * (len(times) - 1))],
            first_ms=statistics.median(answer.first_s * 1e3 for answer in self._answers),
            chunks_per_read=self._chunks / self._chunk_reads if self._chunk_reads else 0.0,
        )

    async def _ask_on(self, connection: Connection) -> None:
        kinds = itertools.cycle(self._order.kinds)
        while time.perf_counter() < self._deadline and next(self._left, None) is not None:
            await self._ask_all(connection, [next(kinds)])

    async def _ask_all(self, connection: Connection, kinds: list[Kind]) -> None:
        for kind in kinds:
            async with asyncio.timeout(LONGEST_S):
                answer = await connection.ask(self._requests[kind])
            if kind == "whole":
                check_whole(answer)
            else:
                texts = check_stream(answer, self._order.tokens)
                if kind == "stream" and texts != upstream.tokens_of(self._order.tokens):
                    raise WrongAnswer(f"{len(texts)} chunks instead of {self._order.tokens}, or other ones")
                self._chunks += self._order.tokens
                self._chunk_reads += answer.reads
            answer.body.clear()
            self._answers.append(answer)


def _request(order: Order, kind: Kind) -> bytes:
    question = {
        "model": upstream.MODEL,
        "messages": [
            {
                "role": "system",
                "content": "You are a helpful assistant. Answer briefly, and say what you do not know.",
            },
            {"role": "user", "content": "Why is the sky blue, and why is it red in the evening?"},
        ],
        "temperature": 0.7,
        "top_p": 0.95,
    }
    streamed = {"max_tokens": order.tokens, "stream": True, "stream_options": {"include_usage": True}}
    further: dict[Kind, dict[str, object]] = {
        "whole": {"max_tokens": upstream.TOKENS},
        "stream": streamed,
        "generate": streamed | {"ignore_eos": True},
    }
    body = msgspec.json.encode(question | further[kind])
    address = urlsplit(order.url)
    headers = {
        "host": address.netloc,
        "content-type": "application/json",
        "accept": "application/json",
        "user-agent": "assay-bench",
        "content-length": str(len(body)),
        **order.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body


class Load:
    """The process that asks, warmed up and waiting for the word."""

    def __init__(self, order: Order) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load", msgspec.json.encode(order).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        psutil.Process(self._process.pid).cpu_affinity(other_cores())

    def __enter__(self) -> Self:
        self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self) -> Result:
        """Say the word, and wait for what came of it.

        Raises:
            WrongAnswer: one answer was not what it had to be.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._line(), type=Result)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            errors = self._process.communicate()[1].strip().splitlines()
            raise WrongAnswer(errors[-1] if errors else "the load generator ended")
        return line


async def main(order: Order) -> None:
    """Warm up, say so, wait for the word, ask, and print the result."""
    asker = Asker(order)
    connections = await asker.connect()
    print("ready", flush=True)
    sys.stdin.readline()
    result = await asker.run(connections)
    print(msgspec.json.encode(result).decode(), flush=True)
    for connection in connections:
        connection.close()


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(sys.argv[1], type=Order)))
