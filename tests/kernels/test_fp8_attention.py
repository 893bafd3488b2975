"""Attention, exact and in FP8, against its definition in float64."""

from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from torch import Tensor

HEADS, KEY_HEADS, WIDTH = 6, 2, 16
SCALING = WIDTH**-0.5


class Operands(NamedTuple):
    query: "Tensor"
    key: "Tensor"
    value: "Tensor"


def operands(queries: int, keys: int) -> Operands:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys))
    return Operands(*(torch.randn(1, *shape, WIDTH, generator=generator) * 2 for shape in shapes))


def exact(query: "Tensor", key: "Tensor", value: "Tensor") -> "Tensor":
    """One query of one head at a time, float64."""
    import torch

    out = torch.zeros(query.shape, dtype=torch.float64)
    past = key.shape[2] - query.shape[2]
    for head in range(HEADS):
        k, v = (each[0, head // (HEADS // KEY_HEADS)].double() for each in (key, value))
        for place in range(query.shape[2]):
            seen = past + place + 1
            weights = (k[:seen] @ query[0, head, place].double() * SCALING).softmax(0)
            out[0, head, place] = weights @ v[:seen]
    return out


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (1, 5)])
def test_a_query_sees_the_keys_up_to_its_own(queries: int, keys: int) -> None:
    import torch

    from kernels.fp8_attention import attention

    given = operands(queries, keys)
    torch.testing.assert_close(attention(*given, SCALING).double(), exact(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9)])
def test_in_fp8_it_is_near_that_of_its_rounded_operands_and_not_equal_to_it(queries: int, keys: int) -> None:

    from kernels.fakequant import fake_quantize, scales_of
    from kernels.fp8_attention import PER_TENSOR, OperandScales, attention_in_fp8

    given = operands(queries, keys)
    scales = OperandScales(*(scales_of(each, PER_TENSOR) for each in given))
    out = attention_in_fp8(*given, SCALING, scales).double()
    rounded = exact(*(fake_quantize(each, PER_TENSOR) for each in given))
    # What is left is the rounding of the probabilities: 4 bits, so at most 1/16 of each.
    error = (out - rounded).norm() / rounded.norm()
    assert 1e-4 < error < 1 / 16
    assert (out - exact(*given)).norm() > (rounded - exact(*given)).norm() / 2
