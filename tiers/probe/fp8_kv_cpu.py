"""What is written into an FP8 KV cache on CPUs is rounded. Loaded inside the engine.

vLLM 0.32.0 cuts keys and values off towards zero there, so that they are too small, by 4% on average. Here it is
given the FP8 numbers that they round to, each a little too large, so that what it cuts off is only that.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform

from kernels.fakequant import Scales, Scheme, fake_quantize

_SCHEME = Scheme("fp8", "tensor")
_BEYOND = 1 + 2**-7
"""More than BF16 rounds off again, and far from the next FP8 number."""


def round_into_cache() -> None:
    """From now on, on CPUs, an FP8 KV cache holds the nearest numbers."""
    if current_platform.is_cpu():
        mend(_custom_ops)


def mend(operators: Any) -> None:
    """Of vLLM's operators: have the one that writes into the cache cut off nothing."""
    write = operators.cpu_attn_reshape_and_cache

    def written(
        key: Tensor,
        value: Tensor,
        *places: Any,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        if kv_cache_dtype in ("fp8", "fp8_e4m3"):
            key, value = _rounded(key, k_scale), _rounded(value, v_scale)
        write(key, value, *places, k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=kv_cache_dtype)

    operators.cpu_attn_reshape_and_cache = written


def _rounded(x: Tensor, scale: float) -> Tensor:
    numbers = fake_quantize(x.float(), _SCHEME, Scales(torch.tensor([scale]), None))
    return (numbers * _BEYOND).to(x.dtype)
