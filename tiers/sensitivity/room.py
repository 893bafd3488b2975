"""How much memory measuring takes, and whether there is so much. Knows shapes; knows no tensors.

Weights are counted; what passes while something is computed is an **estimate**, by what `sensitivity.model` and
`kernels` hold at once.
"""

from collections.abc import Sequence

from tiers.catalog import ModelShape
from tiers.errors import PlacementError
from tiers.hardware import GIB
from tiers.sensitivity.units import HEAD_NAME, Unit

_FP32_BYTES = 4
_PASSING = 16
"""Bytes for each weight of a matrix while it is quantized, and for each product of attention's in FP8: four steps
in FP32, or more in less."""
_MARGIN = GIB
"""PyTorch and Transformers themselves, and logits that are compared a run of rows at a time."""


def weights_needed(shape: ModelShape) -> int:
    """Bytes of the whole model in FP32."""
    return shape.parameters * _FP32_BYTES


def bytes_needed(shape: ModelShape, chosen: Sequence[Unit], longest: int) -> int:
    """Where the model computes.

    Args:
        shape: the model's.
        chosen: what is quantized, one after the other, beside the weights as they were.
        longest: tokens of the longest prompt with its answer.
    """
    sizes = {layer.name: layer.inputs * layer.outputs for layer in shape.linear_layers()}
    sizes[HEAD_NAME] = shape.vocab_size * shape.hidden_size
    quantized = max((sum(sizes[name] for name in unit.linears) for unit in chosen), default=0) * _FP32_BYTES
    passing = max((sizes[name] for unit in chosen for name in unit.linears), default=0) * _PASSING
    if any(unit.attention for unit in chosen):
        passing = max(passing, shape.num_attention_heads * longest**2 * _PASSING)
    cache = longest * shape.kv_bytes_per_token * 2  # counted in BF16
    states = longest * (4 * shape.hidden_size + 3 * shape.intermediate_size) * _FP32_BYTES
    return weights_needed(shape) + quantized + passing + cache + states + _MARGIN


def check_room(model: str, shape: ModelShape, needed: int, free: int, gpu_free: int | None) -> None:
    """Hold what is needed against what is free.

    Args:
        model: its name.
        shape: its sizes.
        needed: as `bytes_needed` tells it.
        free: bytes of memory.
        gpu_free: bytes of the GPU on which the model computes; None where it computes on the CPU.

    Raises:
        PlacementError: there is less.
    """
    weights = weights_needed(shape)
    if gpu_free is not None:
        if needed > gpu_free:
            raise PlacementError(
                f"Measuring {model} takes about {needed / GIB:.1f} GiB of a GPU, {weights / GIB:.1f} GiB of them "
                f"its weights in FP32, and {gpu_free / GIB:.1f} GiB are free: stop the engines on that GPU, or "
                "name another in the reference's `gpus`."
            )
        needed = weights + _MARGIN  # which it passes through while it is loaded
    if needed > free:
        raise PlacementError(
            f"Measuring {model} takes about {needed / GIB:.1f} GiB of memory, {weights / GIB:.1f} GiB of them its "
            f"weights in FP32, and {free / GIB:.1f} GiB are free: free memory, or measure on a larger machine."
        )
