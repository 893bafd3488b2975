"""From tiers to their pools and replicas, none of them started: how each comes to life, and what engines share."""

import asyncio
from collections.abc import Sequence

from server.checkpoints import Checkpoints
from server.config import Config
from server.engines.following import Following, Place
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.turns import Turns, share
from server.launch.launch import Launch
from server.launch.local import LocalLaunch
from server.launch.url import UrlLaunch
from server.metrics import Metrics
from tiers.catalog import ModelShape
from tiers.engine import Backend
from tiers.manifest import Manifest
from tiers.memory import Batch
from tiers.plan import TierPlan
from tiers.tier import Tier


class Layout:
    """The replicas of one server."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        checkpoints: Checkpoints,
        *,
        takes_faults: bool = False,
        writes_down: bool = False,
    ) -> None:
        """``writes_down`` is whether others may learn where each tier's first engine answers."""
        self._config = config
        self._metrics = metrics
        self._checkpoints = checkpoints
        self._takes_faults = takes_faults
        self._writes_down = writes_down

    def started(self, plans: Sequence[TierPlan], manifests: dict[str, Manifest], backend: Backend) -> list[Pool]:
        """The tiers whose engines run on this machine."""
        engines = [engine for plan in plans for engine in plan.tier.engines()]
        turns = _turns(engines, self._config.idle_after_s)
        locks = {gpu: asyncio.Lock() for engine in engines for gpu in engine.resources.gpus}
        traces_url = self._config.tracing.traces_url if self._config.tracing else None
        launch = LocalLaunch(backend, takes_faults=self._takes_faults, traces_url=traces_url)

        def replica(plan: TierPlan, number: int, engine: Tier) -> Replica:
            return self._replica(
                engine,
                manifests[plan.name],
                plan.context_length,
                launch,
                number=number,
                of=plan.replicas,
                start_locks=_start_locks(engine, backend, locks),
                turns=turns.get((engine.name, engine.resources.gpus)),
            )

        return [
            Pool(
                plan.tier,
                manifests[plan.name],
                plan.context_length,
                [replica(plan, number, engine) for number, engine in enumerate(plan.tier.engines(), 1)],
                self._metrics,
                max_num_seqs=plan.max_num_seqs,
            )
            for plan in plans
        ]

    def followed(self, tier: Tier, manifest: Manifest, key: str) -> Following:
        """A tier whose engines somebody else runs; ``tier.checkpoint`` has its manifest and config.json."""
        context = tier.context_length or ModelShape.read(tier.checkpoint).max_position_embeddings
        numbers = iter(range(1, 1 << 31))

        def replica_at(place: Place) -> Replica:
            launch = UrlLaunch(place.url, place.address, key)
            return self._replica(tier, manifest, context, launch, number=next(numbers), at=str(place))

        # Nobody here knows their hardware: of engines that do not say it, the least is taken that vLLM works on.
        at_once = Batch.of(tier.resources, None).sequences
        pool = Pool(tier, manifest, context, (), self._metrics, max_num_seqs=at_once)
        return Following(pool, self._config.settings_of(tier).urls, replica_at)

    def _replica(
        self,
        tier: Tier,
        manifest: Manifest,
        context_length: int,
        launch: Launch,
        *,
        number: int,
        of: int = 1,
        at: str | None = None,
        start_locks: tuple[asyncio.Lock, ...] = (),
        turns: Turns | None = None,
    ) -> Replica:
        return Replica(
            tier,
            manifest,
            context_length,
            number=number,
            of=of,
            at=at,
            launch=launch,
            checkpoints=None if at else self._checkpoints,
            logs=self._config.logs,
            metrics=self._metrics,
            start_timeout_s=self._config.start_timeout_s,
            start_locks=start_locks,
            turns=turns,
            patience=self._config,
            takes_faults=self._takes_faults,
            address_file=self._config.address_of(tier) if self._writes_down and number == 1 and not at else None,
        )


def _turns(engines: Sequence[Tier], idle_after_s: float) -> dict[tuple[str, tuple[int, ...]], Turns]:
    """For those that sleep, by name and GPUs: engines that share a GPU, also through others, take turns."""
    sleepers = [engine for engine in engines if engine.resources.idle == "sleep"]
    groups = share([frozenset(engine.resources.gpus) for engine in sleepers])
    made = {group: Turns(idle_after_s) for group in set(groups)}
    return {
        (engine.name, engine.resources.gpus): made[group] for engine, group in zip(sleepers, groups, strict=True)
    }


def _start_locks(tier: Tier, backend: Backend, locks: dict[int, asyncio.Lock]) -> tuple[asyncio.Lock, ...]:
    """An engine measures free GPU memory while it starts: those that share a GPU take turns."""
    if backend == "cpu":
        return ()
    return tuple(locks[gpu] for gpu in sorted(tier.resources.gpus))
