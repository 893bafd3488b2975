"""How a tier's weights are made from the reference's: one file a recipe, in tiers/recipes."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tiers.catalog import ModelShape
from tiers.errors import BuildError, ConfigError
from tiers.precision import Precision

FOLDER = Path(__file__).with_name("recipes")
GROUP_SIZES = (128, 64, 32)
"""Tried from the coarsest: fewer scales, faster kernels; the first that divides every layer is taken."""


class Recipe(BaseModel):
    """A named way to make a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str = Field(description="One paragraph: what is quantized, how, what it needs, what it costs.")
    precision: Precision = Field(description="What comes out; a group size left open is chosen by the shape.")
    modifiers: str = Field(
        default="",
        description="llm-compressor's own YAML, empty for the reference; {group_size} and {last}, the index "
        "of the last block, are filled in.",
    )
    calibrated: bool = Field(default=False, description="Whether it needs text to calibrate on.")
    group_sizes: tuple[int, ...] = Field(default=GROUP_SIZES, description="Those to choose from, in this order.")
    multiple_of: int = Field(default=1, description="What must divide both widths of every linear layer.")
    compute_capability: float = Field(default=0, description="The least that an NVIDIA GPU must have to run it.")
    below_capability: float | None = Field(
        default=None, description="The compute capability from which on a GPU computes something else."
    )
    not_on_cpu: str | None = Field(default=None, description="Why CPUs do not compute what it promises.")

    def text_for(self, shape: ModelShape) -> str:
        """The recipe as llm-compressor reads it, for a model of this shape.

        Raises:
            BuildError: the model's widths cannot be quantized this way.
        """
        self._check_widths(shape)
        return self._fill(self.modifiers, shape)

    def precision_for(self, shape: ModelShape) -> Precision:
        """What comes out for a model of this shape.

        Raises:
            BuildError: the model's widths cannot be quantized this way.
        """
        self._check_widths(shape)
        precision = self.precision
        if precision.weights.scale == "group":
            weights = precision.weights.model_copy(update={"size": self._group_size(shape)})
            precision = precision.model_copy(update={"weights": weights})
        kept = tuple(self._fill(pattern, shape) for pattern in precision.unquantized)
        return precision.model_copy(update={"unquantized": kept})

    def why_not_on(self, backend: str, compute_capability: float | None) -> str | None:
        """Why this hardware does not compute what the recipe promises; None where nothing speaks against it."""
        if backend == "cpu":
            return self.not_on_cpu
        if compute_capability is None:
            return None
        if compute_capability < self.compute_capability:
            return (
                f"it needs a GPU of compute capability {self.compute_capability}, and this one has "
                f"{compute_capability}"
            )
        if self.below_capability is not None and compute_capability >= self.below_capability:
            return (
                f"from compute capability {self.below_capability} on vLLM attends in other formats, and "
                f"this GPU has {compute_capability}"
            )
        return None

    def _fill(self, text: str, shape: ModelShape) -> str:
        if "{group_size}" in text:
            text = text.replace("{group_size}", str(self._group_size(shape)))
        return text.replace("{last}", str(shape.num_hidden_layers - 1))

    def _group_size(self, shape: ModelShape) -> int:
        """The first of the recipe's group sizes that divides the input width of every linear layer."""
        for size in self.group_sizes:
            if all(width % size == 0 for width in shape.linear_inputs):
                return size
        raise BuildError(
            f"Recipe {self.name}: no group size of {self.group_sizes} divides the layer widths "
            f"{shape.linear_inputs}; take another recipe."
        )

    def _check_widths(self, shape: ModelShape) -> None:
        odd = [width for width in shape.linear_widths if width % self.multiple_of]
        if odd:
            raise BuildError(
                f"Recipe {self.name} needs layer widths that {self.multiple_of} divides, and this model has "
                f"{odd[0]}; take another recipe, such as fp8-dynamic."
            )


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name: the reference's first, then by precision and name."""
    every = [Recipe.model_validate(yaml.safe_load(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))]
    order = ["bf16", "fp8", "int4"]
    return {each.name: each for each in sorted(every, key=lambda each: order.index(each.precision.name))}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: there is none; the sentence lists those there are.
    """
    try:
        return recipes()[name]
    except KeyError:
        raise ConfigError(f"There is no recipe {name!r}; the recipes are {', '.join(recipes())}.") from None
