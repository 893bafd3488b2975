"""Divergence's kernel is compiled for GPUs, which Triton does without one."""

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("q_type", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_every_generation_of_cards(capability: int, q_type: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import divergence_triton as ours

    constants: dict[str, Any] = {
        "lowest": torch.finfo(torch.float32).min,
        "block": ours._BLOCK,
        "stages": ours._STAGES,
    }
    types = {name: "constexpr" if name in constants else "i32" for name in ours._rows.arg_names}
    types |= {"p_logits": "*fp32", "q_logits": q_type, "given": "*i64", "numbers": "*fp32", "tops": "*i64"}
    made = triton.compile(
        ASTSource(fn=ours._rows, signature=types, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": ours._WARPS},
    )
    assert "fma.rn.f32" in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 10_000
    assert made.metadata.shared <= 96 << 10
