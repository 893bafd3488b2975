"""The lock on an engine: no route, no method, no protocol without the key."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tiers.probe.lock import EngineLock


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[list[Any]]]:
    """What comes back from behind the lock; the application answers "inside"."""
    monkeypatch.setenv("VLLM_API_KEY", "key")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "inside"})

    async def request(headers: list[tuple[bytes, bytes]], kind: str = "http", method: str = "GET") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {}

        scope = {"type": kind, "method": method, "path": "/metrics", "headers": headers}
        await EngineLock(app)(scope, receive, send)
        return sent

    return request


async def test_the_holder_of_the_key_comes_in(ask: Any) -> None:
    assert await ask([(b"authorization", b"Bearer key")]) == [{"type": "inside"}]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("header", [b"", b"key", b"Bearer", b"Bearer other", b"bearer key", b"Bearer key "])
async def test_nobody_else_does(ask: Any, method: str, header: bytes) -> None:
    first, *_ = await ask([(b"authorization", header)], method=method)
    assert first["status"] == 401


async def test_the_engines_log_has_the_id_of_each_request_that_is_let_in(
    ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vllm.assay")
    key = (b"authorization", b"Bearer key")
    await ask([key, (b"x-request-id", b"abc-1")], method="POST")
    await ask([key])
    await ask([(b"x-request-id", b"stranger")])
    await ask([key, (b"x-request-id", b"a\x1b[2J\xff")])
    assert [record.getMessage() for record in caplog.records] == [
        "request 'abc-1': POST /metrics",
        r"request 'a\x1b[2J\xff': GET /metrics",
    ]


async def test_websockets_are_closed(ask: Any) -> None:
    assert await ask([], kind="websocket") == [{"type": "websocket.close", "code": 1008}]


async def test_the_applications_own_life_is_let_through(ask: Any) -> None:
    assert await ask([], kind="lifespan") == [{"type": "inside"}]


def test_an_engine_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="never runs open"):
        EngineLock(None)  # type: ignore[arg-type]
