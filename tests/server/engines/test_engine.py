"""Whether an engine is there, and what only looks as if it were not."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from server.engines.engine import Engine


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port where a connection is neither made nor refused, as of a machine without power: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_one_on_a_machine_that_is_gone_is_not_alive(deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engines.engine.REACH_TIMEOUT_S", 0.1)
    engine = Engine("one", deaf, "key", None)
    assert not await engine.is_alive()
    await engine.stop()


async def test_one_that_is_too_busy_to_answer_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engines.engine.HEALTH_TIMEOUT_S", 0.2)
    monkeypatch.setattr("server.engines.engine.REACH_TIMEOUT_S", 0.1)
    done = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    engine = Engine("one", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key", None)
    assert await engine.is_alive()
    done.set()
    await engine.stop()
    server.close()
