"""Tier + hardware → the vLLM server that runs it: its arguments and its environment."""

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from tiers.errors import ConfigError
from tiers.hardware import GIB
from tiers.manifest import MANIFEST_NAME, Manifest, OutdatedManifest
from tiers.probe.reading import CHECKPOINT, MAY_PLANT, WAITS
from tiers.tier import Tier

Backend = Literal["cpu", "cuda"]
Option = str | int | float | bool

LOOPBACK = "127.0.0.1"
DEFAULT_CPU_KV_CACHE_GIB = 1.0
PLUGIN = "assay"
"""The entry point of the group vllm.general_plugins in pyproject.toml; no other plugin is loaded."""
LOCK = "tiers.probe.lock.EngineLock"
PROBE = "tiers.probe.worker.ProbeWorker"

_ARGUMENTS = frozenset({
    "async-scheduling", "block-size", "cpu-offload-gb", "cudagraph-capture-sizes", "disable-cascade-attn",
    "enable-auto-tool-choice", "enable-chunked-prefill", "enable-log-requests", "enable-prefix-caching",
    "enable-prompt-tokens-details", "enable-request-id-headers", "log-config-file",
    "long-prefill-token-threshold", "max-cudagraph-capture-size", "max-log-len", "max-logprobs",
    "max-num-batched-tokens", "max-parallel-loading-workers", "num-gpu-blocks-override",
    "prefix-caching-hash-algo", "safetensors-load-strategy", "stream-interval", "tool-call-parser",
    "uvicorn-log-level",
})  # fmt: skip
"""What ``engine_args`` may set: speed, memory, logs and tools. Everything else Assay sets from its own fields, or
would change which numbers an engine computes (a tier is what its manifest says, and nothing else), or what Assay
needs to know of an engine: ``disable-log-stats`` would leave a busy one looking like one that hangs."""
LLAMA_TOOL_TOKEN = b'"<|python_tag|>"'
"""Which vLLM's parser of Llama 3's tool calls looks for in the vocabulary, and does not start without."""
OVER_NODES_ON_CPUS = (
    "{}: an engine that goes over several nodes is for GPUs only, for vLLM's Ray executor places its workers by "
    "GPU: take pipeline_parallel out."
)
_TUNABLE = frozenset({"VLLM_CPU_OMP_THREADS_BIND", "OMP_WAIT_POLICY"})
"""Speed, not meaning: an operator's own setting of these wins."""


@dataclass(frozen=True)
class EngineCommand:
    """How to start one engine: ``environment`` is added to the parent's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    port: int
    api_key: str


def installed_backend() -> Backend:
    """Which build of vLLM this environment holds.

    Raises:
        ConfigError: neither is installed.
    """
    builds: dict[str, Backend] = {"vllm-cpu": "cpu", "vllm": "cuda"}
    for distribution, backend in builds.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return backend
    raise ConfigError("vLLM is not installed in this environment: run `make install`.")


def engine_command(
    tier: Tier,
    backend: Backend,
    port: int,
    api_key: str,
    *,
    host: str = LOOPBACK,
    over_nodes: bool = False,
    finishes_within_s: int = 0,
    takes_faults: bool = False,
    waits: bool = False,
    traces_url: str | None = None,
) -> EngineCommand:
    """The command that serves ``tier`` on one port, to nobody but the holder of ``api_key``.

    Args:
        tier: what to serve.
        backend: where.
        port: on ``host``.
        api_key: what the holder shows.
        host: the address it listens on.
        over_nodes: whether its GPUs are on several nodes, where Ray starts its workers.
        finishes_within_s: how long vLLM itself lets running requests take when it gets SIGTERM.
        takes_faults: whether the engine is there to be broken, for the self-test.
        waits: whether it is well, for orchestrators, only once it has been told that it is ready.
        traces_url: where it sends its spans of requests that the gateway traces, by OTLP over HTTP.

    Raises:
        ConfigError: ``engine_args`` names an argument that Assay sets itself.
    """
    resources = tier.resources
    options: dict[str, Option] = {
        "model": str(tier.checkpoint),
        "host": host,
        "port": port,
        "dtype": "bfloat16",
        "load-format": "safetensors",
        "middleware": LOCK,
        "worker-extension-cls": PROBE,
        "disable-uvicorn-access-log": True,
        # By itself the first caller with a schema chooses for all, and what the other backend lacks is then a 500.
        "structured-outputs-config": json.dumps({"backend": "xgrammar"}),
        "tensor-parallel-size": resources.tensor_parallel if backend == "cuda" else 1,
        "pipeline-parallel-size": resources.pipeline_parallel if backend == "cuda" else 1,
    }
    if tier.recipe.precision.kv_cache.type == "fp8_e4m3":
        options["kv-cache-dtype"] = "fp8_e4m3"
        if backend == "cuda" and tier.recipe.precision.attention.type == "bf16":
            options["attention-backend"] = "FLASHINFER"  # on Ada the only one that leaves queries in BF16
    elif backend == "cuda":
        # vLLM's own choice but on data-centre Blackwell: there it is FlashInfer, which nvcc has to compile.
        options["attention-backend"] = "FLASH_ATTN"
    if tier.context_length is not None:
        options["max-model-len"] = tier.context_length
    if resources.max_prompt_tokens is not None:
        # For its routes that count a prompt's tokens; nobody but the gateway reaches the others.
        options["enable-scale-out"] = True
    if resources.max_num_seqs is not None:
        options["max-num-seqs"] = resources.max_num_seqs
    kv_cache_gib = resources.kv_cache_gib or (DEFAULT_CPU_KV_CACHE_GIB if backend == "cpu" else None)
    if kv_cache_gib is not None:
        options["kv-cache-memory-bytes"] = int(kv_cache_gib * GIB)
    if resources.idle == "sleep":
        if backend == "cpu":
            raise ConfigError(
                f"{tier.name}: idle: sleep gives a GPU's memory back, and this engine runs on the CPU."
            )
        options["enable-sleep-mode"] = True
    if over_nodes:
        if backend == "cpu":
            raise ConfigError(OVER_NODES_ON_CPUS.format(tier.name))
        options["distributed-executor-backend"] = "ray"
    if backend == "cpu":
        options["enforce-eager"] = True  # compiling for minutes gains little there
    elif resources.gpu_memory is not None:
        options["gpu-memory-utilization"] = resources.gpu_memory
    if finishes_within_s:
        options["shutdown-timeout"] = finishes_within_s
    if takes_faults:
        options["enforce-eager"] = True  # in a compiled graph nothing can be exchanged
    if resources.max_output_tokens is not None:
        # The least of this, of what is asked for and of what the prompt leaves counts (vLLM's get_max_tokens). The
        # checkpoint's own generation_config.json is read as ever: this one field is laid over it.
        options["override-generation-config"] = json.dumps({"max_new_tokens": resources.max_output_tokens})
    if traces_url is not None:
        options["otlp-traces-endpoint"] = traces_url
    options |= _tools(tier.checkpoint)
    further = dict(_positive(name, value) for name, value in resources.engine_args.items())
    for name in further:
        if name.removeprefix("no-") not in _ARGUMENTS:
            raise ConfigError(
                f"{tier.name}: engine_args may not set {name}; use the tier's own fields for what Assay sets "
                f"itself, and a recipe for what the engine computes. It may set {', '.join(sorted(_ARGUMENTS))}."
            )
    options |= further
    arguments = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--served-model-name", *tier.names]
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is False:
            arguments.append(f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    told = {MAY_PLANT: str(int(takes_faults)), WAITS: str(int(waits)), CHECKPOINT: _digest(tier.checkpoint)}
    if traces_url is not None:
        told |= _tracing(tier)
    return EngineCommand(tuple(arguments), _environment(tier, backend, api_key) | told, port, api_key)


def _digest(checkpoint: Path) -> str:
    """Of the checkpoint that lies there now; empty before it is built, when no engine is started either."""
    try:
        return Manifest.read(checkpoint).digest if (checkpoint / MANIFEST_NAME).exists() else ""
    except OutdatedManifest:
        return ""  # it will be built again


def _positive(name: str, value: Option) -> tuple[str, Option]:
    """An argument of ``engine_args`` in one spelling, so that it takes the place of ours and not one beside it."""
    name = name.strip("-").replace("_", "-")
    if name.startswith("no-") and isinstance(value, bool):
        return name.removeprefix("no-"), not value
    return name, value


def _tools(checkpoint: Path) -> dict[str, Option]:
    """How tool calls are told from text, for a checkpoint that has Llama 3.1's tokens for them; else nothing.

    The chat template stays the checkpoint's own. vLLM's ``tool_chat_template_llama3.1_json.jinja`` would write
    another prompt: a system message of vLLM's where tools are given and the caller has none, a tool's answer
    wrapped in ``{"output": …}``, and, without any tools too, the date of the day instead of a fixed one. What a
    tier answers would then differ from what its model answers elsewhere, and from day to day.
    """
    tokenizer = checkpoint / "tokenizer.json"
    if not tokenizer.is_file() or LLAMA_TOOL_TOKEN not in tokenizer.read_bytes():
        return {}  # also before the checkpoint is built: then arguments are checked, and no engine is started
    return {"enable-auto-tool-choice": True, "tool-call-parser": "llama3_json"}


def gpu_environment(tier: Tier) -> dict[str, str]:
    """Shows a process the tier's GPUs only; indices count within those that this process was given itself."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        chosen = [str(gpu) for gpu in tier.resources.gpus]
    else:
        # Those beyond are not ours to use; whether all of them exist, tiers/placement.py says.
        present = given.split(",")
        chosen = [present[gpu].strip() for gpu in tier.resources.gpus if gpu < len(present)]
    # The order of nvidia-smi, in which people count.
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _environment(tier: Tier, backend: Backend, api_key: str) -> dict[str, str]:
    # In the environment, not in the arguments, which every user of the machine may read.
    return {"VLLM_API_KEY": api_key} | vllm_environment(tier, backend)


def _tracing(tier: Tier) -> dict[str, str]:
    """What OpenTelemetry's SDK and vLLM's exporter read; headers for the collector come from the parent's."""
    about = (os.environ.get("OTEL_RESOURCE_ATTRIBUTES"), f"assay.tier={quote(tier.name, safe='')}")
    return {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # vLLM's own choice is gRPC
        # What the gateway asks for itself, such as probes, has no trace and is to begin none.
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_SERVICE_NAME": os.environ.get("OTEL_SERVICE_NAME", "assay-engine"),
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(each for each in about if each),
    }


def vllm_environment(tier: Tier, backend: Backend) -> dict[str, str]:
    """What a process sets in which vLLM computes as it does for this tier's engine; added to its parent's."""
    environment = {
        # Engines talk to themselves over sockets: all of them on loopback.
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Callers choose their request ids: two at once with the same one must stay two.
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "0",
        # A checkpoint is complete; anything that asks the hub is a mistake.
        "HF_HUB_OFFLINE": "1",
    }
    if backend == "cuda":
        environment |= gpu_environment(tier)
        # Where DeepGEMM is there, vLLM rounds block-quantized weights once more, to scales that are powers of two.
        environment["VLLM_USE_DEEP_GEMM_E8M0"] = "0"
        # FlashInfer compiles these two with nvcc when they are first used, and an engine ends where there is none,
        # as in our images; all else of FlashInfer's vLLM leaves alone then. Without its sampler an engine draws
        # by the one that `assay operators` holds to its definition.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        environment["VLLM_ALLREDUCE_USE_FLASHINFER"] = "0"
    else:
        # vLLM's own binding puts every engine's threads on the same cores, the first ones of a NUMA node.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Threads that spin while they wait take the cores from the other engines.
        environment["OMP_WAIT_POLICY"] = "passive"
        # Ours stands in for it; tiers/probe/fp8_cpu.py says why.
        environment["VLLM_DISABLED_KERNELS"] = "ChannelWiseTorchFP8ScaledMMLinearKernel"
        # On CPUs with AMX vLLM quantizes the activations of INT4 layers to INT8 unless told not to:
        # a W4A16 checkpoint would silently run as W4A8.
        environment["VLLM_CPU_INT4_W4A8"] = "0"
        # vLLM has PyTorch compile two small functions of its sampler with g++ at the first request, enforce-eager
        # or not, and ends where there is no compiler. As they are written they count and draw alike: of PyTorch
        # 2.13's exponential variates on CPUs none of two billion was the 0 that would win each draw.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return {
        name: os.environ.get(name, value) if name in _TUNABLE else value for name, value in environment.items()
    }
