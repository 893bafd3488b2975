"""Recipes are text for llm-compressor that fits the model's shape."""

import pytest
import yaml

from tiers.catalog import ModelShape
from tiers.errors import BuildError, ConfigError
from tiers.recipe import RECIPES, find_recipe, group_size
from tiers.tier import TierKind

LLAMA_8B = ModelShape(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
SMOL = ModelShape(
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(("shape", "size"), [(LLAMA_8B, 128), (SMOL, 64)])
def test_the_group_size_divides_every_layer(shape: ModelShape, size: int) -> None:
    assert group_size(shape) == size
    text = yaml.safe_load(find_recipe("w4a16-gptq").text_for(shape))
    groups = text["default_stage"]["default_modifiers"]["GPTQModifier"]["config_groups"]
    assert groups["group_0"]["weights"]["group_size"] == size


def test_a_shape_no_group_fits_is_refused() -> None:
    with pytest.raises(BuildError, match="cannot be quantized in groups"):
        group_size(SMOL.model_copy(update={"intermediate_size": 1000}))


@pytest.mark.parametrize("kind", TierKind)
def test_every_tier_has_a_recipe_that_keeps_its_promise(kind: TierKind) -> None:
    assert find_recipe(kind.default_recipe).precision.name == kind.precision


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_described_and_leaves_the_head_alone(recipe: object) -> None:
    from tiers.recipe import Recipe

    assert isinstance(recipe, Recipe)
    assert len(recipe.summary) > 20
    if recipe.template:
        (modifier,) = yaml.safe_load(recipe.text_for(SMOL))["default_stage"]["default_modifiers"].values()
        assert "lm_head" in modifier["ignore"]


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="fp8-dynamic"):
        find_recipe("q4")
