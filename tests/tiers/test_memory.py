"""Bytes are counted, not guessed: they are those of checkpoints that exist."""

import pytest

from tiers.catalog import Linear, ModelShape, find_member
from tiers.errors import ConfigError
from tiers.hardware import find_card
from tiers.memory import Batch, Degree, activation_bytes, gpu_footprint, kv_bytes_per_token, weights_of
from tiers.precision import NumberFormat
from tiers.recipe import Recipe, find_recipe, recipes
from tiers.storage import bytes_of, stored
from tiers.tier import Resources

SMOL = find_member("SmolLM2-135M-Instruct").shape
LLAMA_8B = find_member("Llama-3.1-8B").shape
LLAMA_405B = find_member("Llama-3.1-405B").shape
GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "size"), [("bf16", 269_030_016), ("fp8-dynamic", 163_172_736), ("w4a16-gptq", 113_098_656)]
)
def test_the_embedded_models_checkpoints_are_counted_to_the_byte(name: str, size: int) -> None:
    """The sizes are those of the tensors in the checkpoints that llm-compressor 0.14 wrote."""
    assert weights_of(SMOL, find_recipe(name)).total == size


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_405B], ids=["8B", "405B"])
def test_the_size_of_every_recipe_is_known(recipe: Recipe, shape: ModelShape) -> None:
    weights = weights_of(shape, recipe)
    assert weights.total <= shape.parameters * 2
    if recipe.modifiers:
        assert weights.total < 0.75 * shape.parameters * 2


def test_metas_own_fp8_release_takes_what_vllm_saw() -> None:
    """57.75 GiB on each of eight GPUs (vllm-project/vllm#6746): feed-forward only, first and last layer in BF16,
    in the revision that stored 16 KV heads."""
    shape = LLAMA_405B.model_copy(update={"num_key_value_heads": 16})
    weights = weights_of(shape, find_recipe("fp8-mlp"))
    assert weights.on_one(Degree(8), 126) / GIB == pytest.approx(57.75, abs=0.05)


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        (NumberFormat(type="bf16"), 256 * 512 * 2),
        (NumberFormat(type="fp8_e4m3", scale="tensor"), 256 * 512 + 2),
        (NumberFormat(type="fp8_e4m3", scale="channel"), 256 * 512 + 512 * 2),
        (NumberFormat(type="fp8_e4m3", scale="block", size=128), 256 * 512 + 2 * 4 * 2),
        (NumberFormat(type="int4", scale="group", size=128), 256 * 512 // 2 + 512 * 2 * 2 + 16),
        (
            NumberFormat(type="int4", scale="group", size=32, symmetric=False),
            256 * 512 // 2 + 512 * 8 * 2 + 512 * 8 // 2 + 16,
        ),
    ],
    ids=str,
)
def test_scales_and_zero_points_are_counted(weights: NumberFormat, size: int) -> None:
    assert bytes_of(Linear("x", inputs=256, outputs=512), weights) == size


def test_layers_that_a_recipe_leaves_alone_are_counted_in_bf16() -> None:
    found = {layer.name: str(weights) for layer, weights in stored(find_recipe("fp8-mlp"), SMOL)}
    assert found["model.layers.0.mlp.up_proj"] == found["model.layers.1.self_attn.q_proj"] == "BF16"
    assert found["model.layers.1.mlp.up_proj"].startswith("FP8")


def test_a_quantized_kv_cache_halves_a_token() -> None:
    assert kv_bytes_per_token(LLAMA_8B, find_recipe("fp8-dynamic")) == 128 * 1024
    assert kv_bytes_per_token(LLAMA_8B, find_recipe("fp8-kv")) == 64 * 1024


@pytest.mark.parametrize(
    ("degree", "kib"),
    [(Degree(), 504), (Degree(8), 63), (Degree(16), 63), (Degree(8, 2), 31.5)],
    ids=str,
)
def test_kv_heads_are_dealt_out_and_then_repeated(degree: Degree, kib: float) -> None:
    assert kv_bytes_per_token(LLAMA_405B, find_recipe("bf16"), degree) == kib * 1024


@pytest.mark.parametrize(
    ("card", "tokens", "sequences"),
    [("B200", 16384, 1024), ("H100", 8192, 1024), ("A100-80GB", 2048, 256), ("L4", 2048, 256)],
)
def test_batches_are_vllms_defaults_for_the_card(card: str, tokens: int, sequences: int) -> None:
    assert Batch.of(Resources(), find_card(card)) == Batch(tokens, sequences)


def test_the_config_may_change_the_batch() -> None:
    resources = Resources(max_num_seqs=7, engine_args={"max_num_batched_tokens": 512})
    assert Batch.of(resources, None) == Batch(512, 7)


def test_no_more_requests_run_at_once_than_a_step_has_tokens_unless_the_config_says_so() -> None:
    small = Resources(engine_args={"max-num-batched-tokens": 64})
    assert Batch.of(small, None) == Batch(64, 64)
    assert Batch.of(small.model_copy(update={"max_num_seqs": 100}), None) == Batch(64, 100)


def test_a_batch_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max-num-batched-tokens must be a plain number, and it is '8k'"):
        Batch.of(Resources(engine_args={"max-num-batched-tokens": "8k"}), None)


def test_activations_are_of_the_larger_of_two_moments() -> None:
    """8B, 8192 tokens: 64 MiB of hidden states, beside them 128 + 672 MiB, or the logits of 1024 sequences."""
    mib = 1 << 20
    assert activation_bytes(LLAMA_8B, Degree(), Batch(8192, 1)) == (64 + 128 + 672) * mib
    assert activation_bytes(LLAMA_8B, Degree(), Batch(8192, 1024)) == 64 * mib + 1024 * 128256 * 14


def test_a_footprint_adds_up_and_shrinks_with_more_gpus() -> None:
    weights, batch = weights_of(LLAMA_405B, find_recipe("bf16")), Batch(8192, 1024)
    one, eight, sixteen = (
        gpu_footprint(LLAMA_405B, find_recipe("bf16"), weights, degree, batch)
        for degree in (Degree(), Degree(8), Degree(8, 2))
    )
    assert one.weights == weights.total == 811_706_777_600
    assert one.fixed > eight.fixed > sixteen.fixed
    assert sixteen.fixed == sixteen.weights + sixteen.activations + sixteen.graphs + sixteen.overhead
