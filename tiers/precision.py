"""What the arithmetic of a tier is, part by part. Declared here; what really runs is read back by tiers/probe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

PrecisionName = Literal["bf16", "fp8", "int4"]
NumberType = Literal["bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2", "int8", "int4"]
Scale = Literal["tensor", "channel", "token", "group", "block"]

_SPELLED: dict[NumberType, str] = {"fp8_e4m3": "FP8 E4M3", "fp8_e5m2": "FP8 E5M2"}


class NumberFormat(BaseModel):
    """How the numbers of one tensor are held: their type, and what shares a scale.

    ``scale`` is what one scale covers, None for numbers that need none; ``size`` is how many values, of a group
    or along each side of a block. ``dynamic`` scales are taken from the values while the engine runs.
    """

    model_config = ConfigDict(frozen=True)

    type: NumberType
    scale: Scale | None = None
    size: int | None = None
    symmetric: bool = True
    dynamic: bool = False

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documentation has it
    @property
    def text(self) -> str:
        """The same in words, for tables."""
        spelled = _SPELLED.get(self.type, self.type.upper())
        if self.scale is None:
            return spelled
        each = {"group": f"group of {self.size}", "block": f"{self.size}×{self.size} block"}.get(
            self.scale, self.scale
        )
        kind = "a dynamic scale" if self.dynamic else "a scale"
        zero = "" if self.symmetric else " and a zero point"
        return f"{spelled}, {kind}{zero} per {each}"

    def __str__(self) -> str:
        return self.text


IN_BF16 = NumberFormat(type="bf16")


class Precision(BaseModel):
    """The declared arithmetic of one tier. ``name`` is what headers show and callers may pin.

    ``weights`` and ``activations`` are those of the linear layers in the blocks, except of those whose name one of
    ``unquantized`` matches from its beginning: these are BF16. ``attention`` is what queries are multiplied in.
    """

    model_config = ConfigDict(frozen=True)

    name: PrecisionName
    weights: NumberFormat
    activations: NumberFormat
    kv_cache: NumberFormat = IN_BF16
    attention: NumberFormat = IN_BF16
    head: NumberFormat = IN_BF16
    unquantized: tuple[str, ...] = ()


BF16 = Precision(name="bf16", weights=IN_BF16, activations=IN_BF16)
FP8 = Precision(
    name="fp8",
    weights=NumberFormat(type="fp8_e4m3", scale="channel"),
    activations=NumberFormat(type="fp8_e4m3", scale="token", dynamic=True),
)


def int4(group_size: int, *, symmetric: bool = True) -> Precision:
    """INT4 weights with a scale a group, BF16 activations (W4A16)."""
    weights = NumberFormat(type="int4", scale="group", size=group_size, symmetric=symmetric)
    return Precision(name="int4", weights=weights, activations=IN_BF16)
