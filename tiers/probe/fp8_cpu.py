"""An FP8 matrix product for CPUs: the same FP8 values, products and sums, held in FP32.

vLLM's own kernel there calls ``torch._scaled_mm`` with per-tensor scales. On an AMX CPU without AMX-FP16 oneDNN
was seen to run its scalar reference loop for that, seconds for every token; others may have a fast path.

Each FP8 number is an FP32 number and each product of two is exact in FP32, so a plain FP32 product computes what
W8A8 means: weights and activations rounded to FP8, sums in FP32, scales applied once at the end. It costs four
bytes a weight.
"""

import torch
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.platforms import current_platform


class CPUFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """C = sₓ · s_w · (X · W) + b with X and W in FP8, for per-channel or per-tensor scales."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Only on the CPU; GPUs have real FP8 units."""
        return current_platform.is_cpu(), "requires a CPU."

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Block scales need another product."""
        weight, activation = c.weight_quant_key.scale.group_shape, c.activation_quant_key.scale.group_shape
        whole = any((weight.is_per_tensor(), weight.is_per_channel(), weight.is_per_token())) and (
            activation.is_per_tensor() or activation.is_per_token()
        )
        return whole, "requires one scale per tensor, channel or token."

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Keep the FP8 values once more as FP32, [N, K]; vLLM holds the weight as [K, N]."""
        weight = getattr(layer, self.layer_param_names[0])
        layer.fp8_values_in_fp32 = weight.t().float().contiguous()

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor | QuantizedActivation, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantize ``x`` [..., K] to FP8 as vLLM does, multiply, scale: [..., N] in the layer's output type."""
        assert isinstance(x, torch.Tensor), "only a kernel that says so is given quantized activations"
        weight = layer.fp8_values_in_fp32
        assert isinstance(weight, torch.Tensor)
        _, weight_scale, input_scale, input_scale_bound = self._get_layer_params(layer)
        rows = x.reshape(-1, x.shape[-1])
        quantized, row_scale = self.quant_fp8(rows, input_scale, input_scale_bound)
        product = torch.nn.functional.linear(quantized.float(), weight)
        product *= row_scale
        product *= weight_scale.view(1, -1)
        if bias is not None:
            product += bias
        return product.to(self.config.out_dtype or x.dtype).view(*x.shape[:-1], -1)

    def apply_scaled_mm(self, **_: object) -> torch.Tensor:
        """Not reached: `apply_weights` does all of it."""
        raise AssertionError("apply_weights is complete in itself")
