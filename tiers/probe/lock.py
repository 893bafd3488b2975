"""Closes every route of an engine to all but the holder of its key.

vLLM's own check covers /v1, /v2, /inference and /cohere only; /invocations, /tokenize, /metrics and the rest
would answer anyone on the machine. Loaded by ``--middleware``.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _holds_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)
