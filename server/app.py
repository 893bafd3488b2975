"""Builds the ASGI app from a `Config`: the composition root of the gateway."""

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from server.access_log import AccessLog
from server.admission import Admission
from server.certificates import Certificates
from server.config import Config
from server.engines.fleet import Fleet
from server.errors import FieldRefused, Refusal, envelope
from server.exchange import WHEN_GONE, Receive, Reply, Scope, Send
from server.gate import Gate
from server.health import OPEN_PATHS, health_router
from server.intake import Intake
from server.keys import Keys
from server.limits import Limits, limits_of
from server.logs import CURRENT
from server.meter import INTERNAL_ERROR, NO_TIER
from server.metrics import Metrics
from server.openai import PATHS, Endpoint, models_router
from server.openapi.document import Document, openapi_router
from server.record import code_of
from server.request_id import request_id_of
from server.routing import Routes
from server.standing import Standings
from server.tiers_api import tiers_router
from server.tracing.settings import TracingConfig
from server.tracing.trace import UNTRACED
from server.watch import TimeLimits

if TYPE_CHECKING:
    from server.tracing.tracing import Tracing

log = logging.getLogger("assay.app")

LONGEST_QUOTE = 200


class UnknownRoute(Refusal):
    """No such path."""

    status, code = 404, "unknown_route"


class InternalError(Refusal):
    """A mistake of the gateway itself."""

    status, type, code = 500, "server_error", INTERNAL_ERROR

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The gateway made a mistake; its log tells more under {request_id}.")


class MethodNotAllowed(Refusal):
    """The path exists, but not with this method."""

    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(f"{method} {path}: use {allowed}.")
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self._allowed}


Scrape = Callable[[], Awaitable[bytes]]
"""What /metrics answers, where this process is one of several and its own metrics are not all."""


def build_app(
    config: Config, fleet: Fleet, keys: Keys, metrics: Metrics, scrape: Scrape | None = None
) -> "Gateway":
    """The gateway in front of ``fleet``."""
    routes = Routes(fleet.pools)
    limits = limits_of(config)
    admission = Admission(fleet.pools, limits)
    standings = Standings(Certificates(config.certificates), config.budget_of)
    gate = Gate(config.gate, standings)
    for pool in fleet.pools:
        metrics.watch_gate(pool.tier.name, partial(gate.answers, pool))
        queue = admission.queue(pool)
        metrics.watch_queue(pool.tier.name, queue)
        pool.watch_queue(partial(admission.waiting, pool))
        metrics.watch_certificate(pool.tier.name, partial(standings.of, pool))
    time_limits = TimeLimits(
        first_token=config.first_token_timeout_s,
        next_token=config.token_timeout_s,
        whole=config.request_timeout_s,
        heartbeat=config.heartbeat_s,
    )
    endpoints = {
        path.path: Endpoint(
            path,
            routes,
            gate,
            admission,
            metrics,
            body_limit=int(config.body_limit_mib * (1 << 20)),
            body_timeout_s=config.body_timeout_s,
            limits=time_limits,
        )
        for path in PATHS
    }
    intake = Intake()
    return Gateway(
        _other_routes(fleet, routes, standings, gate, scrape or metrics.scrape, intake),
        endpoints,
        keys,
        metrics,
        limits,
        intake,
        tracing=_tracing(config.tracing) if config.tracing else None,
        access_log=AccessLog(endpoints) if config.access_log else None,
    )


def _tracing(settings: TracingConfig) -> "Tracing":
    from server.tracing.tracing import Tracing  # with OpenTelemetry's SDK, for which nobody else need wait

    return Tracing(settings)


def _other_routes(
    fleet: Fleet, routes: Routes, standings: Standings, gate: Gate, scrape: Scrape, intake: Intake
) -> FastAPI:
    """Everything that is not on the hot path."""
    app = FastAPI(
        title="Assay",
        version=importlib.metadata.version("assay"),
        description="One model at several precisions, behind one OpenAI-compatible API.",
        # Both pages load scripts from somebody else's server; /openapi.json is our own.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a path with one too many does not exist, and is told so in the envelope
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(models_router(routes, standings))
    app.include_router(tiers_router(fleet, routes, standings))
    app.include_router(health_router(fleet, gate, scrape, intake))
    app.include_router(openapi_router(Document(app, routes.names[0])))
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_parameter)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _refuse_ourselves)  # or it would be a plain text
    return app


class Gateway:
    """Every request gets an id and needs a key; the hot paths are reached without a framework in between.

    Every answer says the request's id, our own mistakes included.
    """

    def __init__(
        self,
        app: FastAPI,
        endpoints: dict[str, Endpoint],
        keys: Keys,
        metrics: Metrics,
        limits: Limits,
        intake: Intake,
        *,
        tracing: "Tracing | None" = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self.intake = intake
        self._app = app
        self._endpoints = endpoints
        self._keys = keys
        self._metrics = metrics
        self._limits = limits
        self._tracing = tracing
        self._access_log = access_log

    async def close(self) -> None:
        """Let go of what outlives requests, of which there are no more; send their traces, for a bounded time."""
        await self._limits.close()
        if self._tracing is not None:
            await self._tracing.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        # Taken out of the scope, which would otherwise refer to what refers to it.
        is_traced = self._tracing is not None and scope["path"] in self._endpoints
        trace = self._tracing.begin(scope) if self._tracing is not None and is_traced else UNTRACED
        reply = Reply(trace.overhears(send), scope["extensions"].pop(WHEN_GONE), request_id, trace)
        CURRENT.set(reply.record)
        if self.intake.is_ending:
            reply.headers.append((b"connection", b"close"))  # the next request is to go elsewhere
        try:
            await self._answer(scope, receive, reply)
        except Refusal as refusal:
            self._metrics.of(NO_TIER).answered(str(refusal.status), code_of(refusal))
            reply.record.refused(refusal)
            await reply.refuse(refusal)
        except Exception:
            log.exception("request %s: a mistake of the gateway", request_id)
            mistake = InternalError(request_id)
            reply.record.refused(mistake)
            if reply.status is None:
                await reply.refuse(mistake)
            elif not reply.has_ended:
                raise  # the connection is cut, which is all that can still be said
        finally:
            trace.end(reply)
            if self._access_log is not None:
                self._access_log.write(scope, reply)
            reply.record.is_over = True

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        path = scope["path"]
        key = None if path in OPEN_PATHS else self._keys.authenticate(scope["headers"])
        reply.record.key = key.name if key else None
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            scope.setdefault("state", {}).update(key=key, request_id=reply.request_id)
            await self._app(scope, receive, reply.pass_on)
        elif scope["method"] != "POST":
            raise MethodNotAllowed(scope["method"], path, "POST")
        else:
            with self.intake:
                await endpoint(scope["headers"], receive, reply, key)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return Response(envelope(error), error.status, error.headers, media_type="application/json")


async def _refuse_ourselves(request: Request, error: Exception) -> Response:
    return await _refuse(request, InternalError(request.state.request_id))


async def _refuse_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _refuse(request, FieldRefused(name, f"{name}: {first['msg']}"))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = repr(request.scope["path"][:LONGEST_QUOTE])  # safe in JSON and logs whatever it holds
    if error.status_code == 405:
        refusal: Refusal = MethodNotAllowed(request.method, path, (error.headers or {}).get("allow", "GET"))
    else:
        refusal = UnknownRoute(f"{request.method} {path}: {error.detail}.")
    return Response(envelope(refusal), refusal.status, refusal.headers, media_type="application/json")
