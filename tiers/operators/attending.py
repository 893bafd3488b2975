"""Attention over the paged cache that vLLM keeps, in BF16 and in FP8."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import linear, reference
from kernels.rounding import Allowance, accumulated, rounded, shared, stored, unit_roundoff, weighted
from tiers.operators.bench import Bench
from tiers.operators.bench import says as told
from tiers.operators.judgement import Absent, Case, compared
from tiers.operators.one_layer import BLOCKS, OneLayer, Part
from tiers.operators.storing import KV_SCALES, Storage

BF16, FP32 = torch.bfloat16, torch.float32
_STEPS = (("prefill", (1, 7, 200)), ("the rest of a prompt, and decode", (1, 1, 56)), ("decode", (1, 1, 1)))
"""New tokens of three sequences in each of three steps that follow each other."""
_LEAVES_QUERIES = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""vLLM 0.32.0's backends that multiply BF16 queries by what they read from an FP8 cache, unless vLLM has rounded
the queries before."""
_EXPONENTIAL = 2.0**-20
"""Relative error that an approximate exponential may have; of FP32's own functions it is 2⁻²³."""


def attention(bench: Bench) -> Iterator[Case | Absent]:
    """Prompts, what is left of one, and tokens after them, three sequences at once over blocks in no order."""
    return _steps(bench, "bf16")


def attention_fp8_kv(bench: Bench) -> Iterator[Case | Absent]:
    """Keys and values rounded to E4M3 with a scale each, queries left alone."""
    return _steps(bench, "fp8-kv")


def _steps(bench: Bench, storage: Storage) -> Iterator[Case | Absent]:
    try:
        one = bench.layer(storage)
    except (NotImplementedError, ValueError) as error:
        if storage == "bf16":
            raise
        yield Absent(f"vLLM builds no such attention here: {error}")
        return
    if storage == "fp8-kv" and (reason := _beyond_the_definition(one)):
        yield Absent(reason, _kernel(one))
        return
    shape, given = bench.shape, bench.inputs.activations
    q = given["q"].view(-1, shape.heads, shape.width)
    k, v = (given[name].view(-1, shape.kv_heads, shape.width) for name in "kv")
    order = torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(0)) + 1
    many = (BLOCKS - 1) // 3
    blocks = [tuple(order[begin : begin + many].tolist()) for begin in range(0, 3 * many, many)]
    cache = torch.zeros(2, BLOCKS, one.block_size, shape.kv_heads, shape.width, dtype=BF16)
    lengths = [0, 0, 0]
    for name, new in _STEPS:
        parts = [Part(length + more, more, each) for length, more, each in zip(lengths, new, blocks, strict=True)]
        rows = torch.cat([torch.arange(part.length - part.new, part.length) for part in parts])
        for part in parts:
            for position in range(part.length - part.new, part.length):
                place = part.blocks[position // one.block_size], position % one.block_size
                cache[0][place], cache[1][place] = k[position], v[position]
        query, key, value = (each[rows].flatten(1) for each in (q, k, v))
        ran = one.attend(query, key, value, parts).view(len(rows), shape.heads, -1)
        exact, allowed = _exact(one, q, cache, parts, in_fp8=storage == "fp8-kv")
        says = f"{shape.heads}/{shape.kv_heads} heads of {shape.width}, {name}"
        yield compared(_kernel(one), told(says, len(rows)), ran, exact, allowed)
        lengths = [part.length for part in parts]


def _beyond_the_definition(one: OneLayer) -> str | None:
    """Why what is defined here, a rounded cache alone, is not what this backend computes, if so.

    Where vLLM rounds queries to FP8 before the backend gets them, the backend multiplies in FP8 throughout and
    rounds the softmax's numerators too: FlashAttention-3, and 4 on SM100; Triton's ``unified_attention``, which
    casts them to the values' type; FlashInfer's kernels on SM100.
    """
    name = one.attention.backend.name
    if one.attention.query_quant is not None:
        return (
            f"{name} rounds queries to FP8 here and the softmax's numerators with them, which is not held to a "
            "definition yet"
        )
    if name not in _LEAVES_QUERIES:
        return f"nobody has read yet what {name} rounds besides an FP8 cache"
    return None


def _exact(
    one: OneLayer, q: Tensor, cache: Tensor, parts: list[Part], *, in_fp8: bool
) -> tuple[Tensor, Allowance]:
    found = []
    for part in parts:
        table = torch.tensor(part.blocks)
        keys, values = (reference.paged(half, table, part.length) for half in cache)
        unsure = (torch.zeros_like(keys).double(), torch.zeros_like(values).double())
        if in_fp8:
            both = [_in_fp8(x, scale) for x, scale in zip((keys, values), KV_SCALES, strict=True)]
            (keys, values), unsure = (x.values for x in both), (both[0].either, both[1].either)
        query = q[part.length - part.new : part.length]
        made = reference.attention(query, keys, values, query.shape[-1] ** -0.5)
        found.append((made.output, _allows(query, made, *unsure)))
    most, spread = (torch.cat([getattr(allowed, name) for _, allowed in found]) for name in ("most", "spread"))
    return torch.cat([exact for exact, _ in found]), Allowance(most, spread)


def _in_fp8(x: Tensor, scale: float) -> linear.QuantizedInput:
    # The scale as it is kept, in FP32.
    return linear.quantized_input(x, torch.tensor(scale).double(), 4 * unit_roundoff(FP32))


def _allows(query: Tensor, made: reference.Attended, unsure_keys: Tensor, unsure_values: Tensor) -> Allowance:
    """Products q · k summed in FP32 and scaled, each of which changes its weight by a part of it; exponentials;
    weights rounded to BF16 before they meet the values (Dao, FlashAttention-2, 2023, section 3.3); their sum in
    FP32; the result. A key or value that FP8 may round either way changes what it changes.
    """
    width, share = query.shape[-1], query.shape[1] // unsure_keys.shape[1]
    p, v, o = made.weights, made.values.abs(), made.output.abs()
    sizes = torch.einsum("thd,shd->hts", query.double().abs(), made.keys.abs()) * width**-0.5
    scores = accumulated(width, sizes, FP32) + rounded(sizes, FP32, 4.0)
    unsure = unsure_keys.repeat_interleave(share, 1)
    either = torch.einsum("thd,shd->hts", query.double().abs(), unsure) * width**-0.5
    part = p * (scores.most + either + _EXPONENTIAL)
    moved = torch.einsum("hts,shd->thd", part, v) + part.sum(-1).T[..., None] * o
    either_value = torch.einsum("hts,shd->thd", p, unsure_values.repeat_interleave(share, 1))
    sums = torch.einsum("hts,shd->thd", p, v)
    squares = torch.einsum("hts,shd->thd", p.square(), v.square())
    rounds_weights = weighted(sums, squares, BF16)
    allowed = shared(moved + either_value) + rounds_weights + accumulated(p.shape[-1], 2 * sums, FP32)
    return stored(made.output, allowed, BF16)


def _kernel(one: OneLayer) -> str:
    isa = getattr(one.attention, "isa", None)
    cache = str(one.attention.kv_cache.dtype).removeprefix("torch.")
    return f"{one.attention.backend.name}{f' ({isa})' if isa else ''}, cache {cache}"
