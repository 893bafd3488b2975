"""Holds what an engine computes against what its checkpoint declares. Knows readings; knows nothing of engines."""

import re
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from tiers.catalog import ModelShape
from tiers.precision import IN_BF16, NumberFormat, Precision
from tiers.probe.reading import End, EngineReading, LayerGroup, LayerReading

_PARTS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""The linear layers of a Llama block, by their checkpoint's names."""


class VerifiedPrecision(BaseModel):
    """What was read back from a running engine, and where it is not what was declared.

    The formats are those that the quantized layers have in common; None where they differ or could not be told.
    """

    model_config = ConfigDict(frozen=True)

    agrees: bool
    disagreements: tuple[str, ...]
    weights: NumberFormat | None
    activations: NumberFormat | None
    kv_cache: NumberFormat | None
    attention: NumberFormat | None
    head: NumberFormat | None
    attention_backend: str
    layers: tuple[LayerGroup, ...]
    workers: int
    device: str
    fingerprint: str


def verify_precision(
    declared: Precision, readings: Sequence[EngineReading], shape: ModelShape, *, takes_faults: bool = False
) -> VerifiedPrecision:
    """Compare every layer of every worker with the declaration.

    Args:
        declared: what the checkpoint's manifest promises.
        readings: one of each worker, of all pipeline stages.
        shape: of the model, which says what layers there must be.
        takes_faults: whether the engine was started to be broken.
    """
    problems = [*_missing_layers(readings, shape), *_wrong_layers(declared, readings)]
    attention = [each for reading in readings for each in reading.attention]
    problems += _wrong("KV cache", declared.kv_cache, {a.name: a.kv_cache for a in attention})
    problems += _wrong("attention", declared.attention, {a.name: a.query for a in attention})
    heads, embeddings = _ends("head", readings), _ends("embedding", readings)
    problems += _wrong("head", declared.head, heads) + _wrong("embedding", IN_BF16, embeddings)
    if len({(reading.vllm, reading.torch, reading.device) for reading in readings}) > 1:
        problems.append("the workers differ in their versions or devices")
    if any(reading.takes_faults for reading in readings) and not takes_faults:
        problems.append("faults can be planted in the engine, which only the self-test may start so")
    quantized = [layer for reading in readings for layer in reading.layers if not _is_kept(declared, layer)]
    first = readings[0]
    return VerifiedPrecision(
        agrees=not problems,
        disagreements=tuple(problems),
        weights=_common(layer.weights for layer in quantized),
        activations=_common(layer.activations for layer in quantized),
        kv_cache=_common(each.kv_cache for each in attention),
        attention=_common(each.query for each in attention),
        head=_common(heads.values()),
        attention_backend=", ".join(sorted({each.backend for each in attention})),
        layers=tuple(first.summary()),
        workers=len(readings),
        device=first.device,
        fingerprint=first.fingerprint,
    )


def _missing_layers(readings: Sequence[EngineReading], shape: ModelShape) -> list[str]:
    """Every linear layer and every block's attention must have been seen, and nothing else."""
    wanted = {f"model.layers.{block}.{part}" for block in range(shape.num_hidden_layers) for part in _PARTS}
    found = {part for reading in readings for layer in reading.layers for part in layer.parts}
    blocks = {each.name for reading in readings for each in reading.attention}
    problems = []
    if missing := sorted(wanted - found):
        problems.append(f"{missing[0]} and {len(missing) - 1} further layers were not found in the engine")
    if extra := sorted(found - wanted):
        problems.append(f"the engine has {extra[0]} and {len(extra) - 1} further layers that the model has not")
    ends: tuple[End, ...] = ("embedding", "head")
    problems += [f"no worker holds the {end}" for end in ends if not _ends(end, readings)]
    if len(blocks) != shape.num_hidden_layers:
        problems.append(
            f"the engine has attention in {len(blocks)} blocks and the model {shape.num_hidden_layers}"
        )
    return problems


def _ends(end: End, readings: Sequence[EngineReading]) -> dict[str, NumberFormat | None]:
    return {f"worker {reading.rank}": reading.ends[end] for reading in readings if end in reading.ends}


def _wrong_layers(declared: Precision, readings: Sequence[EngineReading]) -> list[str]:
    layers = {
        f"{layer.name} of worker {reading.rank}" if len(readings) > 1 else layer.name: layer
        for reading in readings
        for layer in reading.layers
    }
    kept = {name: layer for name, layer in layers.items() if _is_kept(declared, layer)}
    rest = {name: layer for name, layer in layers.items() if name not in kept}
    return [
        *_wrong("weights", IN_BF16, {name: layer.weights for name, layer in kept.items()}, layers),
        *_wrong("activations", IN_BF16, {name: layer.activations for name, layer in kept.items()}, layers),
        *_wrong("weights", declared.weights, {name: layer.weights for name, layer in rest.items()}, layers),
        *_wrong("activations", declared.activations, {n: layer.activations for n, layer in rest.items()}, layers),
    ]


def _is_kept(declared: Precision, layer: LayerReading) -> bool:
    return all(any(re.match(pattern, part) for pattern in declared.unquantized) for part in layer.parts)


def _wrong(
    what: str,
    declared: NumberFormat,
    read: dict[str, NumberFormat | None],
    layers: dict[str, LayerReading] | None = None,
) -> list[str]:
    """One sentence for each format that was read and not declared, with how often and the first place."""
    places: dict[NumberFormat | None, list[str]] = {}
    for name, format_ in read.items():
        if format_ != declared:
            places.setdefault(format_, []).append(name)
    return [
        f"{what}: declared {declared}, and {len(names)} of {len(read)} run {format_ or 'something unknown'} "
        f"({names[0]}{f', {layers[names[0]].kernel}' if layers else ''})"
        for format_, names in places.items()
    ]


def _common(formats: Iterable[NumberFormat | None]) -> NumberFormat | None:
    distinct = set(formats)
    return distinct.pop() if len(distinct) == 1 else None
