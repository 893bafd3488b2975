"""The operators between matrix products: embedding, norms, rotations, SwiGLU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.rounding import Allowance, accumulated, nothing, rounded, shared, stored, unit_roundoff
from tiers.operators.bench import TOKEN_COUNTS, Bench
from tiers.operators.bench import says as told
from tiers.operators.judgement import Absent, Case, compared

BF16, FP32 = torch.bfloat16, torch.float32
_FEW = 8.0
"""Roundings in FP32 of a short formula, its functions counted as two each."""


def _method(layer: Any) -> str:
    """Which of its implementations vLLM has chosen."""
    return f"{type(layer).__name__}.{layer._forward_method.__name__}"


def embedding(bench: Bench) -> Iterator[Case | Absent]:
    """Rows are copied: there is no error."""
    one, table = bench.layer("bf16"), bench.inputs.weights["embed"]
    layer = one.model.model.embed_tokens
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, bench.shape.vocabulary - 1])
    for count in TOKEN_COUNTS:
        tokens = torch.cat([torch.randint(bench.shape.vocabulary, (count,), generator=generator), ends])
        ran = one.run(layer, tokens)
        exact = reference.embed(tokens, table)
        says = told(f"{len(table)} × {bench.shape.hidden}", len(tokens))
        yield compared(type(layer).__name__, says, ran, exact, nothing(exact))


def rms_norm(bench: Bench) -> Iterator[Case | Absent]:
    """Of rows as they are, and of one so quiet that ε is half of what stands under the root."""
    one = bench.layer("bf16")
    norm, weight = one.block.input_layernorm, bench.inputs.weights["input_layernorm.weight"]
    for x in bench.rows("stream"):
        rows = torch.cat([x, _quiet(x[-1:], bench.shape.epsilon)])
        ran = one.run(norm, rows)
        exact = reference.rms_norm(rows, weight, bench.shape.epsilon)
        says = told(str(bench.shape.hidden), len(rows))
        yield compared(_norm_kernel(norm, "rms_norm", rows), says, ran, exact, _norm_allows(exact))


def add_rms_norm(bench: Bench) -> Iterator[Case | Absent]:
    """Transformers rounds the sum before its norm, vLLM after; both are BF16."""
    one = bench.layer("bf16")
    norm, weight = one.block.post_attention_layernorm, bench.inputs.weights["post_attention_layernorm.weight"]
    for x, residual in zip(bench.rows("added"), bench.rows("stream"), strict=True):
        ran, stream = one.run(norm, x, residual)
        exact, total = reference.add_rms_norm(x, residual, weight, bench.shape.epsilon)
        kernel = _norm_kernel(norm, "fused_add_rms_norm", x)
        width = bench.shape.hidden
        rounds_sum = rounded(exact, BF16) + shared(exact.abs() * unit_roundoff(BF16) / width**0.5)
        yield compared(kernel, told(f"{width}, norm", len(x)), ran, exact, _norm_allows(exact, rounds_sum))
        kept = stored(total, nothing(total), BF16, few_bits=True)
        yield compared(kernel, told(f"{width}, sum", len(x)), stream, total, kept)


def _quiet(row: Tensor, epsilon: float) -> Tensor:
    loudness = row.double().square().mean().sqrt()
    quiet: Tensor = row.double() / loudness * epsilon**0.5
    return quiet.bfloat16()


def _norm_allows(exact: Tensor, before: Allowance | None = None) -> Allowance:
    """A sum of squares in FP32 under a root, which halves its relative error; the normalized row rounded to BF16
    before the weight, as Transformers does; the result.
    """
    mean = accumulated(exact.shape[-1], exact.abs() / 2, FP32)
    allowed = shared(mean.most) + rounded(exact, FP32, _FEW) + rounded(exact, BF16)
    return stored(exact, allowed if before is None else allowed + before, BF16)


def _norm_kernel(norm: Any, operator: str, x: Tensor) -> str:
    from vllm import ir

    device = norm.weight.device
    given = [x.to(device)] * (2 if operator == "fused_add_rms_norm" else 1)
    given += [norm.weight.data, norm.variance_epsilon]
    return f"{type(norm).__name__}, {operator} ({getattr(ir.ops, operator).dispatch(*given).provider})"


def rope(bench: Bench) -> Iterator[Case | Absent]:
    """At positions from the first to the context's last, more of them early."""
    one, shape = bench.layer("bf16"), bench.shape
    layer = one.block.self_attn.rotary_emb
    frequencies = reference.inverse_frequencies(shape.width, shape.theta, shape.scaling)
    for q, k in zip(bench.rows("q"), bench.rows("k"), strict=True):
        last = shape.context - 1
        positions = torch.logspace(0, torch.tensor(shape.context).log2().item(), len(q), base=2.0).long() - 1
        positions = positions.clamp(0, last) if len(q) > 1 else torch.tensor([last])
        made = one.run(layer, positions, q, k)
        for name, given, ran in zip(("queries", "keys"), (q, k), made, strict=True):
            heads = given.view(len(given), -1, shape.width)
            exact = reference.rotate(heads, positions, frequencies)
            says = told(f"{heads.shape[1]} heads of {shape.width}, {name} to position {last}", len(q))
            allowed = _rotation_allows(heads, positions, frequencies, exact)
            yield compared(_method(layer), says, ran.view_as(exact), exact, allowed)


def _rotation_allows(x: Tensor, positions: Tensor, frequencies: Tensor, exact: Tensor) -> Allowance:
    """An angle of FP32, which is the less certain the farther the position; cosine, sine and both products rounded
    to BF16, as Transformers does; the result.
    """
    angle = (positions.double()[:, None] * frequencies)[:, None, :]
    first, second = x.double().abs().chunk(2, dim=-1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    terms = torch.cat([first * cos + second * sin, second * cos + first * sin], -1)
    turned = torch.cat([first * sin + second * cos, second * sin + first * cos], -1)
    unsure = turned * torch.cat([angle, angle], -1) * _FEW * unit_roundoff(FP32)
    allowed = shared(unsure) + rounded(terms, BF16) + rounded(terms, BF16) + rounded(terms, FP32, _FEW)
    return stored(exact, allowed, BF16)


def swiglu(bench: Bench) -> Iterator[Case | Absent]:
    """Transformers rounds silu(gate) to BF16 before the product."""
    one = bench.layer("bf16")
    layer = one.block.mlp.act_fn
    for x in bench.rows("gate_up"):
        exact = reference.swiglu(x)
        gate = x.double()[..., : exact.shape[-1]].abs()
        allowed = rounded(exact, BF16) + rounded(exact * (gate + _FEW), FP32)
        says = told(f"2 × {bench.shape.inner}", len(x))
        yield compared(_method(layer), says, one.run(layer, x), exact, stored(exact, allowed, BF16))
