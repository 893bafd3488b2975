"""What is quantized alone, or together: layers, parts, and the four levels by which FP8 is compared. Plain data.

Knows shapes and formats; knows no tensors.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from tiers.catalog import BF16_BYTES, Linear, ModelShape
from tiers.conformance.scores import Phase
from tiers.errors import ConfigError
from tiers.precision import FP8, NumberFormat
from tiers.recipe import GROUP_SIZES
from tiers.storage import bytes_of

FormatName = Literal["fp8", "int4", "int8"]
By = Literal["layer", "part", "level"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
BYS: tuple[By, ...] = get_args(By)

_PARTS = {
    "q_proj": r"\.q_proj$",
    "k_proj": r"\.k_proj$",
    "v_proj": r"\.v_proj$",
    "o_proj": r"\.o_proj$",
    "attention": r"\.self_attn\.",
    "gate_proj": r"\.gate_proj$",
    "up_proj": r"\.up_proj$",
    "down_proj": r"\.down_proj$",
    "feed-forward": r"\.mlp\.",
}
HEAD_NAME = "lm_head"
"""Of the head, which is no layer of a block."""


@dataclass(frozen=True)
class Format:
    """What a linear layer computes in."""

    name: FormatName
    weights: NumberFormat
    activations: NumberFormat | None
    """None where they stay as they are."""

    @classmethod
    def of(cls, name: FormatName, shape: ModelShape) -> "Format":
        """As the recipes fp8-dynamic and w4a16-rtn have it, and INT8 as FP8.

        Raises:
            ConfigError: no group size divides the model's widths.
        """
        if name == "fp8":
            return cls(name, FP8.weights, FP8.activations)
        if name == "int8":
            weights = NumberFormat(type="int8", scale="channel")
            return cls(name, weights, NumberFormat(type="int8", scale="token", dynamic=True))
        widths = shape.linear_inputs
        size = next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), None)
        if size is None:
            raise ConfigError(f"--format int4: no group size of {GROUP_SIZES} divides the widths {widths}.")
        return cls(name, NumberFormat(type="int4", scale="group", size=size), None)

    @property
    def text(self) -> str:
        """In words, for tables."""
        activations = f"activations in {self.activations}" if self.activations else "activations as they are"
        return f"weights in {self.weights}; {activations}"


@dataclass(frozen=True)
class Unit:
    """What is quantized at once, everything else being as the reference has it."""

    name: str
    linears: tuple[str, ...] = ()
    """Names of linear layers, the head's being lm_head."""
    kv_cache: bool = False
    """Whether keys and values that are read from the cache are in FP8."""
    attention: bool = False
    """Whether prefill multiplies queries, keys, values and probabilities in FP8."""
    phases: tuple[Phase, ...] = ("prefill",)
    """Those that are measured. Linear layers compute a token alike in both, so that one is enough for them."""
    saves: int = 0
    """Bytes of weights, from BF16; below 0 where a copy is needed that there was not."""
    saves_per_token: int = 0
    """Bytes of KV cache."""

    @property
    def slug(self) -> str:
        """For file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def check(by: By, name: FormatName) -> None:
    """Hold against each other what a person asks for.

    Raises:
        ConfigError: levels are of FP8, and another format was asked for.
    """
    if by == "level" and name != "fp8":
        raise ConfigError(f"--by level compares four levels of FP8: leave out --format {name}.")


def units(by: By, shape: ModelShape, number: Format) -> tuple[Unit, ...]:
    """What is measured, in the order of tables.

    Args:
        by: decoder blocks one by one, parts of all blocks one by one, or four levels that each add to the last.
        shape: of the model.
        number: of linear layers. KV cache and attention are FP8 whatever it is.
    """
    layers = tuple(shape.linear_layers())

    def unit(name: str, wanted: Callable[[Linear], object]) -> Unit:
        chosen = [layer for layer in layers if wanted(layer)]
        saves = sum(_saved(layer, number) for layer in chosen)
        return Unit(name, tuple(layer.name for layer in chosen), saves=saves)

    if by == "layer":
        blocks = [f"model.layers.{index}." for index in range(shape.num_hidden_layers)]
        return tuple(
            unit(f"layer {index}", lambda layer, block=block: layer.name.startswith(block))  # type: ignore[misc]
            for index, block in enumerate(blocks)
        )
    per_token = shape.kv_bytes_per_token // BF16_BYTES  # of two bytes one is left
    if by == "part":
        parts = [
            unit(name, lambda layer, pattern=pattern: re.search(pattern, layer.name))  # type: ignore[misc]
            for name, pattern in _PARTS.items()
        ]
        head = Linear(HEAD_NAME, shape.hidden_size, shape.vocab_size)
        # A head that is the embedding too is needed in BF16 still.
        saves = -bytes_of(head, number.weights) if shape.tie_word_embeddings else _saved(head, number)
        return (
            *parts,
            Unit("head", (HEAD_NAME,), saves=saves),
            Unit("KV cache", kv_cache=True, phases=("decode",), saves_per_token=per_token),
            Unit("attention product", attention=True),
        )
    both: tuple[Phase, ...] = ("prefill", "decode")
    feed_forward = unit("", lambda layer: ".mlp." in layer.name)
    every = unit("", lambda layer: True)
    return (
        Unit("1 feed-forward", feed_forward.linears, phases=both, saves=feed_forward.saves),
        Unit("2 all linears", every.linears, phases=both, saves=every.saves),
        Unit("3 + KV cache", every.linears, True, phases=both, saves=every.saves, saves_per_token=per_token),
        Unit("4 + attention", every.linears, True, True, both, every.saves, per_token),
    )


def _saved(layer: Linear, number: Format) -> int:
    return layer.inputs * layer.outputs * BF16_BYTES - bytes_of(layer, number.weights)
