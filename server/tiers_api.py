"""GET /v1/tiers and /v1/tiers/{model}: what each tier declares, what was verified, and how it fares."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel

from server.fleet import Fleet
from server.replica import Replica
from server.routing import Routes
from tiers.manifest import Calibration
from tiers.precision import Precision, PrecisionName
from tiers.source import Source
from tiers.verification import VerifiedPrecision


class RecipeInfo(BaseModel):
    """How the weights were made; ``text`` is what llm-compressor was given, empty for the reference."""

    name: str
    summary: str
    text: str


class CheckpointInfo(BaseModel):
    """What the engine has loaded, from its manifest."""

    digest: str
    size_bytes: int
    bits_per_weight: float
    created: datetime
    source: Source
    provenance: str
    revision: str | None
    reference: str | None
    calibration: Calibration | None
    seed: int
    versions: dict[str, str]


class EngineInfo(BaseModel):
    """What runs the tier, as it says itself."""

    name: str = "vllm"
    version: str | None


class TierInfo(BaseModel):
    """One tier of a running server."""

    id: str
    object: str = "tier"
    names: list[str]
    model: str
    tier: str
    precision: PrecisionName
    declared: Precision
    """What the checkpoint's manifest promises."""
    verified: VerifiedPrecision | None
    """What was read back from the running engine, layer by layer; null until it has been."""
    recipe: RecipeInfo
    checkpoint: CheckpointInfo
    context_length: int
    engine: EngineInfo
    state: str
    restarts: int

    @classmethod
    def of(cls, replica: Replica) -> "TierInfo":
        """What is known of the replica's tier now."""
        tier, manifest = replica.tier, replica.manifest
        return cls(
            id=tier.name,
            names=list(tier.names),
            model=tier.model,
            tier=tier.kind,
            precision=manifest.precision.name,
            declared=manifest.precision,
            verified=replica.verified,
            recipe=RecipeInfo(name=manifest.recipe, summary=tier.recipe.summary, text=manifest.recipe_text),
            checkpoint=CheckpointInfo(
                digest=manifest.digest,
                size_bytes=manifest.size,
                bits_per_weight=manifest.bits_per_weight,
                created=manifest.created,
                source=manifest.source,
                provenance=manifest.provenance,
                revision=manifest.revision,
                reference=manifest.reference,
                calibration=manifest.calibration,
                seed=manifest.seed,
                versions=manifest.versions,
            ),
            context_length=replica.context_length,
            engine=EngineInfo(version=replica.engine_version),
            state=replica.state.value,
            restarts=replica.restarts,
        )


class TierList(BaseModel):
    """All tiers of a running server."""

    object: str = "list"
    data: list[TierInfo]


def tiers_router(fleet: Fleet, routes: Routes) -> APIRouter:
    """The routes that auditors and `assay tiers` read."""
    router = APIRouter(tags=["tiers"])

    @router.get("/v1/tiers")
    async def list_tiers() -> TierList:
        return TierList(data=[TierInfo.of(replica) for replica in fleet.replicas])

    @router.get("/v1/tiers/{model:path}")
    async def get_tier(model: str) -> TierInfo:
        return TierInfo.of(routes.resolve(model))

    return router
