"""vLLM's entry point into Assay: called once in every process of an engine, before a model is loaded."""

from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.platforms.interface import PlatformEnum

from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel
from tiers.probe.fp8_kv_cpu import round_into_cache
from tiers.probe.group import take_group
from tiers.probe.log import keep_log_clean
from tiers.probe.seeds import keep_seeds
from tiers.probe.waiting import wait_with_naps


def register() -> None:
    """Mend what would end an engine or show callers' words, and offer vLLM our kernels."""
    keep_log_clean()
    keep_seeds()
    wait_with_naps()
    round_into_cache()
    take_group()
    register_linear_kernel(CPUFP8ScaledMMLinearKernel, PlatformEnum.CPU, "fp8")
