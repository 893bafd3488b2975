"""What kernels.fakequant quantizes is, bit for bit, what compressed-tensors writes and vLLM reads.

Needs compressed-tensors and vLLM, which take seconds to import, and no running engine.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.fakequant import (
    Scales,
    Scheme,
    dequantize,
    fake_quantize,
    pack_int4,
    quantize,
    scales_of,
    unpack_int4,
)

ROWS, COLUMNS = 10, 384
SCHEMES = {
    "FP8 tensor": Scheme("fp8", "tensor"),
    "FP8 channel": Scheme("fp8", "channel"),
    "FP8 token": Scheme("fp8", "token"),
    "FP8 head": Scheme("fp8", "head"),
    "FP8 block": Scheme("fp8", "block", 128),
    "INT8 tensor": Scheme("int8", "tensor"),
    "INT8 channel": Scheme("int8", "channel"),
    "INT8 group": Scheme("int8", "group", 64),
    "INT8 group asymmetric": Scheme("int8", "group", 64, symmetric=False),
    "INT4 channel": Scheme("int4", "channel"),
    "INT4 group": Scheme("int4", "group", 32),
    "INT4 group asymmetric": Scheme("int4", "group", 128, symmetric=False),
    "INT4 channel asymmetric": Scheme("int4", "channel", symmetric=False),
}


def values(scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, and such as no weight should be: zero, constant, tiny, huge, one value alone, ties."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2] = 0.3
    x[3] = -2.5
    x[4] *= 1e-38
    x[5] *= 1e37
    x[6, :] = 0
    x[6, 7] = -1.0
    x[7] = torch.arange(COLUMNS) / 16 - 12
    x[8] = x[8].abs()
    x = x.to(dtype)
    if scheme.shared == "token":
        return x.reshape(2, ROWS // 2, COLUMNS)
    return x.reshape(ROWS, 6, 8, 8).transpose(0, 1) if scheme.shared == "head" else x


def theirs(scheme: Scheme, x: torch.Tensor) -> tuple[Any, ...]:
    """The scale, the zero point, the values and what they stand for, by compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=4 if scheme.number == "int4" else 8,
        type="float" if scheme.number == "fp8" else "int",
        symmetric=scheme.symmetric,
        strategy={"head": "attn_head"}.get(scheme.shared, scheme.shared),
        dynamic=scheme.shared == "token",
        group_size=scheme.size if scheme.shared == "group" else None,
        block_structure=[scheme.size, scheme.size] if scheme.shared == "block" else None,
    )
    if scheme.shared == "token":
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    else:
        seen = observed(scheme, x)
        scale, zero = calculate_qparams(seen.amin((0, -1)), seen.amax((0, -1)), args)
    held = torch.float8_e4m3fn if scheme.number == "fp8" else torch.int8
    quantized = forward.quantize(x, scale, zero, args, dtype=held)
    return scale, None if scheme.symmetric else zero, quantized, forward.dequantize(quantized, scale, zero, args)


def observed(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """As llm-compressor's ``flatten_for_calibration`` has it: observations first, what shares a scale last."""
    from compressed_tensors.quantization.utils import maybe_pad_tensor_for_block_quant

    size = scheme.size
    match scheme.shared:
        case "tensor":
            return x.reshape(1, 1, -1)
        case "channel":
            return x.unsqueeze(-2).unsqueeze(0)
        case "head":
            return x.transpose(1, 2).flatten(0, 1).unsqueeze(-2).unsqueeze(-2)
        case "group":
            return x.reshape(1, *x.shape[:-1], -1, size)
    padded: torch.Tensor = maybe_pad_tensor_for_block_quant(x, (size, size))
    down, across = padded.shape[0] // size, padded.shape[1] // size
    return padded.reshape(down, size, across, size).transpose(1, 2).flatten(-2).unsqueeze(0)


def assert_same_bits(ours: torch.Tensor | None, other: torch.Tensor | None) -> None:
    if ours is None or other is None:
        assert ours is other
        return
    assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.contiguous().view(as_bits), other.contiguous().view(as_bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_scales_values_and_what_they_stand_for_are_those_of_compressed_tensors(
    name: str, dtype: torch.dtype
) -> None:
    scheme = SCHEMES[name]
    x = values(scheme, dtype)
    ours = quantize(x, scheme)
    scale, zero, quantized, stood_for = theirs(scheme, x)
    assert_same_bits(ours.scales.scale, scale)
    assert_same_bits(ours.scales.zero_point, zero)
    assert_same_bits(ours.values, quantized)
    assert_same_bits(dequantize(ours, scheme), stood_for)
    assert_same_bits(fake_quantize(x, scheme), stood_for)


@pytest.mark.parametrize("columns", [32, 40, 37])
def test_int4_is_packed_as_compressed_tensors_packs_it(columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    numbers = torch.randint(-8, 8, (6, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    whole = columns // 8  # what lies beyond the last value is nobody's
    assert_same_bits(pack_int4(numbers)[:, :whole], pack_to_int32(numbers, 4)[:, :whole])
    assert_same_bits(unpack_int4(pack_to_int32(numbers, 4), columns), numbers)


def test_activations_become_what_vllm_makes_of_them_but_for_ties() -> None:
    """vLLM multiplies by the scale's reciprocal, so that here and there a value rounds the other way."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    x = torch.randn(512, 576, generator=torch.Generator().manual_seed(2))
    with set_current_vllm_config(VllmConfig()):
        read, scale = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN).forward_native(x)
    ours = quantize(x, SCHEMES["FP8 token"])
    assert_same_bits(ours.scales.scale, scale)
    other = ours.values.view(torch.uint8) != read.view(torch.uint8)
    assert other.float().mean() < 1e-3
    steps = ours.values.view(torch.uint8)[other].int() - read.view(torch.uint8)[other].int()
    assert (steps.abs() <= 1).all()


def test_int8_activations_become_what_vllm_makes_of_them_and_not_what_compressed_tensors_does() -> None:
    from vllm import _custom_ops as ops

    scheme = Scheme("int8", "token")
    x = torch.randn(512, 576, generator=torch.Generator().manual_seed(2))
    read, scale, _ = ops.scaled_int8_quant(x, symmetric=True)
    ours = quantize(x, scheme)
    torch.testing.assert_close(ours.scales.scale, scale, rtol=1e-6, atol=0)
    other = (ours.values.int() - read.int()).abs()
    assert other.max() <= 1
    assert other.float().mean() < 1e-3
    assert not torch.allclose(theirs(scheme, x)[0], scale, rtol=1e-3)


def test_vllms_cache_on_cpus_cuts_off_where_everybody_else_rounds_and_does_not_when_it_is_mended() -> None:
    """Its kernel of 0.32.0. When it rounds by itself some day, this fails, and the mending can go."""
    from vllm import _custom_ops as ops

    from tiers.probe.fp8_kv_cpu import mend

    mended = SimpleNamespace(cpu_attn_reshape_and_cache=ops.cpu_attn_reshape_and_cache)
    mend(mended)
    tokens, heads, width = 32, 3, 64
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(tokens, heads, width, generator=generator).bfloat16() * 3 for _ in range(2))
    value[0, 0, 0], value[1, 0, 1], value[2] = 1e5, -1e5, 0
    places, scale = torch.arange(tokens), 0.0131
    for operators in (ops, mended):
        keys, values = (torch.zeros(1, heads, tokens, width, dtype=torch.uint8) for _ in range(2))
        scales = {"k_scale": scale, "v_scale": scale, "kv_cache_dtype": "fp8_e4m3"}
        operators.cpu_attn_reshape_and_cache(key, value, keys, values, places, "vec", **scales)
        held = (keys[0].reshape(heads, width, tokens).transpose(1, 2), values[0])  # keys lie across
        for given, read in zip((key, value), held, strict=True):
            by_head = given.transpose(0, 1).unsqueeze(0)
            ours = quantize(by_head.float(), Scheme("fp8", "tensor"), Scales(torch.tensor([scale]), None)).values[
                0
            ]
            cut = ours.float().abs() > (by_head[0].float() / scale).abs()
            assert 0.3 < cut.float().mean() < 0.7
            off = cut.to(torch.uint8) if operators is ops else 0
            assert torch.equal(read, ours.view(torch.uint8) - off)


def test_every_process_of_an_engine_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    from tiers.probe import plugin

    for name in ("keep_log_clean", "keep_seeds", "wait_with_naps", "register_linear_kernel"):
        monkeypatch.setattr(plugin, name, lambda *_: None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    write = _custom_ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(_custom_ops, "cpu_attn_reshape_and_cache", write)  # and again afterwards
    plugin.register()
    assert _custom_ops.cpu_attn_reshape_and_cache is not write


def test_what_is_quantized_and_packed_here_is_what_their_compressor_writes() -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    scheme = Scheme("int4", "group", 32, symmetric=False)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
    scales = scales_of(weight, scheme)
    state = {"weight": weight, "weight_scale": scales.scale, "weight_zero_point": scales.zero_point}
    theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    assert scales.zero_point is not None
    assert_same_bits(pack_int4(quantize(weight, scheme).values), theirs["weight_packed"])
    assert_same_bits(pack_int4(scales.zero_point.t()).t(), theirs["weight_zero_point"])
