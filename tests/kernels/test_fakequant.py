"""Rounding lands on the grid, and gradients pass it."""

import pytest
import torch

from kernels.fakequant import FP8_MAX, fp8_per_token, fp8_spacing, to_fp8, to_integers


def test_integers_are_the_nearest_within_limits() -> None:
    x = torch.tensor([[-9.7, -0.4, 0.6, 12.0]])
    assert to_integers(x, torch.tensor([[-8.0]]), torch.tensor([[7.0]])).tolist() == [[-8, 0, 1, 7]]


def test_fp8_saturates_where_a_cast_gives_nan() -> None:
    assert to_fp8(torch.tensor([1e6, -1e6])).tolist() == [FP8_MAX, -FP8_MAX]


@pytest.mark.parametrize("value", [0.0, 2.0**-6, 0.3, 1.0, 3.0, 400.0])
def test_the_spacing_is_the_distance_to_the_next_fp8_value(value: float) -> None:
    point = to_fp8(torch.tensor(value))
    upward = to_fp8(point + 0.6 * fp8_spacing(point))
    assert upward - point == fp8_spacing(point)
    assert to_fp8(point + 0.4 * fp8_spacing(point)) == point


@pytest.mark.parametrize("rounding", [to_fp8, lambda x: to_integers(x, torch.tensor(-8.0), torch.tensor(7.0))])
def test_gradients_pass_through_the_rounding(rounding: object) -> None:
    x = torch.tensor([0.3, 5.4], requires_grad=True)
    assert callable(rounding)
    (rounding(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0]


def test_each_token_has_its_own_scale() -> None:
    x = torch.tensor([[1e-3, 1e-4], [1e3, 1e2]])
    rounded = fp8_per_token(x)
    assert rounded.amax(-1).tolist() == pytest.approx([1e-3, 1e3])
    assert torch.allclose(rounded, x, rtol=2**-4, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    assert fp8_per_token(torch.zeros(1, 4)).tolist() == [[0.0] * 4]
