"""What the arithmetic of a tier is, part by part. Knows names only; what really runs is read back elsewhere."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

PrecisionName = Literal["bf16", "fp8", "int4"]


class Precision(BaseModel):
    """The declared arithmetic of one tier. ``name`` is what headers and tables show."""

    model_config = ConfigDict(frozen=True)

    name: PrecisionName
    weights: str
    activations: str
    kv_cache: str
    head: str


BF16 = Precision(
    name="bf16",
    weights="BF16",
    activations="BF16",
    kv_cache="BF16",
    head="BF16",
)
FP8 = Precision(
    name="fp8",
    weights="FP8 E4M3, one scale per output channel",
    activations="FP8 E4M3, one dynamic scale per token",
    kv_cache="BF16",
    head="BF16",
)
INT4 = Precision(
    name="int4",
    weights="INT4, one scale per group",
    activations="BF16",
    kv_cache="BF16",
    head="BF16",
)
