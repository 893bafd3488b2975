"""What the safetensors files of a checkpoint hold, read from their headers."""

import re
from pathlib import Path

from tiers.catalog import ModelShape

_LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.(?!weight_shape$)\w+")
"""Everything that stands for a linear layer's weights: values, scales, zero points; a shape is no part of them."""


def bits_per_weight(folder: Path, shape: ModelShape) -> float:
    """Bits stored for each weight of the linear layers in the blocks, scales and zero points included."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in filter(_LINEAR.fullmatch, tensors.keys()):
                tensor = tensors.get_tensor(name)
                total += tensor.numel() * tensor.element_size() * 8
    return total / shape.linear_weights
