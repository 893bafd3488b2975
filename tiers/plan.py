"""One tier's engine on given hardware: what it takes, how many requests it can hold, or why it does not fit.

Knows one tier at a time, whose engines are all alike; where engines go is tiers/placement.py's to say.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from tiers.catalog import ModelShape, checked_shape, member_of
from tiers.engine import DEFAULT_CPU_KV_CACHE_GIB
from tiers.hardware import GIB, Gpu
from tiers.manifest import MANIFEST_NAME, Manifest, OutdatedManifest
from tiers.memory import (
    CPU_ENGINE_OVERHEAD,
    CUDA_OVERHEAD,
    Batch,
    Degree,
    Footprint,
    Weights,
    gpu_footprint,
    kv_bytes_per_token,
    ram_footprint,
    weights_of,
)
from tiers.storage import stored
from tiers.tier import Tier

USABLE_GPU_MEMORY = 0.9
"""The share of a GPU that all engines on it may take together; the rest is CUDA's own."""


class TierPlan(BaseModel):
    """What an engine takes of each of its GPUs, or of RAM, and what it can do with it. Sizes in bytes."""

    model_config = ConfigDict(frozen=True)

    tier: Tier = Field(exclude=True)
    """With its share of the GPUs filled in."""
    name: str
    precision: str
    recipe: str
    context_length: int
    """0 while neither the config nor a checkpoint says it."""
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes_full_context: int
    replicas: int
    """How many engines; all other figures, but for the requests, are of one of them."""
    gpus: int
    """Of one engine; 0 on the CPU."""
    tensor_parallel: int
    pipeline_parallel: int
    room_bytes: int
    """What the engine may take of each GPU, or of RAM."""
    per_device: Footprint
    """What it takes there before the first token of KV cache."""
    kv_cache_bytes: int
    """What there is for KV cache there."""
    max_num_seqs: int
    """How many requests one engine works on at once, whatever their length; further ones wait in it."""
    concurrent_requests: int
    """Of full length, at once, on all replicas together."""
    problem: str | None = None
    """Why it does not fit, as a sentence without the tier's name."""
    wants_more: bool = Field(default=False, exclude=True)
    """Whether the problem is of the hardware, so that there are remedies to look for."""
    remedies: tuple[str, ...] = ()
    """What would."""

    @property
    def degree(self) -> Degree:
        """Over what it is spread."""
        return Degree(self.tensor_parallel, self.pipeline_parallel)

    @property
    def is_known(self) -> bool:
        """Whether the model's shape is: not before its weights are here, unless the catalog has it."""
        return self.kv_bytes_per_token > 0

    @property
    def sentence(self) -> str:
        """Why it does not fit and what would."""
        advice = f" What would fit: {'; '.join(self.remedies)}." if self.remedies else ""
        return f"{self.name}: {self.problem}{advice}"


def shape_of(tier: Tier) -> ModelShape | None:
    """The model's shape, from what there is: its checkpoint, its reference's, its source folder, the catalog.

    Raises:
        SourceError: a checkpoint is not the model that it is named after.
    """
    folders = [folder for folder in (tier.checkpoint, tier.reference.checkpoint) if _is_of(folder, tier)]
    if tier.source.kind == "folder" and (Path(tier.source.id) / "config.json").exists():
        folders.append(Path(tier.source.id))
    if folders:
        return checked_shape(folders[0], tier.model, tier.source)
    member = member_of(tier.model, tier.source)
    return member.shape if member else None


def _is_of(folder: Path, tier: Tier) -> bool:
    """Whether a finished checkpoint lies there and was made from what the config names now."""
    try:
        return (folder / MANIFEST_NAME).exists() and Manifest.read(folder).source == tier.source
    except OutdatedManifest:
        return False  # it will be built again


def in_ram(tier: Tier, ram: int, *, alone: bool) -> TierPlan:
    """On the CPU. ``alone``, what is left of the memory is KV cache unless the config says how much."""
    shape, batch = shape_of(tier), Batch.of(tier.resources, None)
    if shape is None:
        each = Footprint(weights=0, activations=0, graphs=0, overhead=CPU_ENGINE_OVERHEAD, kv_per_token=0)
    else:
        each = ram_footprint(shape, tier.recipe, _weights(tier, shape), batch)
    kv_cache_gib = tier.resources.kv_cache_gib or (None if alone else DEFAULT_CPU_KV_CACHE_GIB)
    return _plan(tier, shape, each, batch, Degree(), ram, kv_cache_gib, gpus=())


def on_gpus(tier: Tier, gpus: Sequence[Gpu], degree: Degree) -> TierPlan:
    """On GPUs, of which the smallest counts: parallelism takes the same of each."""
    shape = shape_of(tier)
    card = min(gpus, key=lambda gpu: gpu.memory)
    batch = Batch.of(tier.resources, card)
    if shape is None:
        each = Footprint(weights=0, activations=0, graphs=0, overhead=CUDA_OVERHEAD, kv_per_token=0)
    else:
        each = gpu_footprint(shape, tier.recipe, _weights(tier, shape), degree, batch)
    room = int((tier.resources.gpu_memory or USABLE_GPU_MEMORY) * card.memory)
    return _plan(tier, shape, each, batch, degree, room, tier.resources.kv_cache_gib, gpus)


def indivisible(tier: Tier, shape: ModelShape, tensor: int) -> str | None:
    """Why a layer cannot be spread over so many GPUs; None if it can.

    The rules are vLLM's (``LlamaAttention``, ``RowParallelLinear``): heads are dealt out whole, KV heads are dealt
    out or repeated, and a quantization group is never cut.
    """
    heads, kv_heads, inner = shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    if heads % tensor:
        return f"{heads} attention heads cannot be dealt out to {tensor} GPUs"
    if kv_heads % tensor and tensor % kv_heads:
        return f"{kv_heads} KV heads can be neither dealt out to {tensor} GPUs nor repeated on them"
    if inner % tensor:
        return f"feed-forward layers of width {inner} cannot be cut for {tensor} GPUs"
    for layer, weights in stored(tier.recipe, shape):
        # Only these two are cut along their inputs, which the groups run over.
        if layer.name.endswith(("o_proj", "down_proj")) and layer.inputs // tensor % (weights.size or 1):
            return f"groups of {weights.size} do not divide a part of {layer.name} on each of {tensor} GPUs"
    return None


def _weights(tier: Tier, shape: ModelShape) -> Weights:
    """As its recipe will store them, or as they lie in the finished checkpoint."""
    weights = weights_of(shape, tier.recipe)
    if not _is_of(tier.checkpoint, tier):
        return weights
    on_disk = sum(file.stat().st_size for file in tier.checkpoint.glob("*.safetensors") if file.is_file())
    return replace(weights, blocks=max(0, on_disk - weights.embedding - weights.head))


def _plan(
    tier: Tier,
    shape: ModelShape | None,
    each: Footprint,
    batch: Batch,
    degree: Degree,
    room: int,
    kv_cache_gib: float | None,
    gpus: Sequence[Gpu],
) -> TierPlan:
    context = tier.context_length or (shape.max_position_embeddings if shape else 0)
    per_token = kv_bytes_per_token(shape, tier.recipe) if shape else 0
    kv_cache = max(0, room - each.fixed) if kv_cache_gib is None else int(kv_cache_gib * GIB)
    problem = _problem(tier, shape, each, degree, room, kv_cache_gib, gpus, context)
    requests = kv_cache // each.kv_bytes(context) if shape and not problem else 0
    return TierPlan(
        tier=tier,
        name=tier.name,
        precision=tier.recipe.precision.name,
        recipe=tier.recipe.name,
        context_length=context,
        weights_bytes=_weights(tier, shape).total if shape else 0,
        kv_bytes_per_token=per_token,
        kv_bytes_full_context=per_token * context,
        replicas=tier.resources.replicas,
        gpus=degree.gpus if gpus else 0,
        tensor_parallel=degree.tensor,
        pipeline_parallel=degree.pipeline,
        room_bytes=room,
        per_device=each,
        kv_cache_bytes=kv_cache,
        max_num_seqs=batch.sequences,
        concurrent_requests=requests * tier.resources.replicas,
        problem=problem.sentence if problem else None,
        wants_more=problem is not None and problem.wants_more,
    )


def unsuitable(tier: Tier, gpus: Sequence[Gpu]) -> str | None:
    """Why this hardware, a CPU if there are no GPUs, would not compute what the tier's recipe promises."""
    if not gpus:
        reason = tier.recipe.why_not_on("cpu", None)
        return f"{tier.recipe.name} is not for CPUs: {reason}." if reason else None
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    major, minor = oldest.capability
    reason = tier.recipe.why_not_on("cuda", float(f"{major}.{minor}"))
    return f"{tier.recipe.name} is not for {oldest.name}: {reason}." if reason else None


class _Problem(NamedTuple):
    sentence: str
    wants_more: bool = False


def _problem(
    tier: Tier,
    shape: ModelShape | None,
    each: Footprint,
    degree: Degree,
    room: int,
    kv_cache_gib: float | None,
    gpus: Sequence[Gpu],
    context: int,
) -> _Problem | None:
    """Why this cannot be served there; None if it can, as far as is known."""
    if reason := unsuitable(tier, gpus):
        return _Problem(reason, wants_more=shape is not None)
    if shape is None:
        return None
    if context > shape.max_position_embeddings:
        return _Problem(f"context_length {context} is beyond the model's own {shape.max_position_embeddings}.")
    if reason := indivisible(tier, shape, degree.tensor):
        return _Problem(f"{reason}: choose another number of gpus.")
    request = each.kv_bytes(context)
    if kv_cache_gib is not None and request > kv_cache_gib * GIB:
        return _Problem(
            f"one request of {context} tokens needs {ceil(request / GIB * 10) / 10} GiB of KV cache and "
            f"kv_cache_gib is {kv_cache_gib}: raise it, or lower context_length."
        )
    needed = each.fixed + (request if kv_cache_gib is None else int(kv_cache_gib * GIB))
    if needed <= room:
        return None
    kv_cache = f"{(needed - each.fixed) / GIB:.1f} KV cache" + (f" for {context} tokens" * (kv_cache_gib is None))
    rest = f"{(each.fixed - each.weights) / GIB:.1f} activations and the engine's own"
    parts = f"{needed / GIB:.1f} GiB ({each.weights / GIB:.1f} weights, {kv_cache}, {rest})"
    if not gpus:
        sentence = f"it needs {parts} and {room / GIB:.1f} GiB of memory are free."
    else:
        who = f"each of its {degree.gpus} GPUs" if degree.gpus > 1 else "its GPU"
        sentence = f"{who} needs {parts} and its share is {room / GIB:.1f} GiB."
    return _Problem(sentence, wants_more=True)
