"""Holds what an engine says of itself against the checkpoint that it is to run: which it is, what it computes."""

from server.engines.engine import Engine
from server.engines.failures import OtherCheckpoint
from tiers.catalog import ModelShape
from tiers.manifest import Manifest
from tiers.tier import Tier
from tiers.verification import VerifiedPrecision, verify_precision


async def read_back(
    engine: Engine, tier: Tier, manifest: Manifest, *, takes_faults: bool = False
) -> tuple[VerifiedPrecision, str | None]:
    """What was found, whether or not it agrees; and the class of the device that it was found on.

    Raises:
        EngineNotStarted: it does not say.
        OtherCheckpoint: it says that it was started on another one.
    """
    shape, readings = ModelShape.read(tier.checkpoint), await engine.readings()
    for reading in readings:
        if reading.checkpoint != manifest.digest:
            raise OtherCheckpoint(engine.name, engine.url, reading.checkpoint, manifest.digest)
    verified = verify_precision(manifest.precision, readings, shape, takes_faults=takes_faults)
    return verified, readings[0].device_class
