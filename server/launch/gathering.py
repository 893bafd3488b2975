"""The nodes of a Ray cluster that one engine goes over: found, waited for, and left. Knows no processes."""

import asyncio
import logging
import time
from dataclasses import dataclass

from server.launch.cluster import Cluster, RayConfig
from server.launch.over_nodes import OverNodes
from tiers.bundles import on_cluster
from tiers.errors import ConfigError, PlacementError
from tiers.hardware import Machine
from tiers.plan import TierPlan
from tiers.tier import Tier

log = logging.getLogger("assay.gathering")

LOOK_AGAIN_S = 5.0
"""Between two looks at a cluster whose nodes are not all there."""


@dataclass(frozen=True)
class Gathering:
    """Nodes that are enough together. What is set aside on them for the engine, vLLM sets aside itself."""

    nodes: tuple[Machine, ...]
    over: OverNodes

    @classmethod
    async def of(cls, tier: Tier, settings: RayConfig, here: Machine) -> "Gathering":
        """Find a cluster from ``here``, one of its nodes, and wait until there are nodes enough for the tier.

        Raises:
            ConfigError: there is no such cluster, or a node that does not run Assay.
            PlacementError: there have not been enough within ``room_timeout_s``.
        """
        try:
            cluster = await Cluster.join(settings, "cuda")
        except ConfigError as error:
            raise ConfigError(
                f"{tier.name} takes {len(tier.resources.gpus)} GPUs, this machine has {len(here.gpus)}, and the "
                f"others would be of a Ray cluster's nodes. {error}"
            ) from error
        try:
            nodes = await _enough(tier, cluster)
            return cls(nodes, OverNodes(cluster.gcs_address, cluster.here, len(here.gpus)))
        finally:
            await cluster.leave()  # vLLM joins it itself

    def plan(self, tier: Tier) -> TierPlan:
        """What the engine takes of them.

        Raises:
            PlacementError: it does not fit on their GPUs.
        """
        plan = on_cluster(tier, self.nodes)
        if plan.problem:
            raise PlacementError(plan.sentence)
        return plan


def spills_over(tier: Tier, here: Machine) -> bool:
    """Whether an engine in stages has more GPUs than this machine, so that some must be on other nodes."""
    resources = tier.resources
    return here.backend == "cuda" and resources.pipeline_parallel > 1 and len(resources.gpus) > len(here.gpus)


async def _enough(tier: Tier, cluster: Cluster) -> tuple[Machine, ...]:
    """The cluster's nodes, once the tier has room on them; a worker may join long after its head."""
    timeout_s, said = cluster.settings.room_timeout_s, ""
    until = time.monotonic() + timeout_s
    while True:
        try:
            nodes = await cluster.look()
            on_cluster(tier, nodes)
        except (ConfigError, PlacementError) as error:  # a node may also have been lost as it was asked
            if time.monotonic() > until:
                raise
            if str(error) != said:
                log.warning("%s Looking again for %.0f s at most.", error, timeout_s)
            said = str(error)
        else:
            return tuple(nodes)
        await asyncio.sleep(LOOK_AGAIN_S)
