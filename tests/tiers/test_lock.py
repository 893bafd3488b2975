"""The lock on an engine: no route but one, no method, no protocol without the key; and who drains lets none in."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import ANY

import pytest

from tiers.probe.lock import EngineLock
from tiers.probe.reading import DRAIN_ROUTE, DRAINING, READY_ROUTE, VERIFYING, WAITS


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


async def test_websockets_are_closed(ask: Any) -> None:
    assert await ask([], kind="websocket") == [{"type": "websocket.close", "code": 1008}]


async def test_the_applications_own_life_is_let_through(ask: Any) -> None:
    assert await ask([], kind="lifespan") == [{"type": "inside"}]


def test_an_engine_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="never runs open"):
        EngineLock(None)  # type: ignore[arg-type]


class Slow:
    """An application that answers when it is told to, and the lock in front of it."""

    def __init__(self) -> None:
        self.lock = EngineLock(self.app)
        self.may_answer = asyncio.Event()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/v1/"):
            await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def ask(
        self, method: str, path: str, key: bytes = b"Bearer key"
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [(b"authorization", key)]}
        await self.lock(scope, None, send)  # type: ignore[arg-type]  # nobody receives
        return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    return Slow()


async def test_anybody_may_ask_whether_it_is_well(slow: Slow) -> None:
    assert (await slow.ask("GET", "/health", b""))[0] == 200
    for method, path in (("POST", "/health"), ("GET", "/health/"), ("GET", "/metrics"), ("POST", DRAIN_ROUTE)):
        assert (await slow.ask(method, path, b""))[0] == 401


async def test_one_that_drains_answers_what_it_has_and_nothing_new(slow: Slow) -> None:
    running = asyncio.create_task(slow.ask("POST", "/v1/completions"))
    await asyncio.sleep(0)
    assert await slow.ask("POST", DRAIN_ROUTE) == (200, ANY, b"1")
    status, headers, body = await slow.ask("POST", "/v1/completions")
    assert (status, headers[DRAINING.encode()]) == (503, b"1")
    assert json.loads(body)["error"]["code"] == "engine_draining"
    assert (await slow.ask("GET", "/metrics"))[0] == 200
    slow.may_answer.set()
    assert (await running)[0] == 200
    assert (await slow.ask("POST", DRAIN_ROUTE))[2] == b"0"


async def test_an_orchestrator_sees_that_it_drains(slow: Slow) -> None:
    await slow.ask("POST", DRAIN_ROUTE)
    status, headers, body = await slow.ask("GET", "/health", b"")
    assert (status, headers[DRAINING.encode()], body) == (503, b"1", b"")


async def test_one_that_is_still_verified_is_well_for_nobody_and_answers_who_has_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    monkeypatch.setenv(WAITS, "1")
    slow = Slow()
    slow.may_answer.set()
    status, headers, body = await slow.ask("GET", "/health", b"")
    assert (status, headers[VERIFYING.encode()], body) == (503, b"1", b"")
    assert (await slow.ask("POST", "/v1/completions"))[0] == 200, "its precision is read, and it is warmed up"
    assert (await slow.ask("POST", READY_ROUTE, b""))[0] == 401
    assert (await slow.ask("GET", "/health", b""))[0] == 503
    assert (await slow.ask("POST", READY_ROUTE))[0] == 200
    assert (await slow.ask("GET", "/health", b""))[0] == 200
    await slow.ask("POST", DRAIN_ROUTE)
    assert (await slow.ask("GET", "/health", b""))[0] == 503


class Says:
    """An application that answers with one status, or breaks; and what the engine's log has of requests to it."""

    def __init__(self, log: pytest.LogCaptureFixture, status: int | None) -> None:
        log.set_level("INFO", "vllm.assay")
        self._log = log
        self._status = status
        self._lock = EngineLock(self.app)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if self._status is None:
            raise ValueError
        await send({"type": "http.response.start", "status": self._status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def told(self, request_id: bytes | None, key: bytes = b"Bearer key") -> list[str]:
        async def send(message: Any) -> None:
            pass

        headers = [(b"authorization", key), *([(b"x-request-id", request_id)] if request_id else [])]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        with contextlib.suppress(ValueError):
            await self._lock(scope, None, send)  # type: ignore[arg-type]  # nobody receives
        return [record.getMessage() for record in self._log.records]


@pytest.mark.parametrize(("status", "said"), [(400, 400), (503, 503), (None, 500)])
async def test_the_engines_log_has_the_id_of_a_request_that_went_wrong(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, status: int | None, said: int
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key")
    says = Says(caplog, status)
    assert await says.told(None) == []
    assert await says.told(b"stranger", key=b"") == []
    assert await says.told(b"a\x1b[2J\xff") == [rf"request 'a\x1b[2J\xff': POST /v1/completions: {said}"]


async def test_a_request_that_is_answered_leaves_no_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty a second would be 450 MB a day."""
    monkeypatch.setenv("VLLM_API_KEY", "key")
    assert await Says(caplog, 200).told(b"abc-1") == []
