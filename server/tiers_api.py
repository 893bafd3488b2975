"""GET /v1/tiers and /v1/tiers/{model}: what each tier declares, what was verified, and how it fares."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel

from server.fleet import Fleet
from server.pool import Pool
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


class ReplicaInfo(BaseModel):
    """One of the tier's engines."""

    state: str
    restarts: int
    verified: VerifiedPrecision | None
    """What was read back from this one; null until it has been."""

    @classmethod
    def of(cls, replica: Replica) -> "ReplicaInfo":
        """What is known of it now."""
        return cls(state=replica.state.value, restarts=replica.restarts, verified=replica.verified)


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
    """What was read back from a running engine, layer by layer; null until it has been. With several replicas that
    of the first one that disagrees with what is declared, or else of the first."""
    recipe: RecipeInfo
    checkpoint: CheckpointInfo
    context_length: int
    engine: EngineInfo
    state: str
    """That of the replica which could answer soonest."""
    restarts: int
    """Of all replicas together."""
    replicas: list[ReplicaInfo]

    @classmethod
    def of(cls, pool: Pool) -> "TierInfo":
        """What is known of the tier now."""
        tier, manifest = pool.tier, pool.manifest
        return cls(
            id=tier.name,
            names=list(tier.names),
            model=tier.model,
            tier=tier.kind,
            precision=manifest.precision.name,
            declared=manifest.precision,
            verified=pool.verified,
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
            context_length=pool.context_length,
            engine=EngineInfo(version=pool.engine_version),
            state=pool.state.value,
            restarts=pool.restarts,
            replicas=[ReplicaInfo.of(replica) for replica in pool.replicas],
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
        """What every tier declares, what was verified of it, and how it fares.

        Whichever of them the caller's key may use: a proof is for everybody.
        """
        return TierList(data=[TierInfo.of(pool) for pool in fleet.pools])

    @router.get("/v1/tiers/{model:path}")
    async def get_tier(model: str) -> TierInfo:
        """One of them, by any of its names."""
        return TierInfo.of(routes.resolve(model))

    return router
