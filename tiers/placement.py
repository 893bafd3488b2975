"""Whether the engines fit: memory they need against memory there is, before any is started."""

import math
import shutil
import subprocess
from dataclasses import replace

import psutil

from tiers.catalog import ModelShape
from tiers.engine import DEFAULT_CPU_KV_CACHE_GIB, GIB, Backend
from tiers.errors import PlacementError
from tiers.tier import Tier

CPU_ENGINE_OVERHEAD = int(1.7 * GIB)
"""Three processes with PyTorch and vLLM, before weights and cache; measured on vLLM 0.32.0."""


USABLE_GPU_MEMORY = 0.9
"""The share of a GPU that all engines on it may take together; the rest is CUDA's own."""


def engine_bytes(tier: Tier) -> int:
    """RAM that one engine of ``tier`` needs on the CPU: weights, KV cache and the processes themselves."""
    weights = sum(file.stat().st_size for file in tier.checkpoint.glob("*.safetensors"))
    kv_cache = (tier.resources.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB) * GIB
    return weights + int(kv_cache) + CPU_ENGINE_OVERHEAD


def place(tiers: tuple[Tier, ...], backend: Backend) -> tuple[Tier, ...]:
    """The tiers with their share of the machine, if all of them fit on it together.

    Raises:
        PlacementError: with what is needed, what there is, and what to change.
    """
    if backend == "cuda":
        return share_gpus(tiers)
    needed = sum(map(engine_bytes, tiers))
    available = psutil.virtual_memory().available
    if needed > available:
        raise PlacementError(
            f"{len(tiers)} engines need {needed / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB are free: "
            "serve fewer tiers, lower kv_cache_gib, or free memory."
        )
    return tiers


def check_context(tier: Tier) -> int:
    """The context length the engine will serve, held against what the model and its KV cache can.

    Raises:
        PlacementError: the configured length is beyond the model's, or one request of it outgrows the cache.
    """
    shape = ModelShape.read(tier.checkpoint)
    length = tier.context_length or shape.max_position_embeddings
    if length > shape.max_position_embeddings:
        raise PlacementError(
            f"{tier.name}: context_length {length} is beyond the model's own {shape.max_position_embeddings}."
        )
    kv_cache_gib = tier.resources.kv_cache_gib
    if kv_cache_gib is not None and shape.kv_bytes_per_token * length > kv_cache_gib * GIB:
        needed = math.ceil(shape.kv_bytes_per_token * length / GIB * 10) / 10
        raise PlacementError(
            f"{tier.name}: one request of {length} tokens needs {needed} GiB of KV cache and kv_cache_gib is "
            f"{kv_cache_gib}: raise it, or lower context_length."
        )
    return length


def share_gpus(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    """Give every tier without ``gpu_memory`` an even part of what is left on its fullest GPU, 0.9 in all.

    Raises:
        PlacementError: a GPU does not exist, or is given away more than once over.
    """
    present = gpu_count()
    shares: dict[str, float] = {}
    for gpu in sorted({gpu for tier in tiers for gpu in tier.resources.gpus}):
        sharing = [tier for tier in tiers if gpu in tier.resources.gpus]
        names = ", ".join(tier.name for tier in sharing)
        if gpu >= present:
            raise PlacementError(f"GPU {gpu} of {names} does not exist; this machine has {present}.")
        taken = sum(tier.resources.gpu_memory or 0 for tier in sharing)
        waiting = [tier for tier in sharing if tier.resources.gpu_memory is None]
        left = USABLE_GPU_MEMORY - taken
        if taken > 1 or (waiting and left <= 0):
            raise PlacementError(
                f"GPU {gpu}: gpu_memory of {names} adds up to {taken:.2f} and leaves nothing over: lower it, "
                "or give a tier other gpus."
            )
        for tier in waiting:
            shares[tier.name] = min(shares.get(tier.name, 1.0), left / len(waiting))
    return tuple(
        replace(tier, resources=tier.resources.model_copy(update={"gpu_memory": round(shares[tier.name], 3)}))
        if tier.name in shares
        else tier
        for tier in tiers
    )


def gpu_count() -> int:
    """How many NVIDIA GPUs this machine has."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
