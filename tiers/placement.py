"""Whether the engines fit: memory they need against memory there is, before any is started."""

import math
import os
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


GPU_ENGINE_OVERHEAD = 2 * GIB
"""CUDA context, activations and graphs of one engine on one GPU: a margin, not a measurement."""
USABLE_GPU_MEMORY = 0.9
"""The share of a GPU that all engines on it may take together; the rest is CUDA's own."""


def engine_bytes(tier: Tier) -> int:
    """RAM that one engine of ``tier`` needs on the CPU: weights, KV cache and the processes themselves."""
    weights = _weight_bytes(tier)
    if weights and tier.recipe.precision.name == "fp8":
        # tiers/probe/fp8_cpu.py keeps the quantized weights once more, in FP32.
        weights += 4 * ModelShape.read(tier.checkpoint).linear_weights
    kv_cache = (tier.resources.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB) * GIB
    return weights + int(kv_cache) + CPU_ENGINE_OVERHEAD


def _weight_bytes(tier: Tier) -> int:
    """Of the finished checkpoint; 0 while there is none, or where the folder that it links to has moved."""
    return sum(file.stat().st_size for file in tier.checkpoint.glob("*.safetensors") if file.is_file())


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


def check_context(tier: Tier, backend: Backend) -> int:
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
    kv_cache_gib = tier.resources.kv_cache_gib or (DEFAULT_CPU_KV_CACHE_GIB if backend == "cpu" else None)
    if kv_cache_gib is not None and shape.kv_bytes_per_token * length > kv_cache_gib * GIB:
        needed = math.ceil(shape.kv_bytes_per_token * length / GIB * 10) / 10
        raise PlacementError(
            f"{tier.name}: one request of {length} tokens needs {needed} GiB of KV cache and kv_cache_gib is "
            f"{kv_cache_gib}: raise it, or lower context_length."
        )
    if backend == "cuda" and kv_cache_gib is None:
        _check_gpu_room(tier, shape.kv_bytes_per_token * length)
    return length


def _check_gpu_room(tier: Tier, kv_bytes: int) -> None:
    """Hold weights and the KV cache of one longest request against the tier's share of its smallest GPU."""
    memory = gpu_memory()
    share = tier.resources.gpu_memory or USABLE_GPU_MEMORY
    gpus = tier.resources.gpus
    room = share * min(memory[gpu] for gpu in gpus)
    needed = (_weight_bytes(tier) + kv_bytes) / len(gpus) + GPU_ENGINE_OVERHEAD
    if needed > room:
        raise PlacementError(
            f"{tier.name}: each of its {len(gpus)} GPUs needs {needed / GIB:.1f} GiB for weights and one "
            f"request of the full context, and its share is {room / GIB:.1f} GiB: raise gpu_memory, add GPUs, "
            "or lower context_length."
        )


def share_gpus(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    """Give every tier without ``gpu_memory`` an even part of what is left on its fullest GPU, 0.9 in all.

    Raises:
        PlacementError: a GPU does not exist, or is given away more than once over.
    """
    present = len(gpu_memory())
    shares: dict[str, float] = {}
    for gpu in sorted({gpu for tier in tiers for gpu in tier.resources.gpus}):
        sharing = [tier for tier in tiers if gpu in tier.resources.gpus]
        names = ", ".join(tier.name for tier in sharing)
        if gpu >= present:
            raise PlacementError(f"GPU {gpu} of {names} does not exist; this machine has {present}.")
        taken = sum(tier.resources.gpu_memory or 0 for tier in sharing)
        waiting = [tier for tier in sharing if tier.resources.gpu_memory is None]
        left = USABLE_GPU_MEMORY - taken
        if taken > USABLE_GPU_MEMORY + 1e-9 or (waiting and left <= 0):
            raise PlacementError(
                f"GPU {gpu}: gpu_memory of {names} adds up to {taken:.2f}, and {USABLE_GPU_MEMORY} is what "
                "engines can have together: lower it, or give a tier other gpus."
            )
        for tier in waiting:
            shares[tier.name] = min(shares.get(tier.name, 1.0), left / len(waiting))
    return tuple(
        replace(tier, resources=tier.resources.model_copy(update={"gpu_memory": round(shares[tier.name], 3)}))
        if tier.name in shares
        else tier
        for tier in tiers
    )


def gpu_memory() -> list[int]:
    """Bytes of each NVIDIA GPU that this process may use, in the order the config counts them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and not given.strip():
        return []  # none were given to this process
    which = [f"--id={given}"] if given else []
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits", *which]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return [int(line) << 20 for line in answer.stdout.split() if line.isdigit()]
