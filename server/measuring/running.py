"""The engines that are measured: those of a server that runs from the same home, or others started for it.

A machine that serves has seldom room for the same engines again; and what callers are answered by is what is to be
measured.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.config import Config
from server.engine_key import engine_key
from server.engines.address import Address
from server.engines.engine import Engine
from server.engines.failures import EngineNotStarted, KeyRefused, PrecisionRefused
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.resolution import addresses_of
from server.model_config import TierConfig
from server.progress import Steps
from server.serve import running_engines
from tiers.catalog import ModelShape
from tiers.errors import ConfigError
from tiers.manifest import SHORT_DIGEST, Manifest
from tiers.tier import Tier, TierKind
from tiers.verification import VerifiedPrecision, verify_precision


@dataclass(frozen=True)
class Running:
    """One engine that is to be measured, and what was read back from it."""

    tier: Tier
    manifest: Manifest
    engine: Engine
    verified: VerifiedPrecision
    version: str
    """Of vLLM."""
    device_class: str | None = None
    """Of its machine, which may be another than this one."""
    _replica: Replica | None = None

    @classmethod
    def of(cls, replica: Replica) -> "Running":
        """One that was started for this."""
        assert replica.verified is not None, "an engine that was not verified was not started"
        version, device = replica.engine_version or "", replica.device_class
        replica.engine.gives_way = replica.engine.process is None  # as one that was found and not started
        return cls(replica.tier, replica.manifest, replica.engine, replica.verified, version, device, replica)

    @property
    def may_restart(self) -> bool:
        """Whether nobody but who measures it has need of it."""
        return self._replica is not None and self.engine.process is not None

    async def restarted(self) -> "Running":
        """The same in another process.

        Raises:
            EngineNotStarted: it does not come back.
        """
        assert self._replica is not None
        await self._replica.stop()
        await self._replica.start()
        return Running.of(self._replica)


@asynccontextmanager
async def engines_to_measure(config: Config, wanted: Sequence[Tier], steps: Steps) -> AsyncIterator[list[Running]]:
    """An engine of each wanted tier, and of the reference of each.

    Raises:
        AssayError: into the block; nothing is left running that was not before.
    """
    config = only(config, wanted)
    found = {tier.name: await _found(config, tier) for tier in config.tiers}
    served = {name: engine for name, engine in found.items() if engine}
    if not served:
        _refuse_sleepers(config)
        async with running_engines(config, steps) as fleet:
            yield [_started(config, pool) for pool in fleet.pools]
        return
    try:
        with steps.step(f"The engines of the server that runs from {config.home}"):
            if missing := [name for name in found if name not in served]:
                raise ConfigError(
                    f"A server runs from {config.home}, and no engine of {missing[0]} answers there: if it serves "
                    "that tier wait until it is ready, else stop the server to have engines started for this."
                )
            _refuse_sleepers(config)
            running = [await _read_back(tier, *served[tier.name]) for tier in config.tiers]
        yield running
    finally:
        for engine, _ in served.values():
            await engine.stop()


def only(config: Config, wanted: Sequence[Tier]) -> Config:
    """With the wanted tiers and their references, and one engine each, as each of them is."""
    models = []
    for model in config.models:
        kinds = {tier.kind for tier in wanted if tier.model == model.name}
        if kinds:
            tiers = {
                kind: _alone(model.tiers.get(kind, TierConfig()))
                for kind in TierKind
                if kind in kinds or kind is TierKind.REFERENCE
            }
            models.append(model.model_copy(update={"tiers": tiers}))
    return config.model_copy(update={"models": tuple(models)})


def _alone(tier: TierConfig) -> TierConfig:
    """One of its replicas: with all of the GPUs it would be spread over them, and nobody is served by that."""
    return tier.model_copy(update={"replicas": 1, "gpus": tier.gpus[: len(tier.gpus) // tier.replicas]})


def _refuse_sleepers(config: Config) -> None:
    if sleepers := [tier.name for tier in config.tiers if tier.resources.idle == "sleep"]:
        raise ConfigError(
            f"{sleepers[0]} is to sleep when it is idle, and would be sent to sleep while it is measured: certify "
            "with a config without `idle: sleep`, whose tiers have GPUs of their own, and no server running."
        )


def _started(config: Config, pool: Pool) -> Running:
    if not pool.replicas:
        raise EngineNotStarted(
            f"{pool.tier.name}: there is no engine to be measured at "
            f"{' or '.join(config.settings_of(pool.tier).urls)}: run `assay engine {pool.tier.kind}` there, or "
            "mend its urls."
        )
    replica = pool.replicas[0]
    if replica.verified is not None and not replica.verified.agrees:
        raise PrecisionRefused(replica.name, replica.verified.disagreements)
    return Running.of(replica)


async def _found(config: Config, tier: Tier) -> tuple[Engine, Address] | None:
    """An engine of that tier that runs: of a server of this home, or at one of its URLs."""
    for file in config.addresses_of(tier):
        if (reached := await _reached(tier, Address.read(file))) is not None:
            return reached
    return await _reached_by_url(config, tier)


async def _reached(tier: Tier, address: Address | None, at: str | None = None) -> tuple[Engine, Address] | None:
    """The engine at that address, of several of its URL's name at one of them.

    None if nobody is there: a server that was killed leaves its notes behind.
    """
    if address is None:
        return None
    engine = Engine(tier.name, address.url, address.key, None, gives_way=True, address=at)
    try:
        if await engine.version() is not None:
            return engine, address
    except KeyRefused:
        pass  # somebody else has the port now
    await engine.stop()
    return None


async def _reached_by_url(config: Config, tier: Tier) -> tuple[Engine, Address] | None:
    """The first engine at the tier's URLs, if it is of launch: url; None if nobody is there.

    It is one address's of a name that may have several, or what is measured would be a mixture of their engines.
    """
    urls, key = config.settings_of(tier).urls, engine_key(config.engine_key)
    for url in urls if key else ():
        for at in sorted(await _addresses(url)):
            if (reached := await _reached(tier, Address(url=url, key=key or "", checkpoint=""), at)) is not None:
                engine, address = reached
                started_on = (await engine.readings())[0].checkpoint or ""
                return engine, address.model_copy(update={"checkpoint": started_on})
    return None


async def _addresses(url: str) -> frozenset[str]:
    try:
        return await addresses_of(url)
    except OSError:
        return frozenset()  # as if nobody were there


async def _read_back(tier: Tier, engine: Engine, address: Address) -> Running:
    manifest, shape = Manifest.read(tier.checkpoint), ModelShape.read(tier.checkpoint)
    if manifest.digest != address.checkpoint:
        raise ConfigError(
            f"The server that runs has loaded {tier.name} from checkpoint {address.checkpoint[:SHORT_DIGEST]}, "
            f"and in {tier.checkpoint} is {manifest.short_digest}: use the server's config, or start it anew."
        )
    readings = await engine.readings()
    verified = verify_precision(manifest.precision, readings, shape)
    if not verified.agrees:
        raise PrecisionRefused(tier.name, verified.disagreements)
    version = await engine.version()
    if version is None:
        raise EngineNotStarted(f"{tier.name}: the engine of the server that runs is gone.")
    return Running(tier, manifest, engine, verified, version, readings[0].device_class)
