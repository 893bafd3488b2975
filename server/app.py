"""Builds the ASGI app from a `Config`: the composition root of the gateway."""

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.config import Config
from server.errors import Refusal, envelope
from server.fleet import Fleet
from server.forward import Message, Receive, Reply, Send
from server.health import health_router
from server.metrics import Metrics
from server.openai import Completions, models_router, request_id_of
from server.routing import Routes
from server.tiers_api import tiers_router

log = logging.getLogger("assay.app")

Scope = MutableMapping[str, Any]


class UnknownRoute(Refusal):
    """No such path, or not with this method."""


class InternalError(Refusal):
    """A mistake of the gateway itself."""

    status, type, code = 500, "server_error", "internal_error"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The gateway made a mistake; its log tells more under {request_id}.")


def build_app(config: Config, fleet: Fleet, metrics: Metrics) -> FastAPI:
    """The gateway in front of ``fleet``."""
    app = FastAPI(
        title="Assay",
        version=importlib.metadata.version("assay"),
        description="One model at several precisions, behind one OpenAI-compatible API.",
        # Both pages load scripts from somebody else's server; /openapi.json is ours.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a path with one too many does not exist, and is told so in the envelope
    )
    routes = Routes(fleet.pools)
    body_limit = int(config.body_limit_mib * (1 << 20))
    app.router.add_route(
        "/v1/chat/completions",
        Completions("/v1/chat/completions", routes, metrics, body_limit),  # type: ignore[arg-type]  # raw ASGI
        methods=["POST"],
    )
    app.include_router(models_router(routes))
    app.include_router(tiers_router(fleet, routes))
    app.include_router(health_router(fleet, metrics))
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_middleware(RequestIds)
    return app


class RequestIds:
    """Pure ASGI middleware: every request has an id, and every answer says it, our own mistakes included."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: a mistake of the gateway", request_id)
            if begun:
                raise  # the connection is cut, which is all that can still be said
            await Reply(send_with_id, []).refuse(InternalError(request_id))


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = error.headers
    return Response(envelope(error), error.status, headers, media_type="application/json")


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]  # quoted as Python does, it is safe in JSON and logs whatever it holds
    refusal = UnknownRoute(f"{request.method} {path!r}: {error.detail}.")
    return Response(envelope(refusal), error.status_code, error.headers, media_type="application/json")
