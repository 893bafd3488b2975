"""vLLM's entry point into Assay: called once in every process of an engine, before a model is loaded."""

from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.platforms.interface import PlatformEnum

from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel


def register() -> None:
    """Offer vLLM our kernels; each says itself where it applies."""
    register_linear_kernel(CPUFP8ScaledMMLinearKernel, PlatformEnum.CPU, "fp8")
