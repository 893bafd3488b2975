"""/healthz, /readyz and /metrics: what an orchestrator and Prometheus ask."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.gate import Gate
from server.intake import Intake

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})
"""What needs no key: who asks it is an orchestrator, and it tells of no request."""
NOT_CERTIFIED = "not certified"
"""The state of a tier that its gate refuses, and no engine's."""


class Health(BaseModel):
    """The process lives."""

    status: str = "ok"


class Readiness(BaseModel):
    """Whether requests should be sent here, and the state of each tier."""

    ready: bool
    tiers: dict[str, str]


def health_router(
    fleet: Fleet, gate: Gate, exposition: Callable[[], Awaitable[bytes]], intake: Intake
) -> APIRouter:
    """The routes of a server's health; ``exposition`` has what /metrics answers."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> Health:
        """Whether the process lives."""
        return Health()

    @router.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(
        response: Response,
        some: Annotated[
            bool,
            Query(
                description="Whether it is enough that one tier answers, for who asks whether this server is of "
                "any use."
            ),
        ] = False,
    ) -> Readiness:
        """Which tiers answer; 503 until all do that are in service, and once the server stops."""
        answer = {pool: gate.answers(pool) for pool in fleet.pools}
        wanted = [pool for pool in fleet.pools if not pool.service.closed]
        enough = any if some else all
        accepted = bool(wanted) and enough(answer[pool] or pool.service.is_paused for pool in wanted)
        ready = accepted and not intake.is_ending
        if not ready:
            response.status_code = 503
        states = {pool.tier.name: _state(pool, answers) for pool, answers in answer.items()}
        return Readiness(ready=ready, tiers=states)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """All series, in Prometheus' text format."""
        return Response(await exposition(), media_type=CONTENT_TYPE_LATEST)

    return router


def _state(pool: Pool, answers: bool) -> str:
    """How its engines are; of a tier whose engines could answer and are not let, why."""
    return NOT_CERTIFIED if pool.can_answer and not answers else pool.state.value
