"""Breaks an operator as engines have been broken, to see that its definition finds it.

Each function takes what a bench has built, a model of one block or a sampler, and exchanges a part of it; the
model is thrown away with its bench. Written against vLLM 0.32.0's CPU build; where a part is another, on a GPU,
the planted error says so by an exception.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import linear as definitions
from kernels import reference
from tiers.operators.bench import Planting
from tiers.operators.drawing import Sampler
from tiers.operators.listing import PLANTS
from tiers.operators.one_layer import OneLayer


def planting(name: str | None) -> Planting | None:
    """What plants this error.

    Raises:
        KeyError: there is no such one.
    """
    if name is None:
        return None
    plant = next(plant for plant in PLANTS if plant.name == name)
    function = globals()[f"_{plant.name.replace('-', '_')}"]
    kind = Sampler if function.__annotations__.get("sampler") else OneLayer
    return lambda part: function(part) if isinstance(part, kind) else None


def _embedding_next_row(one: OneLayer) -> None:
    table = one.model.model.embed_tokens.weight
    table.data = table.data.roll(-1, 0)


def _epsilon_outside(one: OneLayer) -> None:
    norm = one.block.input_layernorm

    def forward(x: Tensor) -> Tensor:
        x32 = x.float()
        root = x32.square().mean(-1, keepdim=True).sqrt()
        made: Tensor = (x32 / (root + norm.variance_epsilon)).to(x.dtype) * norm.weight
        return made

    norm.forward = forward


def _epsilon_forgotten(one: OneLayer) -> None:
    one.block.input_layernorm.variance_epsilon = 0.0


def _norm_of_the_addend(one: OneLayer) -> None:
    norm = one.block.post_attention_layernorm
    whole = norm.forward
    norm.forward = lambda x, residual: (whole(x), x + residual)


def _rope_interleaved(one: OneLayer) -> None:
    rope = _own_rope(one)
    rope.is_neox_style = False


def _rope_unscaled(one: OneLayer) -> None:
    rope = _own_rope(one)
    plain = reference.inverse_frequencies(rope.rotary_dim, rope.base)
    angles = torch.outer(torch.arange(len(rope.cos_sin_cache), dtype=torch.float64), plain)
    rope.cos_sin_cache.copy_(torch.cat([angles.cos(), angles.sin()], -1))


def _rope_next_position(one: OneLayer) -> None:
    rope = _own_rope(one)
    whole = rope.forward
    last = len(rope.cos_sin_cache) - 1

    def forward(positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        turned = whole(positions, query, key.clone())[0]
        return turned, whole((positions + 1).clamp_max(last), query.clone(), key)[1]

    rope.forward = forward


def _own_rope(one: OneLayer) -> Any:
    """vLLM keeps one for all models of a process: a copy in its place."""
    attention = one.block.self_attn
    attention.rotary_emb = copy.deepcopy(attention.rotary_emb)
    return attention.rotary_emb


def _sums_in_bf16(one: OneLayer) -> None:
    weight = one.stored.fused("o_proj", "weight")

    def forward(x: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros(len(x), len(weight), dtype=torch.bfloat16)
        for begin in range(0, x.shape[-1], 64):
            part = slice(begin, begin + 64)
            total = (total.float() + x[:, part].float() @ weight[:, part].float().T).bfloat16()
        return total, None

    one.block.self_attn.o_proj.forward = forward


def _fp8_scales_transposed(one: OneLayer) -> None:
    layer = one.block.self_attn.o_proj
    values = getattr(layer, "fp8_values_in_fp32", None)
    if values is None:
        raise ValueError("this error is planted in Assay's own FP8 kernel, and another is used here")
    scales = layer.weight_scale.view(-1)
    if values.shape[0] != values.shape[1]:
        raise ValueError("o_proj is not square here")
    layer.fp8_values_in_fp32 = values * scales[None, :] / scales[:, None]


def _fp8_scale_of_all(one: OneLayer) -> None:
    def quantize(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax() / definitions.FP8_MOST
        return (x.float() / scale).to(torch.float8_e4m3fn), scale.expand(len(x), 1)

    for layer in (one.block.mlp.down_proj, one.block.self_attn.o_proj):
        layer.scheme.fp8_linear.quant_fp8 = quantize


def _int4_scales_transposed(one: OneLayer) -> None:
    # In memory [groups, N]; what is read of [N, groups] as if it were that.
    for layer in (one.block.mlp.down_proj, one.block.self_attn.o_proj):
        scale = layer.weight_scale
        scale.data = scale.data.t().contiguous().view(scale.shape)


def _int4_order(one: OneLayer) -> None:
    layer = one.block.self_attn.o_proj
    words = layer.weight_packed.data
    nibbles = [(words >> shift) & 0xF for shift in range(0, 32, 4)]
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    mixed = [nibbles[at].long() << (4 * place) for place, at in enumerate(order)]
    layer.weight_packed.data = (
        functools.reduce(torch.add, mixed).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.int32)
    )


def _int8_activations(one: OneLayer) -> None:
    layer = one.block.self_attn.o_proj
    whole = layer.forward

    def forward(x: Tensor) -> Any:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return whole(((x.float() / scale).round() * scale).bfloat16())

    layer.forward = forward


def _zero_points_off(one: OneLayer) -> None:
    for layer in (one.block.mlp.down_proj, one.block.self_attn.o_proj):
        zeros = layer.weight_zero_point.data
        nibbles = [(((zeros >> shift) & 0xF) + 1).clamp_max(15).long() << shift for shift in range(0, 32, 4)]
        layer.weight_zero_point.data = functools.reduce(torch.add, nibbles).to(torch.int32)


def _scores_unscaled(one: OneLayer) -> None:
    one.attention.impl.scale = 1.0


def _heads_interleaved(one: OneLayer) -> None:
    attention = one.attention
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    # Query head h is put where its neighbours read KV head h mod kv_heads.
    order = torch.arange(heads).view(-1, kv_heads).T.flatten()
    whole = attention.forward

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = query.view(len(query), heads, -1)[:, order].flatten(1)
        made = whole(mixed, key, value).view(len(query), heads, -1)
        back: Tensor = made[:, order.argsort()]
        return back.flatten(1)

    attention.forward = forward


def _mask_off(one: OneLayer) -> None:
    _with_metadata(one, lambda metadata: setattr(metadata, "causal", False))


def _block_swapped(one: OneLayer) -> None:
    def swap(metadata: Any) -> None:
        table = metadata.block_table.clone()
        table[:, [0, 1]] = table[:, [1, 0]]
        metadata.block_table = table

    _with_metadata(one, swap)


def _with_metadata(one: OneLayer, change: Callable[[Any], Any]) -> None:
    impl = one.attention.impl
    whole = impl.forward

    def forward(
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        metadata: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        broken = copy.copy(metadata)
        change(broken)
        return whole(layer, query, key, value, cache, broken, *rest, **named)

    impl.forward = forward


def _value_scale_forgotten(one: OneLayer) -> None:
    impl, layer = one.attention.impl, one.attention
    whole = impl.forward

    def forward(*given: Any, **named: Any) -> Any:
        kept, layer._v_scale_float = layer._v_scale_float, 1.0
        try:
            return whole(*given, **named)
        finally:
            layer._v_scale_float = kept

    impl.forward = forward


def _gate_for_up(one: OneLayer) -> None:
    layer = one.block.mlp.act_fn
    whole = layer.forward
    layer.forward = lambda x: whole(torch.cat(x.chunk(2, -1)[::-1], -1))


def _head_shifted(one: OneLayer) -> None:
    whole = one.model.compute_logits
    one.model.compute_logits = lambda hidden: whole(hidden).roll(1, -1)


def _log_softmax_in_bf16(sampler: Sampler) -> None:
    sampler.log_softmax = lambda x: x.float() - x.float().logsumexp(-1, keepdim=True).bfloat16().float()


def _bias_of_the_next_row(sampler: Sampler) -> None:
    whole = sampler.bias.apply
    sampler.bias.apply = lambda logits: whole(logits.roll(1, 0)).roll(-1, 0)


def _prompt_counted(sampler: Sampler) -> None:
    whole = sampler.penalties

    def penalties(
        x: Tensor, prompts: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor, answers: Any
    ) -> Tensor:
        both = [[*prompt, *answer] for prompt, answer in zip(prompts.tolist(), answers, strict=True)]
        return whole(x, prompts, presence, frequency, repetition, both)

    sampler.penalties = penalties


def _repetition_divides(sampler: Sampler) -> None:
    whole = sampler.penalties

    def divided(x: Tensor, prompts: Tensor, *rest: Any) -> Tensor:
        presence, frequency, repetition, answers = rest
        seen = torch.zeros_like(x, dtype=torch.bool).scatter(1, prompts, value=True)
        for row, answer in enumerate(answers):
            seen[row, answer] = True
        x = torch.where(seen, x / repetition[:, None], x)
        return whole(x, prompts, presence, frequency, torch.ones_like(repetition), answers)

    sampler.penalties = divided


def _second_best(sampler: Sampler) -> None:
    sampler.greedy = lambda x: x.topk(2).indices[:, 1]


def _temperature_multiplied(sampler: Sampler) -> None:
    sampler.temperature = lambda x, degrees, **_: x * degrees[:, None]


def _min_p_absolute(sampler: Sampler) -> None:
    own = sampler.min_p
    own.apply = lambda logits: logits.masked_fill(logits.softmax(-1) < own.min_p, -torch.inf)


def _top_k_one_more(sampler: Sampler) -> None:
    whole = sampler.nucleus
    sampler.nucleus = _module(lambda x, generators, k, p: whole(x, generators, k + 1, p))


def _top_p_one_more(sampler: Sampler) -> None:
    _resized(sampler, 1)


def _top_p_one_fewer(sampler: Sampler) -> None:
    _resized(sampler, -1)


def _resized(sampler: Sampler, by: int) -> None:
    """So many tokens more or fewer than it keeps, but one at least."""
    whole = sampler.nucleus

    def broken(x: Tensor, generators: Any, k: Any, p: Any) -> Any:
        drawn, masked = whole(x.clone(), generators, k, p)
        count = ((masked > -torch.inf).sum(-1, keepdim=True) + by).clamp_min(1)
        order = x.sort(dim=-1, descending=True, stable=True).indices
        ranks = order.argsort(-1)
        return drawn, x.masked_fill(ranks >= count, -torch.inf)

    sampler.nucleus = _module(broken)


def _module(function: Callable[..., Any]) -> Any:
    made = nn.Module()
    made.forward = function
    return made
