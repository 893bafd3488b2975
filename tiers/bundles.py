"""What one replica takes of a Ray cluster, and whether a cluster's nodes have it. Knows nothing of Ray itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from tiers.engine import OVER_NODES_ON_CPUS
from tiers.errors import PlacementError
from tiers.hardware import Machine
from tiers.memory import Degree
from tiers.plan import USABLE_GPU_MEMORY, TierPlan, in_ram, on_gpus
from tiers.tier import Tier


@dataclass(frozen=True)
class Bundles:
    """What Ray is to set aside for one replica; the engine's first process lives in the first bundle."""

    each: tuple[Mapping[str, float], ...]
    strategy: Literal["STRICT_PACK", "PACK"]
    """On one node whatever happens, or on as few as can be."""

    @classmethod
    def of(cls, plan: TierPlan, nodes: Sequence[Machine]) -> "Bundles":
        """Those of a plan that `on_cluster` has made for these nodes.

        On CPUs an engine takes `cpus` and the memory of its plan, so that Ray puts no more engines on a node than
        it holds. A whole engine is one bundle, which Ray cannot tear apart; over several nodes each GPU is one of
        its own, as vLLM's executor wants it.
        """
        cpus = plan.tier.resources.cpus
        if not plan.gpus:
            return cls(({"CPU": cpus, "memory": plan.per_device.fixed + plan.kv_cache_bytes},), "STRICT_PACK")
        if plan.gpus <= _most_gpus(nodes):
            return cls(({"CPU": cpus, "GPU": plan.gpus},), "STRICT_PACK")
        return cls(({"CPU": cpus, "GPU": 1}, *({"GPU": 1},) * (plan.gpus - 1)), "PACK")

    @property
    def over_nodes(self) -> bool:
        """Whether its GPUs are on several nodes."""
        return len(self.each) > 1

    def __str__(self) -> str:
        """For people: ``1 CPU and 3.1 GiB of memory``, ``16 GPUs``."""
        total = {name: sum(bundle.get(name, 0) for bundle in self.each) for name in ("GPU", "CPU")}
        parts = [f"{count:.0f} {name}{'s' * (count > 1)}" for name, count in total.items() if count]
        if memory := self.each[0].get("memory"):
            parts.append(f"{memory / (1 << 30):.1f} GiB of memory")
        return " and ".join(parts)


def on_cluster(tier: Tier, nodes: Sequence[Machine]) -> TierPlan:
    """One replica of the tier on the node that has most, or over several.

    A stage of a pipeline, over whose GPUs each layer is spread, stays inside a node.

    Raises:
        PlacementError: its GPUs are on no node, nor on several together.
    """
    resources = tier.resources
    if not _most_gpus(nodes):
        if resources.pipeline_parallel > 1:
            raise PlacementError(OVER_NODES_ON_CPUS.format(tier.name))
        return in_ram(tier, max((node.ram for node in nodes), default=0), alone=False)
    whole = replace(
        tier,
        resources=resources.model_copy(update={"gpu_memory": resources.gpu_memory or USABLE_GPU_MEMORY}),
    )
    degree = Degree(resources.tensor_parallel, resources.pipeline_parallel)
    largest = max(nodes, key=lambda node: len(node.gpus))
    if degree.gpus > len(largest.gpus):
        _check_stages(tier, degree, nodes)
    return on_gpus(whole, largest.gpus, degree)


def _check_stages(tier: Tier, degree: Degree, nodes: Sequence[Machine]) -> None:
    most = _most_gpus(nodes)
    if degree.tensor > most:
        raise PlacementError(
            f"{tier.name}: each layer is spread over {degree.tensor} GPUs, and no node has more than {most}: cut "
            "the layers into stages of at most so many with pipeline_parallel."
        )
    stages = sum(len(node.gpus) // degree.tensor for node in nodes)
    if stages < degree.pipeline:
        needed = ceil(degree.pipeline / (most // degree.tensor))
        raise PlacementError(
            f"{tier.name}: {degree.pipeline} stages of {degree.tensor} GPUs take {needed} nodes of {most}, and "
            f"these {len(nodes)} have room for {stages}: add nodes."
        )


def _most_gpus(nodes: Sequence[Machine]) -> int:
    return max((len(node.gpus) for node in nodes), default=0)
