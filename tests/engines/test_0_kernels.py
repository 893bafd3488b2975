"""Our kernel inside vLLM computes what W8A8 means. Needs vLLM, not a running engine."""

# vLLM takes seconds to import, which collecting the fast tests must not pay for.

from typing import Any

import pytest
import torch

K, N = 576, 320


def layer() -> torch.nn.Module:
    """A linear layer as vLLM holds it after loading: FP8 weight [K, N], a scale per output channel [N, 1]."""
    made = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 448
    made.weight = torch.nn.Parameter((weight / scale).to(torch.float8_e4m3fn).t(), requires_grad=False)
    made.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    return made


def kernel() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8DynamicTokenSym,
        kFp8StaticTokenSym,
    )

    from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel

    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8StaticTokenSym,
        activation_quant_key=kFp8DynamicTokenSym,
        weight_shape=(N, K),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    with set_current_vllm_config(VllmConfig()):
        return CPUFP8ScaledMMLinearKernel(config, ["weight", "weight_scale", "input_scale", "input_scale_ub"])


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_the_product_is_that_of_the_fp8_values_in_float64(tokens: int) -> None:
    ours, linear = kernel(), layer()
    ours.process_weights_after_loading(linear)
    x = torch.randn(2, tokens, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = ours.apply_weights(linear, x, bias)
    assert out.shape == (2, tokens, N)
    assert out.dtype == torch.bfloat16

    rows = x.reshape(-1, K).float()
    row_scale = rows.abs().amax(1, keepdim=True) / 448
    quantized = (rows / row_scale).to(torch.float8_e4m3fn).double()
    assert isinstance(linear.weight, torch.Tensor)
    assert isinstance(linear.weight_scale, torch.Tensor)
    column_scale = linear.weight_scale.double().t()
    truth = quantized @ linear.weight.double() * row_scale.double() * column_scale + bias.double()
    # One rounding to BF16 at the end, and here and there an activation rounded the other way.
    torch.testing.assert_close(out.reshape(-1, N).double(), truth, rtol=2**-7, atol=0.05 * truth.std().item())
    error = (out.reshape(-1, N).double() - truth).norm() / truth.norm()
    assert error < 0.004

    unquantized = rows.double() @ (linear.weight.double() * column_scale) + bias.double()
    assert (out.reshape(-1, N).double() - unquantized).norm() / unquantized.norm() > 0.01, "activations are FP8"


def test_it_is_refused_where_it_would_be_wrong() -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel

    block = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8Static128BlockSym,
        activation_quant_key=kFp8Dynamic128Sym,
        weight_shape=(N, K),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    assert CPUFP8ScaledMMLinearKernel.can_implement(block)[0] is False
