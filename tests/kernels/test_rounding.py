"""What rounding explains: bounds hold for real roundings, and are not so wide that they explain anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels import rounding


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, rounding
    import torch

    from kernels import rounding


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_ulp_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = normal(1000).to(dtype).abs()
        following = torch.nextafter(x, torch.full_like(x, torch.inf))
        assert torch.equal(rounding.ulp(x, dtype), following.double() - x.double())


def test_an_ulp_of_nothing_is_not_nothing() -> None:
    found = rounding.ulp(torch.zeros(1), torch.bfloat16).item()
    assert found == torch.finfo(torch.bfloat16).tiny * torch.finfo(torch.bfloat16).eps


def test_what_cancels_is_told_in_ulps_of_its_row() -> None:
    units = rounding.ulp_in_its_row(torch.tensor([[4.0, 0.0, 1e-9, 4.0]]), torch.bfloat16)
    assert units[0].tolist() == [2**-5, 2**-6, 2**-6, 2**-5]


def test_a_result_that_is_stored_is_half_an_ulp_off_at_most_and_less_on_average() -> None:
    exact = normal(20_000).double()
    allowed = rounding.stored(exact, rounding.nothing(exact), torch.bfloat16)
    error = (exact.bfloat16().double() - exact).abs()
    assert (error <= allowed.most).all()
    assert error.square().mean().sqrt() == pytest.approx(allowed.spread.square().mean().sqrt().item(), rel=0.02)


def test_sums_of_two_are_off_by_half_an_ulp_or_nothing_more_often() -> None:
    x, y = normal(20_000).bfloat16(), 2 * normal(20_000, seed=1).bfloat16()
    exact = x.double() + y.double()
    error = ((x + y).double() - exact).square().mean().sqrt()
    few, many = (
        rounding.stored(exact, rounding.nothing(exact), torch.bfloat16, few_bits=few).spread
        for few in (True, False)
    )
    assert many.square().mean().sqrt() * 0.9 < error <= few.square().mean().sqrt()


def test_a_sum_in_fp32_is_within_its_bounds_and_one_in_bf16_is_not() -> None:
    x, w = normal(64, 1024).bfloat16(), normal(32, 1024, seed=1).bfloat16()
    exact, total = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    allowed = rounding.accumulated(1024, total, torch.float32)
    fine = torch.zeros(64, 32)
    coarse = torch.zeros(64, 32, dtype=torch.bfloat16)
    for begin in range(0, 1024, 64):
        part = x[:, begin : begin + 64].float() @ w[:, begin : begin + 64].float().T
        fine, coarse = fine + part, (coarse.float() + part).bfloat16()
    assert ((fine.double() - exact).abs() <= allowed.most).all()
    assert (fine.double() - exact).square().mean().sqrt() <= allowed.spread.square().mean().sqrt()
    assert (coarse.double() - exact).square().mean().sqrt() > 10 * allowed.spread.square().mean().sqrt()


def test_terms_that_were_rounded_before_make_the_error_that_is_told() -> None:
    x, w = normal(64, 512).double(), normal(32, 512, seed=1).double()
    terms, squares = x.abs() @ w.abs().T, x.square() @ w.square().T
    allowed = rounding.weighted(terms, squares, torch.bfloat16)
    error = (x @ (w.bfloat16().double() - w).T).abs()
    assert (error <= allowed.most).all()
    assert 0.3 < error.square().mean().sqrt() / allowed.spread.square().mean().sqrt() <= 1


def test_errors_that_know_nothing_of_each_other_add_less_than_their_bounds() -> None:
    one = rounding.rounded(torch.full((1,), 3.0), torch.bfloat16)
    both = one + one
    assert both.most.item() == 2 * one.most.item()
    assert both.spread.item() == pytest.approx(2**0.5 * one.spread.item())
    together = rounding.shared(one.most)
    assert together.spread.item() == together.most.item()


def test_the_certain_bound_is_taken_where_it_is_less() -> None:
    one = torch.ones(1)
    assert rounding.accumulated(4, one, torch.float32).most.item() == pytest.approx(4 * 2**-24, rel=1e-5)
    assert rounding.accumulated(10_000, one, torch.float32).most.item() == pytest.approx(900 * 2**-24, rel=1e-3)
