"""What the probe reads of kernels that this machine may not have, from layers as they leave them in memory.

Needs vLLM, not a running engine; it is imported within the tests, for it takes seconds.
"""

import secrets
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from server.config import Config
from server.launch.process import free_port
from server.launch.tether import _sockets
from tiers.engine import engine_command
from tiers.precision import NumberFormat
from tiers.probe.reading import LayerReading

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def kernel(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


def read(layer: nn.Module) -> LayerReading:
    from tiers.probe.worker import read_linear

    return read_linear("model.layers.0.self_attn.qkv_proj", layer, FUSED)


def linear(kernel_field: str, kernel: Any, **tensors: torch.Tensor) -> nn.Module:
    """A quantized layer of 576 outputs, as compressed-tensors' schemes leave it."""
    layer = nn.Module()
    layer.quant_method = layer.scheme = SimpleNamespace(**{kernel_field: kernel})  # type: ignore[assignment]
    layer.output_size_per_partition = 576  # type: ignore[assignment]
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)
    return layer


def int4(name: str, *, group_size: int = 64, zero_points: bool = False, scales: int = 9 * 576) -> nn.Module:
    from vllm.scalar_type import scalar_types

    config = SimpleNamespace(
        weight_type=scalar_types.uint4 if zero_points else scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=group_size,
        zero_points=zero_points,
    )
    made = kernel(name, config=config, w_q_name="weight_packed", w_s_name="weight_scale")
    return linear("kernel", made, weight_scale=torch.ones(scales))


def fp8(name: str, weight: torch.Tensor, scales: int, shape: tuple[int, int], **attributes: Any) -> nn.Module:
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, create_fp8_quant_key

    config = SimpleNamespace(
        weight_quant_key=create_fp8_quant_key(static=True, group_shape=GroupShape(*shape)),
        activation_quant_key=create_fp8_quant_key(
            static=False, group_shape=GroupShape(1, 128) if shape[0] > 1 else GroupShape.PER_TOKEN
        ),
        input_dtype=torch.bfloat16,
    )
    made = kernel(name, config=config, **attributes)
    return linear("fp8_linear", made, weight=weight, weight_scale=torch.ones(scales))


E4M3 = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
PER_CHANNEL = NumberFormat(type="fp8_e4m3", scale="channel")
PER_TOKEN = NumberFormat(type="fp8_e4m3", scale="token", dynamic=True)
BLOCK = NumberFormat(type="fp8_e4m3", scale="block", size=128)


@pytest.mark.parametrize("scales", [9 * 576, 10 * 576, 10 * 640], ids=["plain", "padded", "padded twice"])
def test_a_group_is_what_the_kernel_was_told_however_it_pads_its_scales(scales: int) -> None:
    found = read(int4("MarlinLinearKernel", scales=scales))
    assert found.weights == NumberFormat(type="int4", scale="group", size=64)
    assert found.activations == NumberFormat(type="bf16")
    assert found.parts == tuple(f"model.layers.0.self_attn.{part}" for part in FUSED["qkv_proj"])


def test_zero_points_and_whole_channels_are_told_apart() -> None:
    weights = read(int4("CPUWNA16LinearKernel", group_size=32, zero_points=True)).weights
    assert weights == NumberFormat(type="int4", scale="group", size=32, symmetric=False)
    assert read(int4("MacheteLinearKernel", group_size=-1)).weights == NumberFormat(type="int4", scale="channel")


def test_activations_that_a_kernel_quantizes_unasked_are_seen() -> None:
    layer = int4("CPUWNA16LinearKernel")
    layer.use_w4a8 = True  # type: ignore[assignment]
    assert read(layer).activations == NumberFormat(type="int8", scale="token", dynamic=True)


@pytest.mark.parametrize("name", ["Dynamic4bitLinearKernel", "CutlassW4A8LinearKernel", "TomorrowsKernel"])
def test_a_kernel_the_probe_does_not_know_is_not_vouched_for(name: str) -> None:
    assert read(int4(name)).activations is None
    assert read(fp8(name, E4M3, 576, (-1, 1))).activations is None


def test_fp8_by_channel_and_token() -> None:
    found = read(fp8("CutlassFP8ScaledMMLinearKernel", E4M3, 576, (-1, 1)))
    assert (found.weights, found.activations) == (PER_CHANNEL, PER_TOKEN)


def test_marlin_repacks_fp8_and_leaves_activations_alone() -> None:
    packed = torch.zeros(8, dtype=torch.int32)
    found = read(fp8("MarlinFP8ScaledMMLinearKernel", packed, 576, (-1, 1)))
    assert (found.weights, found.activations) == (PER_CHANNEL, NumberFormat(type="bf16"))


def test_blocks_are_blocks_even_where_there_are_as_many_as_channels() -> None:
    found = read(fp8("CutlassFp8BlockScaledMMKernel", E4M3, 576, (128, 128)))
    assert found.weights == BLOCK
    assert found.activations == NumberFormat(type="fp8_e4m3", scale="group", size=128, dynamic=True)


def test_weights_that_deep_gemm_rounds_once_more_are_not_vouched_for() -> None:
    assert (
        read(fp8("DeepGemmFp8BlockScaledMMKernel", E4M3, 25, (128, 128), use_deep_gemm_e8m0=True)).weights is None
    )
    assert (
        read(fp8("DeepGemmFp8BlockScaledMMKernel", E4M3, 25, (128, 128), use_deep_gemm_e8m0=False)).weights
        == BLOCK
    )


def test_what_compares_is_compiled_before_there_are_callers_if_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiers.probe.worker import ProbeWorker

    class Loaded(Exception):
        """The reading goes on."""

    def get_model() -> None:
        raise Loaded

    compiled: list[str] = []

    def fail(device: str) -> None:
        compiled.append(device)
        raise RuntimeError("no compiler")

    monkeypatch.setattr("tiers.probe.worker.warm_up", fail)
    worker = ProbeWorker()
    worker.model_runner = SimpleNamespace(device="cpu", get_model=get_model)
    with pytest.raises(Loaded):
        worker.assay_reading()
    assert compiled == ["cpu"]


def test_an_engine_that_is_started_again_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key, its port and the folder of its sockets are others: nothing that a certificate would be void by."""
    from tiers.probe.worker import _environment_hash

    def told(**further: str) -> str:
        command = engine_command(Config().tiers[0], "cpu", free_port(), secrets.token_hex())
        with monkeypatch.context() as patch, _sockets() as sockets:
            for name, value in (command.environment | sockets | further).items():
                patch.setenv(name, value)
            return _environment_hash()

    assert told() == told()
    assert told() != told(VLLM_CPU_INT4_W4A8="1")
