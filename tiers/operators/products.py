"""Matrix products: linear layers at each precision, and the head."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import linear
from kernels.rounding import Allowance, accumulated, rounded, shared, stored, unit_roundoff, weighted
from tiers.operators.bench import Bench
from tiers.operators.bench import says as told
from tiers.operators.judgement import Absent, Case, compared
from tiers.operators.storing import FUSED, Storage
from tiers.probe.worker import read_linear
from tiers.recipe import recipes

BF16, FP32 = torch.bfloat16, torch.float32
GIVEN = {"qkv_proj": "normed", "o_proj": "attended", "gate_up_proj": "normed_mlp", "down_proj": "inner"}
"""What each layer's input is called."""
_HEAD_ROWS = 16
COMPARED = 1024
"""Outputs of a layer that are compared: the first, the last and others drawn; all where there are no more."""
_FP8_TOLERANCE = 4 * unit_roundoff(FP32)
"""Of x / scale: a scale, its reciprocal and the product are rounded."""
_FEW = 4.0


def linear_bf16(bench: Bench) -> Iterator[Case | Absent]:
    """Products of BF16 are exact in FP32, in which they are summed."""
    on_disk = bench.layer("bf16").stored

    def of(layer: str, outputs: Tensor, x: Tensor) -> tuple[Tensor, Allowance]:
        return _summed(x, on_disk.fused(layer, "weight")[outputs])

    yield from _each_layer(bench, "bf16", of)


def linear_fp8(bench: Bench) -> Iterator[Case | Absent]:
    """A value near the middle of two FP8 numbers may become either; sums in FP32, and scales at the end."""
    on_disk = bench.layer("fp8").stored

    def of(layer: str, outputs: Tensor, x: Tensor) -> tuple[Tensor, Allowance]:
        scale = on_disk.fused(layer, "weight_scale")[outputs].double()
        weight = on_disk.fused(layer, "weight")[outputs].double() * scale
        given = linear.quantized_input(x, linear.token_scales(x), _FP8_TOLERANCE)
        exact = linear.linear(given.values, weight)
        total = given.values.abs() @ weight.abs().T
        either = given.either @ weight.abs().T
        allowed = accumulated(x.shape[-1], total, FP32) + rounded(exact, FP32, _FEW) + shared(either)
        return exact, stored(exact, allowed, BF16)

    yield from _each_layer(bench, "fp8", of)


def linear_fp8_block(bench: Bench) -> Iterator[Case | Absent]:
    """Not on CPUs: the recipe says why."""
    from vllm.platforms import current_platform

    recipe = recipes()["fp8-block"]
    reason = recipe.why_not_on("cpu" if current_platform.is_cpu() else "cuda", None)
    yield Absent(reason or "it is not held to its definition yet: kernels.linear has it")


def linear_int4(bench: Bench) -> Iterator[Case | Absent]:
    """Symmetric groups."""
    return _int4(bench, "int4")


def linear_int4_asymmetric(bench: Bench) -> Iterator[Case | Absent]:
    """Groups with zero points."""
    return _int4(bench, "int4-asymmetric")


def _int4(bench: Bench, storage: Storage) -> Iterator[Case | Absent]:
    """Weights are made BF16 again, which rounds each of them, and then multiplied as those are."""
    on_disk = bench.layer(storage).stored

    def of(layer: str, outputs: Tensor, x: Tensor) -> tuple[Tensor, Allowance]:
        return _summed(x, on_disk.packed(layer).values()[outputs], rounds_weights=True)

    yield from _each_layer(bench, storage, of)


def head(bench: Bench) -> Iterator[Case | Absent]:
    """Logits leave it in BF16."""
    one = bench.layer("bf16")
    weight = bench.inputs.weights["head"]
    outputs = _some(len(weight))
    for x in (rows[:_HEAD_ROWS] for rows in bench.rows("final")):
        ran = one.run(lambda given: one.model.compute_logits(given), x)
        exact, allowed = _summed(x, weight[outputs])
        layer = one.model.lm_head
        kernel = f"{type(one.model.logits_processor).__name__}, {read_linear('head', layer, {}).kernel}"
        says = told(f"{weight.shape[1]} → {len(weight)}", len(x))
        yield compared(kernel, says, ran[:, outputs], exact, allowed)


def _each_layer(
    bench: Bench, storage: Storage, of: Callable[[str, Tensor, Tensor], tuple[Tensor, Allowance]]
) -> Iterator[Case | Absent]:
    one = bench.layer(storage)
    for name in FUSED:
        part = one.block.self_attn if name in ("qkv_proj", "o_proj") else one.block.mlp
        layer = getattr(part, name)
        outputs = _some(layer.output_size)
        for x in bench.rows(GIVEN[name]):
            ran = one.run(layer, x)
            ran = ran[0] if isinstance(ran, tuple) else ran
            exact, allowed = of(name, outputs, x)
            says = told(f"{name} {x.shape[-1]} → {layer.output_size}", len(x))
            yield compared(read_linear(name, layer, {}).kernel, says, ran[:, outputs], exact, allowed)


def _summed(x: Tensor, weight: Tensor, *, rounds_weights: bool = False) -> tuple[Tensor, Allowance]:
    """x Wᵀ, and what summing in FP32, and rounding each weight to BF16 before, may change."""
    x, weight = x.double(), weight.double()
    exact = linear.linear(x, weight)
    total = x.abs() @ weight.abs().T
    allowed = accumulated(x.shape[-1], total, FP32)
    if rounds_weights:
        allowed = allowed + weighted(total, x.square() @ weight.square().T, BF16)
    return exact, stored(exact, allowed, BF16)


def _some(outputs: int) -> Tensor:
    if outputs <= COMPARED:
        return torch.arange(outputs)
    drawn = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))[:COMPARED]
    some = torch.zeros(outputs, dtype=torch.bool)
    some[drawn] = some[0] = some[-1] = True
    return some.nonzero().squeeze(-1)
