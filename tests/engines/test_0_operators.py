"""vLLM's operators are held to their definitions, and what is broken in them is found. In this one process.

On the tiny Llama's widths and activations: `llama3` scaling, grouped heads and a head of its own; what a row of
`assay operators` takes at Llama-3.1-8B's widths is for its users to wait for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server.config import Config
from tests.engines.conftest import MODEL, home_in
from tiers.engine import vllm_environment
from tiers.operators.findings import Finding
from tiers.operators.listing import OPERATORS, PLANTS, Plant

ROOT = Path(__file__).parents[2]
ASSAY = str(Path(sys.executable).with_name("assay"))
TRUNCATED = "attention-fp8-kv"
"""vLLM 0.32.0 cuts what it writes into an FP8 cache on CPUs off where FP8 says to round."""


@pytest.fixture(scope="module")
def inputs(llama_folder: Path) -> Any:
    """Real activations of the tiny Llama."""
    tier = Config().tiers[0]
    # Without the plugin, which changes how vLLM's processes wait and log: of this one nothing but the kernel.
    patch = mock.patch.dict(os.environ, vllm_environment(tier, "cpu") | {"VLLM_PLUGINS": ""})
    patch.start()
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms.interface import PlatformEnum

    from tiers.operators.inputs import capture
    from tiers.probe.fp8_cpu import CPUFP8ScaledMMLinearKernel

    register_linear_kernel(CPUFP8ScaledMMLinearKernel, PlatformEnum.CPU, "fp8")
    yield capture(llama_folder)
    cleanup_dist_env_and_memory()
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
    if name == TRUNCATED:
        assert {each.outcome for each in cases} == {"FAIL"}, (
            "vLLM rounds now: take it off the list of what is known"
        )
        return
    assert [each for each in cases if each.outcome != "PASS"] == []
    assert all(each.nearness <= 1 for each in cases)


def test_kernels_are_read_back(found: list[Finding]) -> None:
    kernels = {each.operator: each.kernel for each in found}
    assert kernels["linear-fp8"] == "CPUFP8ScaledMMLinearKernel"
    assert kernels["linear-int4"] == kernels["linear-int4-asymmetric"] == "CPUWNA16LinearKernel"
    assert kernels["attention"].startswith("CPU_ATTN")
    assert "Llama3RotaryEmbedding" in kernels["rope"]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_what_is_planted_is_found(inputs: Any, found: list[Finding], plant: Plant) -> None:
    if plant.operator == TRUNCATED:
        before = max(each.rms_ulps or 0 for each in found if each.operator == plant.operator)
        assert all((each.rms_ulps or 0) > 10 * before for each in held(inputs, [plant.operator], plant.name))
        return
    assert any(each.outcome == "FAIL" for each in held(inputs, [plant.operator], plant.name))


def test_an_fp8_cache_on_cpus_cuts_off(inputs: Any) -> None:
    import torch

    from kernels.linear import to_fp8
    from tiers.operators.bench import Bench
    from tiers.operators.one_layer import Part
    from tiers.operators.storing import KV_SCALES

    one = Bench(inputs).layer("fp8-kv")
    q, k, v = (inputs.activations[name][:1] for name in "qkv")
    ran = one.attend(q, k, v, [Part(1, 1, (3,))]).view(inputs.shape.kv_heads, -1, inputs.shape.width)[:, 0]
    scaled = v.view(ran.shape).double() / torch.tensor(KV_SCALES[1]).double()
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    before = numbers[torch.searchsorted(numbers, scaled.abs(), right=True) - 1]
    nearest = to_fp8(scaled).abs()
    kept = ran.double().abs() / KV_SCALES[1]
    beyond = nearest > scaled.abs()
    assert beyond.sum() > 10
    assert ((kept - before).abs() < (kept - nearest).abs())[beyond].all()


def test_the_command_runs_them_in_a_process_of_their_own_and_exits_with_what_was_found(tmp_path: Path) -> None:
    environment = os.environ | {"ASSAY_HOME": str(home_in(tmp_path))}
    command = [ASSAY, "operators", "--only", "greedy", "--own-widths", "--json", "--plant", "second-best"]
    ran = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, timeout=250)
    assert ran.returncode == 1, ran.stderr
    (broken,) = [Finding.model_validate(each) for each in json.loads(ran.stdout)]
    assert (broken.operator, broken.outcome, broken.widths) == ("greedy", "FAIL", MODEL)
