"""The definitions are Transformers' own, and read what compressed-tensors writes. Needs no running engine."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from kernels import linear, reference

SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config() -> Any:
    return LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=131072,
        rope_parameters=SCALING,
        attn_implementation="eager",
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_norm_is_that_of_transformers() -> None:
    theirs = modeling_llama.LlamaRMSNorm(16, eps=1e-2).double()
    theirs.weight.data = normal(16)
    # Theirs takes the mean in FP32.
    x = normal(5, 16, seed=1)
    torch.testing.assert_close(reference.rms_norm(x, theirs.weight, 1e-2), theirs(x), rtol=1e-6, atol=1e-7)


def test_frequencies_are_those_of_transformers_with_llama_3s_scaling_and_without() -> None:
    scaling = reference.Llama3Scaling(8.0, 1.0, 4.0, 8192)
    theirs = modeling_llama.LlamaRotaryEmbedding(config()).inv_freq.double()
    torch.testing.assert_close(reference.inverse_frequencies(8, 500000.0, scaling), theirs, rtol=1e-6, atol=0)


def test_rotations_are_those_of_transformers() -> None:
    x, positions = normal(1, 3, 9, 8), torch.tensor([[0, 1, 2, 5, 50, 500, 5000, 50000, 131071]])
    frequencies = reference.inverse_frequencies(8, 500000.0, reference.Llama3Scaling(8.0, 1.0, 4.0, 8192))
    angles = positions[..., None].double() * torch.cat([frequencies, frequencies])
    theirs, _ = modeling_llama.apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    made = reference.rotate(x[0].transpose(0, 1), positions[0], frequencies)
    torch.testing.assert_close(made, theirs[0].transpose(0, 1))


def test_swiglu_is_that_of_transformers() -> None:
    theirs, x = modeling_llama.LlamaMLP(config()).double(), normal(4, 24)
    gate_up = torch.cat([theirs.gate_proj(x), theirs.up_proj(x)], -1)
    torch.testing.assert_close(reference.swiglu(gate_up) @ theirs.down_proj.weight.T, theirs(x))


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_attention_is_that_of_transformers_in_prefill_in_pieces_and_in_decode(tokens: int) -> None:
    module = modeling_llama.LlamaAttention(config(), 0)
    query, keys, values = normal(7, 6, 8), normal(7, 2, 8, seed=1), normal(7, 2, 8, seed=2)
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    whole = (each.transpose(0, 1)[None] for each in (query, keys, values))
    theirs, _ = modeling_llama.eager_attention_forward(module.eval(), *whole, mask, scaling=8**-0.5)
    made = reference.attention(query[-tokens:], keys, values, 8**-0.5).output
    # Theirs takes the softmax in FP32.
    torch.testing.assert_close(made, theirs[0, -tokens:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_are_what_compressed_tensors_reads_there(symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    numbers = torch.randint(-8, 8, (16, 64), generator=draw, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (16, 4), generator=draw, dtype=torch.int8)
    scales = torch.rand(16, 4, generator=draw).bfloat16()
    packed = pack_to_int32(zeros, 4, packed_dim=0)
    made = linear.PackedInt4(pack_to_int32(numbers, 4), scales, None if symmetric else packed).values()
    for row, column in ((0, 0), (15, 63), (7, 17), (8, 31)):
        zero = 0 if symmetric else int(zeros[row, column // 16])
        assert made[row, column] == (int(numbers[row, column]) - zero) * scales[row, column // 16].double()
