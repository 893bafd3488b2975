"""Tier + hardware → vLLM's arguments and environment."""

from pathlib import Path

import pytest

from server.config import Config, load_config
from tiers.engine import Backend, EngineCommand, engine_command
from tiers.errors import ConfigError
from tiers.tier import Resources, Tier, TierKind

LLAMA = Path(__file__).parents[2] / "deploy" / "llama-3.1-8b.yaml"


def tier(kind: TierKind = TierKind.LITE, **resources: object) -> Tier:
    from dataclasses import replace

    found = next(tier for tier in Config().tiers if tier.kind is kind)
    return replace(found, resources=Resources.model_validate(resources))


def option(command: EngineCommand, name: str) -> str:
    (found,) = [argument for argument in command.arguments if argument.startswith(f"--{name}=")]
    return found.partition("=")[2]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_an_engine_is_for_its_gateway_alone(backend: Backend) -> None:
    command = engine_command(tier(), backend, 1234, "secret")
    assert option(command, "host") == "127.0.0.1"
    assert option(command, "port") == "1234"
    assert "secret" not in " ".join(command.arguments)
    assert command.environment["VLLM_API_KEY"] == "secret"
    assert option(command, "middleware") == "tiers.probe.lock.EngineLock"
    assert option(command, "load-format") == "safetensors"
    assert "--trust-remote-code" not in command.arguments


def test_the_reference_answers_to_two_names() -> None:
    arguments = engine_command(tier(TierKind.REFERENCE), "cpu", 1, "k").arguments
    start = arguments.index("--served-model-name")
    assert arguments[start + 1 : start + 3] == ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-Reference")


def test_gpus_and_memory_come_from_the_config() -> None:
    command = engine_command(tier(gpus=[2, 3], gpu_memory=0.4, max_num_seqs=7, kv_cache_gib=2), "cuda", 1, "k")
    assert option(command, "tensor-parallel-size") == "2"
    assert option(command, "gpu-memory-utilization") == "0.4"
    assert option(command, "max-num-seqs") == "7"
    assert option(command, "kv-cache-memory-bytes") == str(2 << 30)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "--enforce-eager" not in command.arguments


def test_gpus_are_cut_into_pipeline_stages() -> None:
    command = engine_command(tier(gpus=[0, 1, 2, 3], pipeline_parallel=2), "cuda", 1, "k")
    assert option(command, "tensor-parallel-size") == "2"
    assert option(command, "pipeline-parallel-size") == "2"


@pytest.mark.parametrize(
    ("gpus", "stages", "sentence"), [([0, 1, 2], 2, "cannot be cut into 2"), ([0, 0], 1, "names one twice")]
)
def test_gpus_that_make_no_whole_stages_are_refused(gpus: list[int], stages: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tier(gpus=gpus, pipeline_parallel=stages)


def test_the_cpu_engine_computes_what_the_tier_says() -> None:
    environment = engine_command(tier(), "cpu", 1, "k").environment
    assert environment["VLLM_CPU_INT4_W4A8"] == "0"
    assert environment["VLLM_PLUGINS"] == "assay"


def test_an_operators_own_thread_binding_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-31")
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    environment = engine_command(tier(), "cpu", 1, "k").environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-31"
    assert environment["VLLM_CPU_INT4_W4A8"] == "0", "but never what changes the arithmetic"


def test_further_arguments_pass_and_ours_are_refused() -> None:
    further = {"enable-prefix-caching": False, "max_num_batched_tokens": 4096, "async-scheduling": True}
    command = engine_command(tier(engine_args=further), "cpu", 1, "k")
    assert "--no-enable-prefix-caching" in command.arguments
    assert "--async-scheduling" in command.arguments
    assert option(command, "max-num-batched-tokens") == "4096"


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "api-key",
        "host",
        "trust-remote-code",
        "trust_remote_code",
        "--port",
        "max-model",
        "pipeline-parallel-size",
        "gpu-memory-u",
        "no-enforce-eager",
        "quantization",
        "kv-cache-dtype",
        "kv_cache_dt",
        "kv-cache-dtype=fp8",
        "hf-overrides",
        "hf-overrides.architectures",
        "config",
        "speculative-config",
        "override-generation-config",
    ],
)
def test_arguments_that_are_ours_or_change_the_numbers_are_refused(name: str) -> None:
    """By any spelling that vLLM's parser would take."""
    with pytest.raises(ConfigError, match="may not set"):
        engine_command(tier(engine_args={name: "x"}), "cpu", 1, "k")


def test_gpus_count_within_those_that_the_operator_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    environment = engine_command(tier(gpus=[1]), "cuda", 1, "k").environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engine_command(tier(gpus=[0]), "cuda", 1, "k").environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_llama_config_makes_three_engines_on_one_gpu() -> None:
    commands = [engine_command(tier, "cuda", 1, "k") for tier in load_config(LLAMA).tiers]
    assert sum(float(option(command, "gpu-memory-utilization")) for command in commands) <= 0.9
    assert {command.environment["CUDA_VISIBLE_DEVICES"] for command in commands} == {"0"}
