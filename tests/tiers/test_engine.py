"""Tier + hardware → vLLM's arguments and environment."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from server.config import Config
from server.config_file import load_config
from tests.server.test_cli import checkpoint
from tiers.engine import Backend, EngineCommand, engine_command
from tiers.errors import ConfigError
from tiers.manifest import Manifest
from tiers.probe.reading import WAITS
from tiers.recipe import find_recipe
from tiers.tier import Resources, Tier, TierKind

(VLLM,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr,misc]
VARIABLES = (Path(VLLM) / "envs.py").read_text()  # read and not imported, which takes seconds
LLAMA = Path(__file__).parents[2] / "deploy" / "llama-3.1-8b.yaml"


def tier(kind: TierKind = TierKind.LITE, **resources: object) -> Tier:
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


def test_replicas_are_alike_but_for_their_gpus() -> None:
    engines = tier(gpus=[4, 5, 6, 7, 0, 1, 2, 3], replicas=2, pipeline_parallel=2).engines()
    commands = [engine_command(engine, "cuda", 1, "k") for engine in engines]
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["4,5,6,7", "0,1,2,3"]
    assert {option(command, "tensor-parallel-size") for command in commands} == {"2"}
    assert {option(command, "pipeline-parallel-size") for command in commands} == {"2"}
    assert commands[0].arguments == commands[1].arguments


def test_on_the_cpu_replicas_need_no_gpus() -> None:
    engines = tier(replicas=3).engines()
    assert len({engine_command(engine, "cpu", 1, "k").arguments for engine in engines}) == 1
    assert len(engines) == 3


@pytest.mark.parametrize(
    ("gpus", "stages", "replicas", "sentence"),
    [
        ([0, 1, 2], 2, 1, "3 gpus cannot be cut into 2"),
        ([0, 1, 2, 3, 4, 5], 2, 2, "3 gpus cannot be cut into 2"),
        ([0, 1, 2], 1, 2, "3 gpus cannot be dealt out evenly to 2 replicas"),
        ([0], 1, 2, "1 gpus cannot be dealt out evenly to 2 replicas"),
        ([0, 0], 1, 1, "names one twice"),
    ],
)
def test_gpus_that_make_no_whole_engines_or_stages_are_refused(
    gpus: list[int], stages: int, replicas: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        tier(gpus=gpus, pipeline_parallel=stages, replicas=replicas)


def test_the_longest_answer_caps_also_those_who_do_not_say() -> None:
    command = engine_command(tier(max_output_tokens=512, max_prompt_tokens=100), "cpu", 1, "k")
    assert json.loads(option(command, "override-generation-config")) == {"max_new_tokens": 512}
    plain = engine_command(tier(), "cpu", 1, "k").arguments
    assert not any(argument.startswith("--override-generation-config") for argument in plain)
    assert not any("--generation-config" in argument for argument in (*plain, *command.arguments))


def with_vocabulary(folder: Path, *tokens: str, **engine_args: object) -> tuple[str, ...]:
    """The arguments for a checkpoint with these tokens."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    made = replace(tier(engine_args=engine_args), checkpoint=folder)
    return engine_command(made, "cpu", 1, "k").arguments


def test_tool_calls_are_parsed_where_the_tokenizer_has_llamas_token(tmp_path: Path) -> None:
    arguments = with_vocabulary(tmp_path, "a", "<|python_tag|>")
    assert "--enable-auto-tool-choice" in arguments
    assert "--tool-call-parser=llama3_json" in arguments
    assert not any(argument.startswith("--chat-template") for argument in arguments), "the model's own"


@pytest.mark.parametrize("tokens", [("a",), ("<tool_call>",), ("python_tag",)])
def test_tool_calls_are_text_where_it_has_not(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    arguments = with_vocabulary(tmp_path, *tokens)
    assert not any(argument.startswith(("--tool", "--enable-auto-tool")) for argument in arguments)


def test_an_operators_own_tool_parser_wins_in_any_spelling(tmp_path: Path) -> None:
    llama = "<|python_tag|>"
    other = with_vocabulary(tmp_path, llama, tool_call_parser="hermes")
    assert [argument for argument in other if "parser" in argument] == ["--tool-call-parser=hermes"]
    for spelling in ({"no-enable-auto-tool-choice": True}, {"enable_auto_tool_choice": False}):
        none = with_vocabulary(tmp_path, llama, **spelling)
        assert [argument for argument in none if "choice" in argument] == ["--no-enable-auto-tool-choice"]


def test_two_requests_with_the_same_id_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    environment = engine_command(tier(), "cpu", 1, "k").environment
    assert environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] == "0"


def test_the_cpu_engine_computes_what_the_tier_says() -> None:
    environment = engine_command(tier(), "cpu", 1, "k").environment
    assert environment["VLLM_CPU_INT4_W4A8"] == "0"
    assert environment["TORCH_COMPILE_DISABLE"] == "1", "there may be no compiler"
    assert environment["VLLM_PLUGINS"] == "assay"


def test_an_engine_on_gpus_asks_for_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER"):
        assert f'"{name}": lambda' in VARIABLES, "or vLLM would not know what it is told"
        monkeypatch.setenv(name, "1")
        assert engine_command(tier(), "cuda", 1, "k").environment[name] == "0"
    assert option(engine_command(tier(), "cuda", 1, "k"), "attention-backend") == "FLASH_ATTN"
    assert "attention-backend" not in " ".join(engine_command(tier(), "cpu", 1, "k").arguments)


def test_only_a_rounded_cache_is_flashinfers() -> None:
    recipe = find_recipe("fp8-kv")
    rounded = replace(tier(TierKind.TURBO), recipe=recipe)
    assert option(engine_command(rounded, "cuda", 1, "k"), "attention-backend") == "FLASHINFER"


def test_only_the_self_test_starts_an_engine_that_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_PLANT_FAULTS", "1")
    assert engine_command(tier(), "cuda", 1, "k").environment["ASSAY_PLANT_FAULTS"] == "0", "whoever set it"
    assert "--enforce-eager" not in engine_command(tier(), "cuda", 1, "k").arguments
    broken = engine_command(tier(), "cuda", 1, "k", takes_faults=True)
    assert broken.environment["ASSAY_PLANT_FAULTS"] == "1"
    assert "--enforce-eager" in broken.arguments, "what is compiled cannot be broken"


def test_only_what_assay_engine_starts_waits_to_be_well_until_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAITS, "1")
    assert engine_command(tier(), "cuda", 1, "k").environment[WAITS] == "0", "nobody would tell it"
    assert engine_command(tier(), "cuda", 1, "k", waits=True).environment[WAITS] == "1"


def test_an_engine_sends_spans_only_where_the_gateway_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=one")
    plain = engine_command(tier(), "cpu", 1, "k")
    assert not any("otlp" in argument for argument in plain.arguments)
    assert not any(name.startswith("OTEL") for name in plain.environment)
    traced = engine_command(tier(), "cpu", 1, "k", traces_url="http://collector:4318/v1/traces")
    assert "--otlp-traces-endpoint=http://collector:4318/v1/traces" in traced.arguments
    assert {name: value for name, value in traced.environment.items() if name.startswith("OTEL")} == {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_SERVICE_NAME": "assay-engine",
        "OTEL_RESOURCE_ATTRIBUTES": f"host.name=one,assay.tier={tier().name}",
    }


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
        "disable-log-stats",
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


def test_an_engine_for_gateways_elsewhere_listens_where_they_reach_it_and_ends_in_its_own_time() -> None:
    command = engine_command(tier(), "cpu", 8100, "k", host="0.0.0.0", finishes_within_s=45)
    assert option(command, "host") == "0.0.0.0"
    assert option(command, "shutdown-timeout") == "45"
    assert option(engine_command(tier(), "cpu", 1, "k"), "host") == "127.0.0.1"
    assert not any("shutdown-timeout" in each for each in engine_command(tier(), "cpu", 1, "k").arguments)
    assert command.environment["VLLM_HOST_IP"] == "127.0.0.1", "its own processes talk to each other here"


def test_an_engine_is_told_which_checkpoint_it_is_started_on(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    made = replace(tier(), checkpoint=tmp_path / "checkpoints" / "SmolLM2-135M-Instruct" / "bf16")
    told = engine_command(made, "cpu", 1, "k").environment["ASSAY_CHECKPOINT"]
    assert told == Manifest.read(made.checkpoint).digest
    assert engine_command(tier(), "cpu", 1, "k").environment["ASSAY_CHECKPOINT"] == "", "whoever set it"
