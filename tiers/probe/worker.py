"""Reads a worker's arithmetic back from its layers, after loading; a worker extension, loaded inside the engine.

What is read are the tensors in memory and the kernels that will multiply them, not the checkpoint's config: vLLM
chooses kernels by hardware and environment, and some of them compute something else than the checkpoint says.
Written against vLLM 0.32.0.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from kernels.divergence import warm_up
from tiers.hardware import device_class
from tiers.precision import NumberFormat, NumberType
from tiers.probe.reading import MAY_PLANT, AttentionReading, End, EngineReading, LayerReading, may_plant
from tiers.probe.scoring import Interrupted, Scorer

log = logging.getLogger("vllm.assay")
_TYPES: dict[torch.dtype, NumberType] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.int8: "int8",
}
_W8A8 = frozenset({
    "B12xFp8BlockScaledMMKernel", "B12xTensorFP8ScaledMMLinearKernel", "BlockWiseTorchFP8ScaledMMLinearKernel",
    "CPUFP8ScaledMMLinearKernel", "CPUFP8W8A8ScaledMMLinearKernel", "CPUFp8W8A8BlockScaledMMKernel",
    "ChannelWiseTorchFP8ScaledMMLinearKernel", "CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel",
    "DeepGemmFp8BlockScaledMMKernel", "FlashInferFP8ScaledMMLinearKernel",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel", "PerTensorTorchFP8ScaledMMLinearKernel",
    "TritonFP8ScaledMMLinearKernel", "TritonFp8BlockScaledMMKernel",
})  # fmt: skip
"""FP8 kernels that quantize activations as their configuration says."""
_W8A16 = frozenset({"CPUFp8BlockScaledMMKernel", "MarlinFP8ScaledMMLinearKernel"})
"""FP8 kernels that leave activations alone whatever the checkpoint asks for."""
_W4A16 = frozenset({
    "CPUWNA16LinearKernel", "ConchLinearKernel", "ExllamaLinearKernel", "MacheteLinearKernel",
    "MarlinLinearKernel", "TritonW4A16LinearKernel", "ZentorchWNA16LinearKernel",
})  # fmt: skip
"""Integer-weight kernels that take activations in the type of their configuration."""
_OF_ONE_START = frozenset({
    "VLLM_API_KEY", "VLLM_DIST_IDENT", "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME", "VLLM_PORT", "VLLM_RPC_BASE_PATH",
})  # fmt: skip
"""Its key, its port, and by what its processes find each other: names that vLLM sets itself, and a folder."""
_INT8_PER_TOKEN = NumberFormat(type="int8", scale="token", dynamic=True)


class ProbeWorker:
    """What vLLM mixes into its worker class; its public methods can be called by ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any
    rank: int
    _assay_scorer: Scorer | None = None
    _assay_faults: Any = None

    def assay_reading(self) -> dict[str, Any]:
        """This worker's `EngineReading`, as plain data; asked for before there are callers."""
        self._assay_warm_up()
        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", {})
        modules = list(model.named_modules())
        head = next((m for _, m in modules if isinstance(m, ParallelLMHead)), None)
        embedding = next((m for _, m in modules if type(m) is VocabParallelEmbedding), None)
        if head is None and getattr(model, "lm_head", None) is embedding:
            head = embedding  # tied
        ends: dict[End, nn.Module | None] = {"embedding": embedding, "head": head}
        device = current_platform.get_device_name() or current_platform.device_name
        reading = EngineReading(
            rank=self.rank,
            vllm=vllm.__version__,
            torch=torch.__version__,
            device=device,
            model_class=type(model).__name__,
            layers=tuple(
                read_linear(name, module, fused)
                for name, module in modules
                if isinstance(module, LinearBase | nn.Linear)
            ),
            attention=tuple(read_attention(name, m) for name, m in modules if isinstance(m, Attention)),
            ends={end: _plain(layer) for end, layer in ends.items() if layer is not None},
            head_kernel=None if head is None else _gemm(head),
            config_hash=self.vllm_config.compute_hash(),
            environment_hash=_environment_hash(),
            takes_faults=may_plant(),
            device_class=device_class(device),
        )
        return reading.model_dump(mode="json")

    # What follows must not raise: with several workers the answers of the others would be left lying, and taken
    # for those to the next step.

    def assay_score_begin(self, token: str, job: dict[str, Any]) -> dict[str, Any]:
        """Watch for the request that carries ``token``; ``job`` is what `Scorer.begin` takes."""
        return self._assay_guarded(lambda scorer: scorer.begin(token, **job))

    def assay_score(self, token: str, most: int) -> dict[str, Any]:
        """The numbers of further tokens, as many as are there and no more than ``most``."""
        return self._assay_guarded(lambda scorer: scorer.score(token, most))

    def assay_score_keep(self, token: str, file: str, head: dict[str, str] | None) -> dict[str, Any]:
        """Write the hidden states that came into a file, and what the head makes of them."""
        return self._assay_guarded(lambda scorer: scorer.keep(token, file, head))

    def assay_score_end(self, token: str) -> dict[str, Any]:
        """Forget the sequence."""
        return self._assay_guarded(lambda scorer: scorer.end(token))

    def assay_plant(self, fault: str | None) -> dict[str, Any]:
        """Break the model so and not otherwise, or mend it; in how many places it is broken now."""
        if not may_plant():
            return {"problem": f"this engine was not started with {MAY_PLANT}=1, so nothing is planted in it"}
        try:
            if self._assay_faults is None:
                from tiers.probe.faults import Faults  # an engine that serves has not even loaded it

                self._assay_faults = Faults(self.model_runner)
            return {"planted": self._assay_faults.plant(fault)}
        except Exception as error:  # see above
            return {"problem": f"{fault} could not be planted: {error!r}"}

    def _assay_warm_up(self) -> None:
        """What cannot be compiled is said when something is measured; until then it is no reason not to serve."""
        try:
            warm_up(self.model_runner.device)
        except Exception:
            log.exception("This engine cannot be measured: what compares distributions does not compile.")

    def _assay_guarded(self, work: Callable[[Scorer], dict[str, Any] | None]) -> dict[str, Any]:
        try:
            if self._assay_scorer is None:
                is_v2 = bool(getattr(self, "use_v2_model_runner", False))
                self._assay_scorer = Scorer(self.model_runner, self.vllm_config, is_v2=is_v2)
            answer = work(self._assay_scorer) or {}
            return answer | {"answers": self._assay_scorer.answers}
        except Exception as error:  # see above
            return {"problem": str(error) or repr(error), "again": isinstance(error, Interrupted)}


def _environment_hash() -> str:
    """Of every variable that tells vLLM something, but for those that differ at each start."""
    told = sorted((name, value) for name, value in os.environ.items() if name.startswith("VLLM_"))
    lasting = [pair for pair in told if pair[0] not in _OF_ONE_START]
    return hashlib.sha256(repr(lasting).encode()).hexdigest()[:16]


def read_linear(name: str, layer: nn.Module, fused: dict[str, list[str]]) -> LayerReading:
    """One linear layer: its kernel, and the formats that this kernel multiplies."""
    prefix, _, last = name.rpartition(".")
    parts = tuple(f"{prefix}.{part}" for part in fused.get(last, [last]))
    method = getattr(layer, "quant_method", None)
    if method is None or isinstance(method, UnquantizedLinearMethod):
        plain = _plain(layer)
        return LayerReading(name=name, parts=parts, kernel=_gemm(layer), weights=plain, activations=plain)
    scheme = getattr(layer, "scheme", method)
    if (kernel := getattr(scheme, "fp8_linear", None)) is not None:
        weights, activations = _fp8_weights(layer, kernel), _fp8_activations(kernel)
    elif (kernel := getattr(scheme, "kernel", None)) is not None and hasattr(kernel, "w_q_name"):
        weights, activations = _grouped_weights(layer, kernel), _grouped_activations(layer, kernel)
    else:
        weights = activations = None
    return LayerReading(
        name=name,
        parts=parts,
        kernel=type(kernel or scheme).__name__,
        weights=weights,
        activations=activations,
    )


def read_attention(name: str, attention: Any) -> AttentionReading:
    """One block's attention, from the memory that its keys and values are kept in."""
    cache = attention.kv_cache.dtype
    if attention.kv_cache_dtype.startswith("fp8"):
        # Backends keep FP8 as bytes; which of the two FP8 types they are is in the name.
        is_e5m2 = attention.kv_cache_dtype == "fp8_e5m2"
        kept = NumberFormat(type="fp8_e5m2" if is_e5m2 else "fp8_e4m3", scale="tensor")
        kv_cache = kept if cache in (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2) else None
    else:
        kv_cache = _format(cache)
    query: NumberFormat | None
    if attention.query_quant is not None:
        query = NumberFormat(type="fp8_e4m3", scale="tensor")
    elif _hides_query(attention):
        query = None
    else:
        query = _format(attention.dtype)
    return AttentionReading(name=name, backend=attention.backend.name, kv_cache=kv_cache, query=query)


def _hides_query(attention: Any) -> bool:
    """FlashInfer quantizes queries to an FP8 cache by itself, except on GPUs that cannot multiply FP8 there."""
    if attention.backend.name != "FLASHINFER" or not attention.kv_cache_dtype.startswith("fp8"):
        return False
    return not (current_platform.is_device_capability(89) or current_platform.is_device_capability_family(120))


def _fp8_weights(layer: Any, kernel: Any) -> NumberFormat | None:
    key = kernel.config.weight_quant_key
    stored = layer.weight.dtype
    # Marlin repacks FP8 into integers; then only the key says what they are.
    number = _TYPES.get(key.dtype if stored is torch.int32 else stored)
    shape = key.scale.group_shape
    if number is None or getattr(kernel, "use_deep_gemm_e8m0", False):
        return None  # with E8M0 scales vLLM rounds the weights once more while loading
    if shape.row == shape.col > 1:
        return NumberFormat(type=number, scale="block", size=shape.row)
    scales = _scales_of(layer).numel()
    if scales == 1:
        return NumberFormat(type=number, scale="tensor")
    if scales == layer.output_size_per_partition:
        return NumberFormat(type=number, scale="channel")
    return None


def _scales_of(layer: Any) -> torch.Tensor:
    inverse = getattr(layer, "weight_scale_inv", None)
    scales: torch.Tensor = layer.weight_scale if inverse is None else inverse
    return scales


def _fp8_activations(kernel: Any) -> NumberFormat | None:
    if type(kernel).__name__ in _W8A16:
        return _format(kernel.config.input_dtype)
    if type(kernel).__name__ not in _W8A8:
        return None
    key = kernel.config.activation_quant_key
    shape, number = key.scale.group_shape, _TYPES[key.dtype]
    dynamic = not key.scale.static
    if shape == GroupShape.PER_TENSOR:
        return NumberFormat(type=number, scale="tensor", dynamic=dynamic)
    if shape == GroupShape.PER_TOKEN:
        return NumberFormat(type=number, scale="token", dynamic=dynamic)
    return NumberFormat(type=number, scale="group", size=shape.col, dynamic=dynamic)


def _grouped_weights(layer: Any, kernel: Any) -> NumberFormat | None:
    config = kernel.config
    if config.weight_type.size_bits != 4:
        return None
    symmetric = not config.zero_points
    if config.group_size == -1:
        return NumberFormat(type="int4", scale="channel", symmetric=symmetric)
    # Not from the scales in memory: Marlin pads them, and some kernels interleave them.
    return NumberFormat(type="int4", scale="group", size=config.group_size, symmetric=symmetric)


def _grouped_activations(layer: Any, kernel: Any) -> NumberFormat | None:
    if type(kernel).__name__ not in _W4A16:
        return None
    if getattr(layer, "use_w4a8", False):
        return _INT8_PER_TOKEN
    return _format(kernel.config.act_type)


def _plain(layer: Any) -> NumberFormat | None:
    """Of a layer without scales: the type of its weight, which stays even where a kernel took the values away."""
    return _format(layer.weight.dtype) if layer.weight.is_floating_point() else None


def _format(dtype: torch.dtype) -> NumberFormat | None:
    return NumberFormat(type=_TYPES[dtype]) if dtype in _TYPES else None


def _gemm(layer: Any) -> str:
    """The product an unquantized layer uses; on the CPU vLLM hangs a closure on the layer that calls it."""
    product = getattr(layer, "cpu_linear", None)
    if product is None:
        return type(getattr(layer, "quant_method", layer)).__name__
    code = getattr(product, "__code__", None)
    return str(code.co_names[-1] if code and code.co_names else product.__name__)
