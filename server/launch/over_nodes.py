"""What an engine has besides whose workers are on several nodes of a Ray cluster. Knows nothing of Ray itself."""

from dataclasses import dataclass, replace

from tiers.engine import gpu_environment
from tiers.probe.group import GROUP
from tiers.tier import Tier


@dataclass(frozen=True)
class OverNodes:
    """The cluster over whose nodes a process of this one puts its workers."""

    gcs_address: str
    """Where its nodes meet, as host:port."""
    node: str
    """This node's own address in it."""
    gpus: int
    """How many this node has: what the process itself may see of those that the tier counts over all nodes."""

    def environment(self, tier: Tier) -> dict[str, str]:
        """What to lay over the environment that the engine would have alone."""
        own = tuple(gpu for gpu in tier.resources.gpus if gpu < self.gpus)
        here = replace(tier, resources=tier.resources.model_copy(update={"gpus": own}))
        return gpu_environment(here) | over_nodes_environment(self.gcs_address, self.node)


def over_nodes_environment(gcs_address: str, node: str, group: str | None = None) -> dict[str, str]:
    """By what vLLM finds the cluster, and its workers on other nodes find vLLM.

    Args:
        gcs_address: where the cluster's nodes meet.
        node: the address of the node that the engine's first process is on.
        group: the placement group that was made for it, by its name in Ray; vLLM makes its own without one, which
            goes with the engine.
    """
    environment = {"RAY_ADDRESS": gcs_address, "RAY_USAGE_STATS_ENABLED": "0", "VLLM_HOST_IP": node}
    return environment if group is None else environment | {GROUP: group}
