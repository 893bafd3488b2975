"""The OpenAI-compatible API: /v1/chat/completions and /v1/models."""

import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET
from pydantic import BaseModel

from server.errors import Refusal
from server.forward import (
    ClientLeft,
    Headers,
    Receive,
    Reply,
    Send,
    forward,
    parse_call,
    read_body,
    while_client_stays,
    without_pin,
)
from server.metrics import NO_TIER, Metrics
from server.pool import Pool
from server.routing import Routes

CLIENT_CLOSED_REQUEST = "499"
"""Nobody gets this status; it is how the metrics tell callers who left, after nginx's custom."""


class Completions:
    """Raw ASGI, the hot path: one tier chosen by the body's ``model``, its engine's bytes straight back."""

    def __init__(self, path: str, routes: Routes, metrics: Metrics, body_limit: int) -> None:
        self._path = path
        self._routes = routes
        self._metrics = metrics
        self._body_limit = body_limit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        began = time.monotonic()
        reply = Reply(send, [])
        tier = NO_TIER
        left = False
        try:
            body = await read_body(receive, self._body_limit)
            call = parse_call(body)
            pool = self._routes.resolve(call.model)
            tier = pool.tier.name
            if call.precision is not UNSET:
                self._routes.check_pin(pool, call.precision)
                body = without_pin(body)
            reply.headers += tier_headers(pool)
            request_id = scope["state"]["request_id"]
            work = forward(self._path, body, pool.pick(), reply, request_id, self._metrics)
            await while_client_stays(receive, work)
        except Refusal as refusal:
            await reply.refuse(refusal)
        except ClientLeft:
            left = True
            self._metrics.left.labels(tier).inc()
        finally:
            status = CLIENT_CLOSED_REQUEST if left else str(reply.status or 500)
            self._metrics.requests.labels(tier, status).inc()
            self._metrics.duration.labels(tier).observe(time.monotonic() - began)
            if reply.status == 200 and reply.body_began is not None:
                self._metrics.first_byte.labels(tier).observe(reply.body_began - began)


def tier_headers(pool: Pool) -> Headers:
    """The headers that say what answered."""
    manifest = pool.manifest
    return [
        (b"x-assay-tier", pool.tier.kind.value.encode()),
        (b"x-assay-precision", manifest.precision.name.encode()),
        (b"x-assay-checkpoint", manifest.short_digest.encode()),
    ]


class Model(BaseModel):
    """One name that callers may use; the first four fields are OpenAI's."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "assay"
    tier: str
    precision: str
    checkpoint: str
    context_length: int

    @classmethod
    def of(cls, name: str, pool: Pool) -> "Model":
        """The entry of ``name``, which the tier answers to."""
        return cls(
            id=name,
            created=int(pool.manifest.created.timestamp()),
            tier=pool.tier.kind,
            precision=pool.manifest.precision.name,
            checkpoint=pool.manifest.short_digest,
            context_length=pool.context_length,
        )


class ModelList(BaseModel):
    """All names that callers may use."""

    object: str = "list"
    data: list[Model]


def models_router(routes: Routes) -> APIRouter:
    """GET /v1/models and /v1/models/{id}."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[Model.of(name, routes.resolve(name)) for name in routes.names])

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Model:
        return Model.of(model, routes.resolve(model))

    return router


_UNSAFE = re.compile(r"[^\w.:@-]")
_LONGEST_REQUEST_ID = 128


def request_id_of(headers: Headers) -> str:
    """The caller's own ``x-request-id``, with only harmless characters and bounded, or a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    cleaned = _UNSAFE.sub("", given.decode("ascii", errors="ignore"))[:_LONGEST_REQUEST_ID]
    return cleaned or f"req-{secrets.token_hex(12)}"
