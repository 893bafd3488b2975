"""vLLM's operators are held to their definitions, and what is broken in them is found. In this one process.

On the tiny Llama's widths and activations: `llama3` scaling, grouped heads and a head of its own. Errors are
planted at Llama-3.1-8B's widths too, in the slow tests.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server.config import Config
from tiers.engine import vllm_environment
from tiers.operators.findings import Finding
from tiers.operators.listing import OPERATORS, PLANTS, Plant

ROOT = Path(__file__).parents[2]
ASSAY = str(Path(sys.executable).with_name("assay"))


@pytest.fixture(scope="module")
def cutting() -> Any:
    """vLLM's own operator that writes into the cache, unmended."""
    from vllm import _custom_ops

    return _custom_ops.cpu_attn_reshape_and_cache


@pytest.fixture(scope="module")
def inputs(llama_folder: Path, cutting: Any) -> Any:
    """Real activations of the tiny Llama."""
    tier = Config().tiers[0]
    # Without the plugin, which changes how vLLM's processes wait and log: of this one nothing but the operators.
    patch = mock.patch.dict(os.environ, vllm_environment(tier, "cpu") | {"VLLM_PLUGINS": ""})
    patch.start()
    from vllm import _custom_ops
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms.interface import PlatformEnum

    from tiers.operators.inputs import capture
    from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel
    from tiers.probe.fp8_kv_cpu import round_into_cache

    round_into_cache()
    register_linear_kernel(CPUFP8ScaledMMLinearKernel, PlatformEnum.CPU, "fp8")
    yield capture(llama_folder)
    cleanup_dist_env_and_memory()
    _custom_ops.cpu_attn_reshape_and_cache = cutting
    patch.stop()


def held(inputs: Any, only: Sequence[str], plant: str | None = None) -> list[Finding]:
    from tiers.operators.__main__ import findings
    from tiers.operators.planting import planting

    return list(findings(inputs, only, planting(plant)))


@pytest.fixture(scope="module")
def found(inputs: Any) -> list[Finding]:
    """Of all operators, unbroken."""
    return held(inputs, [])


def test_every_operator_of_the_list_is_found_or_named_as_absent(found: list[Finding]) -> None:
    assert {each.operator for each in found} == {operator.name for operator in OPERATORS}
    absent = {each.operator: each.reason for each in found if each.outcome == "absent"}
    assert list(absent) == ["linear-fp8-block"]
    assert "BF16" in absent["linear-fp8-block"]


@pytest.mark.parametrize("name", [operator.name for operator in OPERATORS])
def test_it_computes_its_definition_as_far_as_rounding_goes(found: list[Finding], name: str) -> None:
    cases = [each for each in found if each.operator == name and each.outcome != "absent"]
    assert [each for each in cases if each.outcome != "PASS"] == []
    assert all(each.nearness <= 1 for each in cases)


def test_kernels_are_read_back(found: list[Finding]) -> None:
    kernels = {each.operator: each.kernel for each in found}
    assert kernels["linear-fp8"] == "CPUFP8ScaledMMLinearKernel"
    assert kernels["linear-int4"] == kernels["linear-int4-asymmetric"] == "CPUWNA16LinearKernel"
    assert kernels["attention"].startswith("CPU_ATTN")
    assert "Llama3RotaryEmbedding" in kernels["rope"]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_what_is_planted_is_found(inputs: Any, plant: Plant) -> None:
    assert any(each.outcome == "FAIL" for each in held(inputs, [plant.operator], plant.name))


def test_a_cache_that_cuts_off_is_found(inputs: Any, cutting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm._custom_ops.cpu_attn_reshape_and_cache", cutting)
    assert {each.outcome for each in held(inputs, ["attention-fp8-kv"])} == {"FAIL"}


def test_a_backend_that_rounds_queries_is_absent_and_no_failure(inputs: Any) -> None:
    from tiers.operators.__main__ import findings

    def quantize(one: Any) -> None:
        one.attention.query_quant = object()

    (found,) = findings(inputs, ["attention-fp8-kv"], quantize)
    assert found.outcome == "absent"
    assert "rounds queries to FP8" in found.reason


def test_weights_are_stored_as_checkpoints_have_them(inputs: Any) -> None:
    import torch

    from kernels.fakequant import Scheme, fake_quantize
    from tiers.operators.storing import stored

    weight = inputs.weights["o_proj.weight"]
    group = inputs.shape.group
    fp8 = stored(inputs, "fp8").parts["o_proj"]
    read = fp8["weight"].double() * fp8["weight_scale"].double()
    assert torch.equal(read, fake_quantize(weight, Scheme("fp8", "channel"), dtype=torch.float64))
    for symmetric in (True, False):
        scheme = Scheme("int4", "group", group, symmetric=symmetric)
        packed = stored(inputs, "int4" if symmetric else "int4-asymmetric").packed("o_proj")
        assert torch.equal(packed.values(), fake_quantize(weight, scheme, dtype=torch.float64))


def test_what_a_checkpoint_would_hold_is_not_kept(inputs: Any) -> None:
    from tiers.operators.bench import Bench

    on_disk = Bench(inputs).layer("bf16").stored
    assert on_disk.tensors == []
    assert on_disk.fused("o_proj", "weight").shape == inputs.weights["o_proj.weight"].shape


@pytest.fixture(scope="module")
def wide(inputs: Any) -> Any:
    """Values like the tiny Llama's at Llama-3.1-8B's widths."""
    from tiers.operators.inputs import LLAMA_8B, Shape, drawn_like

    return drawn_like(inputs, Shape("Llama-3.1-8B", LLAMA_8B))


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_what_is_planted_is_found_at_the_widths_of_8b(wide: Any, plant: Plant) -> None:
    assert any(each.outcome == "FAIL" for each in held(wide, [plant.operator], plant.name))
