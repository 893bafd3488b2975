"""What an engine computes is held against what its checkpoint declares, layer by layer."""

from collections.abc import Callable

import pytest

from tests.tiers.test_recipe import SMOL
from tiers.precision import BF16, FP8, IN_BF16, NumberFormat, Precision, int4
from tiers.probe.reading import AttentionReading, EngineReading, LayerReading
from tiers.recipe import find_recipe
from tiers.verification import verify_precision

FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}
Change = Callable[[EngineReading], EngineReading]


def reading(precision: Precision, rank: int = 0) -> EngineReading:
    """An engine that runs the embedded model as declared."""
    layers = []
    for block in range(SMOL.num_hidden_layers):
        for name, parts in FUSED.items():
            prefix = f"model.layers.{block}.{name.split('.')[0]}"
            layers.append(
                LayerReading(
                    name=f"model.layers.{block}.{name}",
                    parts=tuple(f"{prefix}.{part}" for part in parts),
                    kernel="Kernel",
                    weights=precision.weights,
                    activations=precision.activations,
                )
            )
    return EngineReading(
        rank=rank,
        vllm="0.32.0",
        torch="2.13.0",
        device="cpu",
        model_class="LlamaForCausalLM",
        layers=tuple(layers),
        attention=tuple(
            AttentionReading(
                name=f"model.layers.{block}.self_attn.attn",
                backend="CPU_ATTN",
                kv_cache=precision.kv_cache,
                query=precision.attention,
            )
            for block in range(SMOL.num_hidden_layers)
        ),
        ends={"embedding": IN_BF16, "head": precision.head},
        head_kernel="mm",
        config_hash="1",
        environment_hash="2",
    )


def with_layer(index: int, **fields: object) -> Change:
    def change(good: EngineReading) -> EngineReading:
        layers = list(good.layers)
        layers[index] = layers[index].model_copy(update=fields)
        return good.model_copy(update={"layers": tuple(layers)})

    return change


def without_layer(good: EngineReading) -> EngineReading:
    return good.model_copy(update={"layers": good.layers[1:]})


def with_kv_in_fp8(good: EngineReading) -> EngineReading:
    kept = NumberFormat(type="fp8_e4m3", scale="tensor")
    return good.model_copy(
        update={"attention": tuple(a.model_copy(update={"kv_cache": kept}) for a in good.attention)}
    )


def with_head(number: NumberFormat) -> Change:
    return lambda good: good.model_copy(update={"ends": good.ends | {"head": number}})


@pytest.mark.parametrize("precision", [BF16, FP8, int4(64), int4(32, symmetric=False)], ids=lambda p: p.name)
def test_what_is_declared_and_read_agrees(precision: Precision) -> None:
    verified = verify_precision(precision, [reading(precision)], SMOL)
    assert verified.agrees
    assert verified.disagreements == ()
    assert verified.weights == precision.weights
    assert verified.activations == precision.activations
    assert verified.kv_cache == verified.head == IN_BF16
    assert [group.count for group in verified.layers] == [120]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            with_layer(5, activations=NumberFormat(type="int8", scale="token", dynamic=True)),
            r"activations: declared BF16, and 1 of 120 run INT8, a dynamic scale per token "
            r"\(model\.layers\.1\.self_attn\.o_proj, Kernel\)",
        ),
        (with_layer(0, weights=IN_BF16), r"weights: declared INT4, .* and 1 of 120 run BF16"),
        (with_layer(0, weights=int4(128).weights), "run INT4, a scale per group of 128"),
        (with_layer(0, weights=int4(64, symmetric=False).weights), "a scale and a zero point per group of 64"),
        (with_layer(0, weights=None), "run something unknown"),
        (without_layer, r"model\.layers\.0\.self_attn\.k_proj and 2 further layers were not found"),
        (with_kv_in_fp8, "KV cache: declared BF16, and 30 of 30 run FP8 E4M3"),
        (with_head(NumberFormat(type="fp16")), "head: declared BF16, and 1 of 1 run FP16"),
    ],
)
def test_any_difference_is_named(change: Change, sentence: str) -> None:
    precision = int4(64)
    verified = verify_precision(precision, [change(reading(precision))], SMOL)
    assert not verified.agrees
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError("; ".join(verified.disagreements))


def test_a_lite_engine_is_no_turbo() -> None:
    verified = verify_precision(FP8, [reading(int4(64))], SMOL)
    assert not verified.agrees
    assert verified.weights == int4(64).weights, "it shows what runs, not what was declared"


def test_an_engine_that_can_be_broken_serves_nobody() -> None:
    breakable = reading(FP8).model_copy(update={"takes_faults": True})
    assert not verify_precision(FP8, [breakable], SMOL).agrees
    assert "faults can be planted" in verify_precision(FP8, [breakable], SMOL).disagreements[0]
    assert verify_precision(FP8, [breakable], SMOL, takes_faults=True).agrees
    assert breakable.fingerprint != reading(FP8).fingerprint


def test_every_worker_counts() -> None:
    bad = with_layer(7, weights=IN_BF16)(reading(FP8, rank=1))
    verified = verify_precision(FP8, [reading(FP8), bad], SMOL)
    assert "of worker 1" in verified.disagreements[0]
    assert verified.workers == 2


def test_pipeline_stages_are_one_model() -> None:
    whole = reading(FP8)
    first = whole.model_copy(
        update={"layers": whole.layers[:60], "attention": whole.attention[:15], "ends": {"embedding": IN_BF16}}
    )
    last = whole.model_copy(
        update={
            "rank": 1,
            "layers": whole.layers[60:],
            "attention": whole.attention[15:],
            "ends": {"head": IN_BF16},
        }
    )
    assert verify_precision(FP8, [first, last], SMOL).agrees
    assert not verify_precision(FP8, [first], SMOL).agrees


def test_layers_that_a_recipe_keeps_in_bf16_must_be_bf16() -> None:
    declared = find_recipe("fp8-mlp").precision_for(SMOL)
    quantized = reading(FP8)
    assert not verify_precision(declared, [quantized], SMOL).agrees
    kept = quantized
    for index, layer in enumerate(quantized.layers):
        block = int(layer.name.split(".")[2])
        if "self_attn" in layer.name or block in (0, 29):
            kept = with_layer(index, weights=IN_BF16, activations=IN_BF16)(kept)
    verified = verify_precision(declared, [kept], SMOL)
    assert verified.agrees
    assert verified.weights == FP8.weights
    assert {group.count for group in verified.layers} == {56, 64}


def test_the_fingerprint_changes_with_what_runs() -> None:
    good = reading(FP8)
    assert good.fingerprint == reading(FP8, rank=3).fingerprint
    assert good.fingerprint != with_layer(3, kernel="Other")(good).fingerprint
