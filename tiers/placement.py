"""Where engines go: all tiers of a config together on one machine, or one tier with a machine to itself.

`place` is what `assay serve` obeys; `together` and `alone` are what `assay plan` shows. What does not fit carries
the reason and what would.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from tiers.bundles import on_cluster
from tiers.errors import PlacementError
from tiers.hardware import CARDS, GIB, NODE_GPUS, Machine
from tiers.memory import Degree
from tiers.plan import USABLE_GPU_MEMORY, TierPlan, in_ram, indivisible, on_gpus, shape_of, unsuitable
from tiers.recipe import find_recipe
from tiers.tier import Tier, TierKind

MOST_NODES = 4
"""As far as a remedy goes."""
CONTEXT_STEP = 1024


class Plan(BaseModel):
    """What each tier takes of a machine, and a sentence for all that does not fit."""

    model_config = ConfigDict(frozen=True)

    machine: str
    tiers: tuple[TierPlan, ...]
    problems: tuple[str, ...]


def place(
    tiers: tuple[Tier, ...], machine: Machine, cluster: Sequence[Machine] | None = None
) -> tuple[TierPlan, ...]:
    """The tiers with their share of the machine, if all of them fit on it together; on Ray, of a cluster's nodes.

    Raises:
        PlacementError: with what is needed, what there is, and what to change.
        SourceError: a checkpoint is not the model that it is named after.
    """
    plan = together(tiers, machine, cluster)
    if plan.problems:
        raise PlacementError(plan.problems[0])
    return plan.tiers


def check_hardware(tiers: Sequence[Tier], machine: Machine) -> None:
    """Whether this machine computes what the tiers' recipes promise, asked before they are built.

    Raises:
        PlacementError: names the tier, the recipe and the reason.
    """
    for tier in tiers:
        if reason := unsuitable(tier, machine.gpus):
            raise PlacementError(f"{tier.name}: {reason}")


def together(tiers: tuple[Tier, ...], machine: Machine, cluster: Sequence[Machine] | None = None) -> Plan:
    """All tiers at once, each on what the config gives it.

    Args:
        tiers: all.
        machine: where those go that are started here.
        cluster: the nodes where those go that are on Ray; such as this machine by default.

    Raises:
        PlacementError: a GPU does not exist, is given away more than once over, or is one too few.
        SourceError: a checkpoint is not the model that it is named after.
    """
    nodes = (machine,) * machine.nodes if cluster is None else cluster
    there = {tier.name: on_cluster(tier, nodes) for tier in tiers if _is_on_ray(tier)}
    plans = _here(tuple(tier for tier in tiers if tier.name not in there), machine)
    problem = too_much_ram(plans, machine)
    here = {plan.name: plan for plan in plans}
    return _summed_up([there.get(tier.name) or here[tier.name] for tier in tiers], machine, problem)


def _is_on_ray(tier: Tier) -> bool:
    return tier.resources.launch == "ray"


def _here(tiers: tuple[Tier, ...], machine: Machine) -> Sequence[TierPlan]:
    """Those whose engines share this machine."""
    if machine.backend == "cpu":
        plans = [in_ram(tier, machine.ram, alone=False) for tier in tiers]
    else:
        plans = []
        for tier in share_gpus(tiers, machine):
            if (count := len(tier.resources.gpus)) % tier.resources.replicas:
                raise PlacementError(
                    f"{tier.name}: {tier.resources.replicas} replicas need as many gpus or a multiple, and gpus "
                    f"names {count}: each engine has GPUs of its own."
                )
            degree = Degree(tier.resources.tensor_parallel, tier.resources.pipeline_parallel)
            plans.append(on_gpus(tier, [machine.gpus[gpu] for gpu in tier.resources.gpus], degree))
    return plans


def alone(tiers: tuple[Tier, ...], machine: Machine) -> Plan:
    """Each tier with the machine to itself, on the fewest GPUs that hold one request of full length.

    Raises:
        PlacementError: there is no GPU.
        SourceError: a checkpoint is not the model that it is named after.
    """
    return _summed_up([_alone(tier, machine) for tier in tiers], machine)


def _summed_up(plans: Sequence[TierPlan], machine: Machine, problem: str | None = None) -> Plan:
    advised = tuple(_advised(plan, machine) for plan in plans)
    problems = ([problem] if problem else []) + [plan.sentence for plan in advised if plan.problem]
    return Plan(machine=str(machine), tiers=advised, problems=tuple(problems))


def too_much_ram(plans: Sequence[TierPlan], machine: Machine) -> str | None:
    """The sentence for engines that need more RAM than a machine without GPUs has; None if they fit."""
    needed = sum(plan.replicas * (plan.per_device.fixed + plan.kv_cache_bytes) for plan in plans)
    if machine.backend == "cuda" or needed <= machine.ram:
        return None
    engines = sum(plan.replicas for plan in plans)
    fewer = "tiers or replicas" if engines > len(plans) else "tiers"
    return (
        f"{engines} engine{'s need' if engines > 1 else ' needs'} {needed / GIB:.1f} GiB of memory and "
        f"{machine.ram / GIB:.1f} GiB are free: serve fewer {fewer}, lower kv_cache_gib, or free memory."
    )


def _alone(tier: Tier, machine: Machine) -> TierPlan:
    """The first plan of one engine that fits, or the largest one there is."""
    one = replace(tier, resources=tier.resources.model_copy(update={"replicas": 1}))
    if machine.backend == "cpu":
        return in_ram(one, machine.ram, alone=True)
    if not machine.gpus:
        raise PlacementError(f"{tier.name}: there is no GPU here; name a card with --gpu.")
    free = replace(one, resources=one.resources.model_copy(update={"gpu_memory": None}))
    plans = (on_gpus(free, machine.gpus, degree) for degree in _degrees(tier, machine))
    plan = next(plans)
    for larger in plans:
        if plan.problem is None:
            break
        plan = larger
    return plan


def _degrees(tier: Tier, machine: Machine) -> Iterator[Degree]:
    """From the fewest GPUs: powers of two within a node, then a pipeline over whole nodes."""
    shape, tensor = shape_of(tier), 1
    possible = [tensor]
    while (tensor := tensor * 2) <= len(machine.gpus):
        if shape is None or not indivisible(tier, shape, tensor):
            possible.append(tensor)
    yield from (Degree(tensor) for tensor in possible)
    yield from (Degree(possible[-1], nodes) for nodes in range(2, machine.nodes + 1))


def _advised(plan: TierPlan, machine: Machine) -> TierPlan:
    """The plan with what would fit instead, if it does not."""
    if not plan.wants_more:
        return plan
    return plan.model_copy(update={"remedies": tuple(_remedies(plan, machine))})


def _remedies(plan: TierPlan, machine: Machine) -> Iterator[str]:
    tier = plan.tier
    if machine.backend == "cuda":
        yield from _more_hardware(plan, machine)
    for kind in list(TierKind)[list(TierKind).index(tier.kind) + 1 :]:
        recipe = find_recipe(kind.default_recipe)
        other = replace(tier, kind=kind, recipe=recipe, checkpoint=tier.checkpoint.with_name(recipe.name))
        if not (instead := _alone(other, machine)).problem:
            yield f"the {kind} tier here" + (f" ({instead.degree})" if instead.gpus > 1 else "")
            break
    per_step = plan.per_device.kv_bytes(CONTEXT_STEP)
    if 0 < (steps := (plan.room_bytes - plan.per_device.fixed) // per_step) < plan.context_length // CONTEXT_STEP:
        yield f"a context of {steps * CONTEXT_STEP} tokens"


def _more_hardware(plan: TierPlan, machine: Machine) -> Iterator[str]:
    """More of this machine, or else more of its cards, or as many larger ones."""
    here = _alone(plan.tier, machine)
    if not here.problem:
        yield f"{here.gpus} GPUs to itself ({here.degree})" if here.gpus > 1 else "a GPU to itself"
        return
    card, count = machine.smallest, len(machine.gpus)
    node = max(count, NODE_GPUS)
    more = [Machine.of(card, node, nodes) for nodes in range(1, MOST_NODES + 1)]
    larger = [Machine.of(other, count) for other in CARDS if other.memory > card.memory]
    for machines in (more, larger):
        for other in machines:
            found = _alone(plan.tier, other)
            if not found.problem:
                over = f" over {found.pipeline_parallel} nodes" if found.pipeline_parallel > 1 else ""
                how = f" ({found.degree})" if found.gpus > 1 else ""
                yield f"{found.gpus} × {other.smallest.name}{over}{how}"
                break


def share_gpus(tiers: tuple[Tier, ...], machine: Machine) -> tuple[Tier, ...]:
    """Give every tier without ``gpu_memory`` an even part of what is left on its fullest GPU, 0.9 in all.

    Tiers that sleep while idle are awake one at a time: together they count as one, and each may take its part.
    What a sleeping engine keeps, CUDA's context, is of the tenth that nobody is given.

    Raises:
        PlacementError: a GPU does not exist, or is given away more than once over.
    """
    present = len(machine.gpus)
    shares: dict[str, float] = {}
    for gpu in sorted({gpu for tier in tiers for gpu in tier.resources.gpus}):
        sharing = [tier for tier in tiers if gpu in tier.resources.gpus]
        names = ", ".join(tier.name for tier in sharing)
        if gpu >= present:
            raise PlacementError(f"GPU {gpu} of {names} does not exist; this machine has {present}.")
        sleepers = [tier for tier in sharing if tier.resources.idle == "sleep"]
        claims = [[tier] for tier in sharing if tier not in sleepers] + ([sleepers] if sleepers else [])
        given = [max((tier.resources.gpu_memory or 0 for tier in claim), default=0) for claim in claims]
        waiting = sum(not each for each in given)
        left = USABLE_GPU_MEMORY - sum(given)
        if left < -1e-9 or (waiting and left <= 0):
            raise PlacementError(
                f"GPU {gpu}: gpu_memory of {names} adds up to {sum(given):.2f}, and {USABLE_GPU_MEMORY} is what "
                "engines can have together: lower it, give a tier other gpus, or let tiers sleep (`idle: sleep`)."
            )
        for claim, part in zip(claims, given, strict=True):
            for tier in claim:
                if tier.resources.gpu_memory is None:
                    share = part or left / waiting
                    shares[tier.name] = min(shares.get(tier.name, 1.0), share)
    return tuple(
        replace(tier, resources=tier.resources.model_copy(update={"gpu_memory": round(shares[tier.name], 3)}))
        if tier.name in shares
        else tier
        for tier in tiers
    )
