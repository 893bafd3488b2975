"""Closes every route of an engine to all but the holder of its key, and notes whom it lets in.

vLLM's own check covers /v1, /v2, /inference and /cohere only; /invocations, /tokenize, /metrics and the rest
would answer anyone on the machine. Loaded by ``--middleware``. One route stays open, ``GET /health``, which says
200 or 503 and no more: it is what an orchestrator asks, whose probes cannot show a secret. vLLM's own says 200 as
soon as the model is loaded; where `assay engine` is to read back first what that computes, it is 503 until then.

The note is the id of a request that went wrong, in the engine's log beside what vLLM says of it; the gateway's log
and the caller know it by that too. A line for each request would be hundreds of megabytes a day. vLLM's
``--enable-request-id-headers`` is about answers only, and its ``--enable-log-requests`` would write what callers
sent with it: stop strings, JSON schemas.

Whoever lets in can also let nobody in: an engine that is told to drain refuses further requests, says so in a
header by which gateways know it at once, and counts those that still run to the last byte of their answers, which
vLLM's own counts do not.
"""

import hashlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tiers.probe.reading import DRAIN_ROUTE, DRAINING, READY_ROUTE, VERIFYING, WAITS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("vllm.assay")
"""Below vLLM's own, whose handlers write the engine's log."""

_BODY = b'{"error":{"message":"This engine answers its gateway only.","type":"invalid_request_error",' \
        b'"param":null,"code":"invalid_api_key"}}'  # fmt: skip
_DRAINING_BODY = b'{"error":{"message":"This engine is about to end and takes no further request.",' \
                 b'"type":"server_error","param":null,"code":"engine_draining"}}'  # fmt: skip
_DRAINS = (DRAINING.encode(), b"1")
_VERIFIES = (VERIFYING.encode(), b"1")
_WRONG = 400
_OWN = "/assay/"
"""What the gateway and the engine have to say to each other; no work for callers."""


class EngineLock:
    """Pure ASGI middleware: the bearer token must equal ``VLLM_API_KEY``, whatever the path or method.

    Raises:
        RuntimeError: at start, if there is no key; an engine without one must not run.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set: an engine of Assay never runs open.")
        self._app = app
        self._expected = hashlib.sha256(b"Bearer " + key.encode()).digest()
        self._running = 0
        self._drains = False
        self._verifies = os.environ.get(WAITS) == "1"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", "/health"):
            if self._drains or self._verifies:
                await _answer(send, 503, b"", _DRAINS if self._drains else _VERIFIES)
            else:
                await self._app(scope, receive, send)
        elif not self._holds_key(scope):
            await _refuse(scope, send)
        elif scope["type"] == "http":
            await self._noted(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _noted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it in, and log which request it was if it is refused or breaks."""
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._let_in(scope, receive, noting)
        except Exception:
            status = 500  # as whoever stands around this will answer
            raise
        finally:
            if status >= _WRONG and (request_id := _header(scope, b"x-request-id")):
                told = request_id.decode("latin-1")
                log.info("request %a: %s %s: %d", told, scope["method"], scope["path"], status)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_work = scope["method"] == "POST" and not scope["path"].startswith(_OWN)
        if scope["method"] == "POST" and scope["path"] == DRAIN_ROUTE:
            self._drains = True
            await _answer(send, 200, b"%d" % self._running, _DRAINS)
        elif scope["method"] == "POST" and scope["path"] == READY_ROUTE:
            self._verifies = False
            await _answer(send, 200, b"")
        elif is_work and self._drains:
            await _answer(send, 503, _DRAINING_BODY, _DRAINS)
        elif is_work:
            self._running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running -= 1
        else:
            await self._app(scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization")
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "http":
        await _answer(send, 401, _BODY)
    else:
        await send({"type": "websocket.close", "code": 1008})


async def _answer(send: Send, status: int, body: bytes, *further: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *further]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope.get("headers", ()) if key == name), b"")
