"""How a recipe stores the weights of each linear layer: bits and scales, read from its text for llm-compressor.

What is counted is what lies in a checkpoint's safetensors: the quantized weights, their scales (BF16) and zero
points, and the weights' shapes beside packed ones; everything that the recipe leaves alone is BF16.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, Literal

import yaml

from tiers.catalog import BF16_BYTES, Linear, ModelShape
from tiers.errors import ConfigError
from tiers.recipe import Recipe

Strategy = Literal["tensor", "channel", "group", "block"]
PACKED_SHAPE_BYTES = 16
"""compressed-tensors writes the unpacked shape, two int64, beside weights it has packed into int32."""


@dataclass(frozen=True)
class Storage:
    """The format of a layer's weights: one scale per tensor, output channel, group of inputs, or square block."""

    bits: int
    strategy: Strategy
    size: int = 1
    """Of a group, or the side of a block."""
    symmetric: bool = True

    def bytes_of(self, layer: Linear) -> int:
        """Bytes of the layer's weights, scales and zero points."""
        columns = ceil(layer.inputs / self.size)
        scales = {
            "tensor": 1,
            "channel": layer.outputs,
            "group": layer.outputs * columns,
            "block": columns * ceil(layer.outputs / self.size),
        }[self.strategy]
        zero_points = 0 if self.symmetric else scales * self.bits // 8
        packed = PACKED_SHAPE_BYTES if self.bits < 8 else 0
        return layer.inputs * layer.outputs * self.bits // 8 + scales * BF16_BYTES + zero_points + packed

    @property
    def unit(self) -> int:
        """How many inputs belong together: a GPU holds whole units of them."""
        return self.size if self.strategy in {"group", "block"} else 1


_SCHEMES = {
    "FP8": Storage(8, "tensor"),
    "FP8_DYNAMIC": Storage(8, "channel"),
    "FP8_BLOCK": Storage(8, "block", 128),
    "W8A8": Storage(8, "channel"),
    "W4A16": Storage(4, "group", 128),
    "W4A16_ASYM": Storage(4, "group", 128, symmetric=False),
}
"""compressed-tensors' names for whole formats, as far as recipes use them."""


@dataclass(frozen=True)
class _Rule:
    """One entry of a recipe: the layers it is for, and what becomes of their weights."""

    storage: Storage
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def is_for(self, layer: Linear) -> bool:
        return _names(self.targets, layer) and not _names(self.ignore, layer)


def _names(patterns: tuple[str, ...], layer: Linear) -> bool:
    """As llm-compressor matches: a class, a name, or ``re:`` and an expression for its beginning."""
    return any(
        re.match(pattern.removeprefix("re:"), layer.name) is not None
        if pattern.startswith("re:")
        else pattern in {"Linear", layer.name}
        for pattern in patterns
    )


@lru_cache(maxsize=256)
def stored(recipe: Recipe, shape: ModelShape) -> tuple[tuple[Linear, Storage | None], ...]:
    """Every linear layer of the model with its format; None where it stays BF16.

    Raises:
        BuildError: the recipe does not fit the shape.
        ConfigError: the recipe names a format unknown here.
    """
    rules = tuple(_rules(recipe, shape))
    return tuple(
        (layer, next((rule.storage for rule in rules if rule.is_for(layer)), None))
        for layer in shape.linear_layers()
    )


def kv_cache_bits(recipe: Recipe, shape: ModelShape) -> int:
    """Bits of one number in the KV cache that the checkpoint asks for: 16 unless its recipe quantizes it."""
    schemes = (modifier.get("kv_cache_scheme") for modifier in _modifiers(recipe, shape))
    return next((int(scheme["num_bits"]) for scheme in schemes if scheme), 16)


def _modifiers(recipe: Recipe, shape: ModelShape) -> Iterator[dict[str, Any]]:
    for stage in (yaml.safe_load(recipe.text_for(shape)) or {}).values():
        for modifiers in stage.values():
            yield from modifiers.values()


def _rules(recipe: Recipe, shape: ModelShape) -> Iterator[_Rule]:
    for modifier in _modifiers(recipe, shape):
        ignore = _tuple(modifier.get("ignore"))
        if scheme := modifier.get("scheme"):
            if scheme not in _SCHEMES:
                raise ConfigError(f"recipe {recipe.name}: the size of scheme {scheme} is not known.")
            yield _Rule(_SCHEMES[scheme], _tuple(modifier.get("targets", "Linear")), ignore)
        for group in (modifier.get("config_groups") or {}).values():
            if weights := group.get("weights"):
                yield _Rule(_storage(weights), _tuple(group.get("targets", "Linear")), ignore)


def _storage(weights: dict[str, Any]) -> Storage:
    block = weights.get("block_structure")
    return Storage(
        bits=int(weights["num_bits"]),
        strategy=weights.get("strategy") or ("group" if weights.get("group_size") else "channel"),
        size=int(weights.get("group_size") or (block[-1] if block else 1)),
        symmetric=bool(weights.get("symmetric", True)),
    )


def _tuple(names: str | list[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
