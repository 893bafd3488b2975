"""vLLM's entry point into Assay: called once in every process of an engine, before a model is loaded."""

from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.platforms.interface import PlatformEnum

from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel
from tiers.probe.log import keep_log_clean


def register() -> None:
    """Keep callers' words out of the log, and offer vLLM our kernels; each says itself where it applies."""
    keep_log_clean()
    register_linear_kernel(CPUFP8ScaledMMLinearKernel, PlatformEnum.CPU, "fp8")
