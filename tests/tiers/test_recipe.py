"""Recipes are text for llm-compressor that fits the model's shape."""

import pytest
import yaml

from tiers.catalog import ModelShape, find_member
from tiers.errors import BuildError, ConfigError
from tiers.recipe import Recipe, find_recipe, recipes
from tiers.source import EMBEDDED_MODEL
from tiers.tier import TierKind

LLAMA_8B = find_member("Llama-3.1-8B-Instruct").shape
SMOL = find_member(EMBEDDED_MODEL).shape


@pytest.mark.parametrize(("shape", "size"), [(LLAMA_8B, 128), (SMOL, 64)])
def test_the_group_size_divides_every_layer(shape: ModelShape, size: int) -> None:
    assert find_recipe("w4a16-gptq").precision_for(shape).weights.size == size
    text = yaml.safe_load(find_recipe("w4a16-gptq").text_for(shape))
    groups = text["default_stage"]["default_modifiers"]["GPTQModifier"]["config_groups"]
    assert groups["group_0"]["weights"]["group_size"] == size


def test_a_shape_no_group_fits_is_refused() -> None:
    with pytest.raises(BuildError, match="no group size of"):
        find_recipe("w4a16-gptq").text_for(SMOL.model_copy(update={"intermediate_size": 1000}))


@pytest.mark.parametrize("kind", TierKind)
def test_every_tier_has_a_recipe_that_keeps_its_promise(kind: TierKind) -> None:
    assert find_recipe(kind.default_recipe).precision.name == kind.precision


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_described_and_leaves_the_head_alone(recipe: Recipe) -> None:
    assert len(recipe.summary) > 100
    assert "bits a weight" in recipe.summary
    if recipe.modifiers:
        modifiers = yaml.safe_load(recipe.text_for(LLAMA_8B))["default_stage"]["default_modifiers"].values()
        quantizing = [modifier for modifier in modifiers if "targets" in modifier]
        assert quantizing
        assert all("lm_head" in modifier["ignore"] for modifier in quantizing)


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
def test_what_a_recipe_declares_is_what_it_asks_for(recipe: Recipe) -> None:
    """Asymmetric recipes declare zero points, and no placeholder is left in text or patterns."""
    text, precision = recipe.text_for(LLAMA_8B), recipe.precision_for(LLAMA_8B)
    assert "{last}" not in text
    assert "{group_size}" not in text
    assert ("symmetric: false" in text) is not precision.weights.symmetric
    assert ("kv_cache_scheme" in text) is (precision.kv_cache.type == "fp8_e4m3")
    assert (precision.weights.scale == "group") is (precision.weights.size is not None and "group_size" in text)
    assert not any("{" in pattern for pattern in precision.unquantized)


def test_widths_that_a_block_does_not_divide_are_refused() -> None:
    with pytest.raises(BuildError, match="widths that 128 divides, and this model has 576"):
        find_recipe("fp8-block").text_for(SMOL)


def test_hardware_that_computes_something_else_is_named() -> None:
    assert "BF16" in str(find_recipe("fp8-block").why_not_on("cpu", None))
    assert "8.9" in str(find_recipe("fp8-dynamic").why_not_on("cuda", 8.0))
    assert find_recipe("fp8-dynamic").why_not_on("cuda", 8.9) is None
    assert "9.0" in str(find_recipe("fp8-attention").why_not_on("cuda", 8.9))
    assert "other formats" in str(find_recipe("fp8-kv").why_not_on("cuda", 9.0))
    assert find_recipe("fp8-kv").why_not_on("cuda", 8.9) is None
    assert find_recipe("fp8-kv").why_not_on("cpu", None) is None
    assert find_recipe("w4a16-gptq").why_not_on("cpu", None) is None


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="fp8-dynamic"):
        find_recipe("q4")
