"""Closes every route of an engine to all but the holder of its key, and notes whom it lets in.

vLLM's own check covers /v1, /v2, /inference and /cohere only; /invocations, /tokenize, /metrics and the rest
would answer anyone on the machine. Loaded by ``--middleware``.

The note is the request's id in the engine's log, under which the gateway's log and the caller know it too. vLLM's
``--enable-request-id-headers`` is about answers only, and its ``--enable-log-requests`` would write what callers
sent with it: stop strings, JSON schemas.
"""

import hashlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("vllm.assay")
"""Below vLLM's own, whose handlers write the engine's log."""

_BODY = b'{"error":{"message":"This engine answers its gateway only.","type":"invalid_request_error",' \
        b'"param":null,"code":"invalid_api_key"}}'  # fmt: skip


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._holds_key(scope):
            if scope["type"] == "http" and (request_id := _header(scope, b"x-request-id")):
                log.info("request %a: %s %s", request_id.decode("latin-1"), scope["method"], scope["path"])
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _holds_key(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization")
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope.get("headers", ()) if key == name), b"")
