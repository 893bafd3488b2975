"""Attention, exact and in FP8, against its definition in float64."""

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.kernels.closeness import assert_close

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

    from kernels.fp8_attention import attention

    given = operands(queries, keys)
    assert_close(attention(*given, SCALING).double(), exact(*given), rtol=1e-5, atol=1e-5)


def defined(given: Operands, scales: Operands, lifted: float = 256.0, *, summed_after: bool = False) -> "Tensor":
    """FP8 attention by its words, float64: one query of one head at a time, each number the nearest that FP8 has.

    ``lifted`` is what numerators are multiplied by before they are rounded; ``summed_after``, whether the
    denominator is of rounded numerators.
    """
    import torch

    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]

    def nearest(x: "Tensor") -> "Tensor":
        return numbers[(x.unsqueeze(-1) - numbers).abs().argmin(-1)]

    query, key, value = (nearest(x.double() / s.double()) * s.double() for x, s in zip(given, scales, strict=True))
    out = torch.zeros(query.shape, dtype=torch.float64)
    past = key.shape[2] - query.shape[2]
    for head in range(HEADS):
        k, v = (each[0, head // (HEADS // KEY_HEADS)] for each in (key, value))
        for place in range(query.shape[2]):
            seen = past + place + 1
            products = k[:seen] @ query[0, head, place] * SCALING
            numerators = (products - products.max()).exp()
            rounded = nearest(numerators * lifted) / lifted
            denominator = rounded.sum() if summed_after else numerators.sum()
            out[0, head, place] = rounded @ v[:seen] / denominator
    return out


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (20, 40)])
def test_in_fp8_it_is_what_its_words_say_and_none_of_what_they_rule_out(queries: int, keys: int) -> None:

    from kernels.fakequant import scales_of
    from kernels.fp8_attention import PER_TENSOR, OperandScales, attention_in_fp8

    given = operands(queries, keys)
    scales = OperandScales(*(scales_of(each, PER_TENSOR) for each in given))
    plain = Operands(*(each.scale for each in scales))
    out = attention_in_fp8(*given, SCALING, scales).double()
    assert_close(out, defined(given, plain), rtol=1e-5, atol=1e-5)
    others = {f"lifted by {lifted}": defined(given, plain, lifted) for lifted in (0.125, 1.0, 448.0)}
    others["summed after rounding"] = defined(given, plain, summed_after=True)
    others["not rounded"] = exact(*given)
    for name, other in others.items():
        assert (out - other).abs().max() > 1e-3, name
