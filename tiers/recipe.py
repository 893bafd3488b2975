"""How a tier's weights are made from the reference's. Each recipe has a name and a text for llm-compressor."""

from pydantic import BaseModel, ConfigDict

from tiers.catalog import ModelShape
from tiers.errors import BuildError, ConfigError
from tiers.precision import BF16, FP8, INT4, Precision

GROUP_SIZES = (128, 64, 32)
"""Tried from the coarsest: fewer scales, faster kernels; the first that divides every layer is taken."""


class Tuning(BaseModel):
    """Gradient steps that follow a recipe's rounding; tiers/tuning.py takes them."""

    model_config = ConfigDict(frozen=True)

    steps: int
    batch: int = 16
    """Conversations a step."""
    learning_rate: float
    """The farthest a weight moves in one step, in steps of its grid."""
    seed: int = 20311

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of Adam on KL(reference ‖ model) through the rounding, "
            f"{self.batch} conversations a step, learning rate {self.learning_rate} grid steps, seed {self.seed}"
        )


class Recipe(BaseModel):
    """A named way to make a checkpoint.

    ``template`` is llm-compressor's own YAML, empty for the reference, which is taken as it is;
    ``{group_size}`` in it is filled in by `text_for`. ``tuning`` follows it, and needs calibration text.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    precision: Precision
    summary: str
    template: str = ""
    needs_calibration: bool = False
    tuning: Tuning | None = None

    def text_for(self, shape: ModelShape) -> str:
        """The whole recipe for a model of this shape: what llm-compressor reads, and the tuning as a comment.

        Raises:
            BuildError: no known group size divides the model's layers.
        """
        text = self.template
        if "{group_size}" in text:
            text = text.replace("{group_size}", str(group_size(shape)))
        return f"{text}# then tuned (tiers/tuning.py): {self.tuning}\n" if self.tuning else text


def group_size(shape: ModelShape) -> int:
    """The largest of `GROUP_SIZES` that divides the input width of every linear layer."""
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in shape.linear_inputs):
            return size
    raise BuildError(
        f"No group size of {GROUP_SIZES} divides the layer widths {shape.linear_inputs}: "
        "this model cannot be quantized in groups."
    )


_RECIPES = (
    Recipe(
        name="bf16",
        precision=BF16,
        summary="The source weights in BF16, as they are.",
    ),
    Recipe(
        name="fp8-dynamic",
        precision=FP8,
        summary=(
            "All linear layers but the head, W8A8: FP8 E4M3 weights with a scale per output channel, "
            "activations quantized per token while the engine runs. Needs no calibration; takes seconds."
        ),
        template="""\
default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: FP8_DYNAMIC
""",
    ),
    Recipe(
        name="w4a16-gptq",
        precision=INT4,
        summary=(
            "All linear layers but the head, W4A16: symmetric INT4 weights in groups, rounded by GPTQ so that "
            "each layer's output error on calibration text is least; activations stay BF16. "
            "Calibrates on chats that the reference itself answered; takes a minute for 135M parameters."
        ),
        template="""\
default_stage:
  default_modifiers:
    GPTQModifier:
      targets: [Linear]
      ignore: [lm_head]
      dampening_frac: 0.01
      config_groups:
        group_0:
          targets: [Linear]
          weights:
            num_bits: 4
            type: int
            symmetric: true
            strategy: group
            group_size: {group_size}
""",
        needs_calibration=True,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: there is none; the sentence lists those there are.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise ConfigError(f"There is no recipe {name!r}; the recipes are {', '.join(RECIPES)}.") from None
