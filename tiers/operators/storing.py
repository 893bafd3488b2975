"""Weights as a checkpoint stores them at a precision, and what is read of them there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.fakequant import Scheme, pack_int4, quantize
from kernels.linear import PackedInt4
from tiers.operators.inputs import PROJECTIONS, Inputs

Storage = Literal["bf16", "fp8", "int4", "int4-asymmetric", "fp8-kv"]
KV_SCALES = (0.017, 0.023)
"""Of keys and of values: no powers of two, and such that both reach into E4M3's range."""
_FEW_TOKENS = 512
_ROWS = 512
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""vLLM's layers, and whose outputs they have one after another."""


@dataclass(frozen=True)
class Stored:
    """A model of one block on disk, so to speak."""

    config: dict[str, Any]
    """Its config.json."""
    tensors: list[tuple[str, Tensor]]
    """By their names in Hugging Face's layout."""
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Of each projection what it is stored as."""
    has_kv_scales: bool = False

    def fused(self, layer: str, name: str) -> Tensor:
        """That tensor of all projections which one layer of vLLM's holds, outputs one after another."""
        return torch.cat([self.parts[part][name] for part in FUSED[layer]])

    def packed(self, layer: str) -> PackedInt4:
        """An INT4 layer."""
        has_zeros = "weight_zero_point" in self.parts[FUSED[layer][0]]
        zeros = self.fused(layer, "weight_zero_point") if has_zeros else None
        return PackedInt4(self.fused(layer, "weight_packed"), self.fused(layer, "weight_scale"), zeros)


def stored(inputs: Inputs, storage: Storage) -> Stored:
    """The block of these weights in that storage, rounded to nearest as checkpoints are.

    Written by `kernels.fakequant`, read by `kernels.linear`, which has nothing in common with it.
    """
    shape = inputs.shape
    store: dict[Storage, Callable[[Tensor], dict[str, Tensor]]] = {
        "bf16": lambda weight: {"weight": weight},
        "fp8": _fp8,
        "fp8-kv": _fp8,
        "int4": lambda weight: _int4(weight, shape.group, symmetric=True),
        "int4-asymmetric": lambda weight: _int4(weight, shape.group, symmetric=False),
    }
    parts = {name: _by_rows(store[storage], inputs.weights[f"{name}.weight"]) for name in PROJECTIONS}
    tensors = [
        (f"model.layers.0.{'self_attn' if part[0] in 'qkvo' else 'mlp'}.{part}.{name}", tensor)
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    ]
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    tensors += [(f"model.layers.0.{name}", inputs.weights[name]) for name in norms]
    tensors.append(("model.norm.weight", inputs.weights["input_layernorm.weight"]))
    # Embedding and head are BF16 in every storage, and of a large model most of the memory: nobody asks these.
    vocabulary = shape.vocabulary if storage == "bf16" else _FEW_TOKENS
    for end, name in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        if end == "embed" or not shape.config.get("tie_word_embeddings"):
            unused = torch.zeros(vocabulary, shape.hidden, dtype=torch.bfloat16)
            tensors.append((name, inputs.weights[end] if storage == "bf16" else unused))
    has_kv_scales = storage == "fp8-kv"
    if has_kv_scales:
        tensors += [
            (f"model.layers.0.self_attn.{name}_scale", torch.tensor([scale]))
            for name, scale in zip("kv", KV_SCALES, strict=True)
        ]
    config = shape.config | {"vocab_size": vocabulary}
    if quantization := _quantization(storage, shape.group):
        config["quantization_config"] = quantization
    return Stored(config, tensors, parts, has_kv_scales)


def _by_rows(store: Callable[[Tensor], dict[str, Tensor]], weight: Tensor) -> dict[str, Tensor]:
    """A few rows at a time, which stay in the cache; no scale is of more than one row."""
    some = [store(rows) for rows in torch.split(weight, _ROWS)]
    made = {name: torch.cat([each[name] for each in some]) for name in some[0]}
    return made | ({"weight_shape": torch.tensor(weight.shape)} if "weight_packed" in made else {})


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    values, scales = quantize(weight, Scheme("fp8", "channel"))
    return {"weight": values, "weight_scale": scales.scale}


def _int4(weight: Tensor, group: int, *, symmetric: bool) -> dict[str, Tensor]:
    values, (scale, zeros) = quantize(weight, Scheme("int4", "group", group, symmetric=symmetric))
    stored = {"weight_packed": pack_int4(values), "weight_scale": scale}
    return stored if zeros is None else stored | {"weight_zero_point": pack_int4(zeros.T).T.contiguous()}


def _quantization(storage: Storage, group: int) -> dict[str, Any] | None:
    """As compressed-tensors writes it into a config."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: Mapping[Storage, dict[str, Any]] = {
        "fp8": fp8 | {"strategy": "channel", "dynamic": False},
        "fp8-kv": fp8 | {"strategy": "channel", "dynamic": False},
        "int4": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group},
        "int4-asymmetric": {
            "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group,
        },
    }  # fmt: skip
    if storage not in weights:
        return None
    is_fp8 = storage.startswith("fp8")
    format_ = "float-quantized" if is_fp8 else "pack-quantized"
    scheme = {
        "targets": ["Linear"],
        "format": format_,
        "weights": weights[storage],
        "input_activations": fp8 | {"strategy": "token", "dynamic": True} if is_fp8 else None,
        "output_activations": None,
    }
    cache = fp8 | {"strategy": "tensor", "dynamic": False} if storage == "fp8-kv" else None
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": format_,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
        "kv_cache_scheme": cache,
    }
