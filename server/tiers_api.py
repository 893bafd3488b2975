"""GET /v1/tiers and below: what each tier declares, what was verified, its certificate, and how it fares."""

from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter, Response
from pydantic import BaseModel

from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.errors import Refusal
from server.routing import Routes
from server.standing import Outcome, Standing, Standings
from tiers.conformance.findings import Estimate
from tiers.conformance.scores import Phase
from tiers.manifest import Calibration
from tiers.precision import Precision, PrecisionName
from tiers.source import Source
from tiers.verification import VerifiedPrecision

CERTIFICATE_SCHEMA: Final = "Certificate"
"""Its name in the OpenAPI document."""
_A_CERTIFICATE: dict[str, Any] = {
    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{CERTIFICATE_SCHEMA}"}}}
}


class NoCertificate(Refusal):
    """Nobody has measured the tier yet."""

    status, code, param = 404, "no_certificate", "model"

    def __init__(self, tier: str) -> None:
        super().__init__(f"{tier} has no certificate: `assay certify` measures it and makes one.")


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
    def of(cls, pool: Pool, replica: Replica) -> "ReplicaInfo":
        """What is known of it now."""
        state = pool.service.shown(replica)
        return cls(state=state.value, restarts=replica.restarts, verified=replica.verified)


class CertificateInfo(BaseModel):
    """What the tier's certificate says, in short; the whole is at /v1/tiers/{model}/certificate."""

    verdict: Outcome
    """As `x-assay-certificate` has it: none where it says nothing of the tier as it runs now."""
    reasons: list[str]
    """Why that is not pass, in sentences."""
    digest: str
    """SHA-256 of the certificate as this server gives it."""
    issued: datetime
    exact: bool
    """Whether divergences are of the whole vocabulary; otherwise they are lower bounds."""
    kl: dict[Phase, Estimate]
    """Mean KL divergence from the reference, nats per token, with its 95% interval."""

    @classmethod
    def of(cls, standing: Standing) -> "CertificateInfo | None":
        """Of a tier that stands so."""
        if (certificate := standing.certificate) is None:
            return None
        findings = certificate.predicate.findings
        return cls(
            verdict=standing.verdict,
            reasons=list(standing.reasons),
            digest=certificate.digest,
            issued=certificate.predicate.issued,
            exact=findings.exact,
            kl={phase: found.overall.kl for phase, found in findings.phases.items()},
        )


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
    certificate: CertificateInfo | None
    """How far it was found to be from the reference; null where nobody has measured it."""
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
    def of(cls, pool: Pool, standing: Standing) -> "TierInfo":
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
            certificate=CertificateInfo.of(standing),
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
            replicas=[ReplicaInfo.of(pool, replica) for replica in pool.replicas],
        )


class TierList(BaseModel):
    """All tiers of a running server."""

    object: str = "list"
    data: list[TierInfo]


def tiers_router(fleet: Fleet, routes: Routes, standings: Standings) -> APIRouter:
    """The routes that auditors and `assay tiers` read."""
    router = APIRouter(tags=["tiers"])

    def tier_of(pool: Pool) -> TierInfo:
        return TierInfo.of(pool, standings.of(pool))

    @router.get("/v1/tiers")
    async def list_tiers() -> TierList:
        """What every tier declares, what was verified of it, its certificate in short, and how it fares.

        Whichever of them the caller's key may use: a proof is for everybody.
        """
        return TierList(data=[tier_of(pool) for pool in fleet.pools])

    # Before the next, which would take the end of its path for that of a name.
    @router.get("/v1/tiers/{model:path}/certificate", responses={200: _A_CERTIFICATE})
    async def get_certificate(model: str) -> Response:
        """The certificate of one of them, an in-toto Statement: how far it was found to be from the reference.

        Byte for byte what its digest is of. It may speak of another checkpoint or engine than runs now; whether
        it holds is told by `GET /v1/tiers/{model}`.
        """
        pool = routes.resolve(model)
        if (certificate := standings.of(pool).certificate) is None:
            raise NoCertificate(pool.tier.name)
        return Response(certificate.canonical, media_type="application/json")

    @router.get("/v1/tiers/{model:path}")
    async def get_tier(model: str) -> TierInfo:
        """One of them, by any of its names."""
        return tier_of(routes.resolve(model))

    return router
