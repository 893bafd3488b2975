"""How a recipe stores the weights of each linear layer: bits and scales.

What is counted is what lies in a checkpoint's safetensors: the quantized weights, their scales (BF16) and zero
points, and the weights' shapes beside packed ones; everything that the recipe leaves alone is BF16.
"""

import re
from functools import lru_cache
from math import ceil

from tiers.catalog import BF16_BYTES, Linear, ModelShape
from tiers.precision import NumberFormat, NumberType
from tiers.recipe import Recipe

_BITS: dict[NumberType, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int4": 4}
"""All others have 8."""
PACKED_SHAPE_BYTES = 16
"""compressed-tensors writes the unpacked shape, two int64, beside weights it has packed into int32."""


def bits(number: NumberFormat) -> int:
    """Of one value."""
    return _BITS.get(number.type, 8)


def bytes_of(layer: Linear, weights: NumberFormat) -> int:
    """Bytes of a layer's weights, scales and zero points in this format."""
    width, size = bits(weights), weights.size or 1
    columns = ceil(layer.inputs / size)
    scales = {
        None: 0,
        "tensor": 1,
        "channel": layer.outputs,
        "group": layer.outputs * columns,
        "block": columns * ceil(layer.outputs / size),
    }[weights.scale]
    zero_points = 0 if weights.symmetric else scales * width // 8
    packed = PACKED_SHAPE_BYTES if width < 8 else 0
    return layer.inputs * layer.outputs * width // 8 + scales * BF16_BYTES + zero_points + packed


@lru_cache(maxsize=256)
def stored(recipe: Recipe, shape: ModelShape) -> tuple[tuple[Linear, NumberFormat], ...]:
    """Every linear layer of the model's blocks with the format of its weights.

    Raises:
        BuildError: the recipe does not fit the shape.
    """
    precision = recipe.precision_for(shape)
    kept = [re.compile(pattern) for pattern in precision.unquantized]
    in_bf16 = NumberFormat(type="bf16")
    return tuple(
        (layer, in_bf16 if any(pattern.match(layer.name) for pattern in kept) else precision.weights)
        for layer in shape.linear_layers()
    )
