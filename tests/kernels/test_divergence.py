"""Claims of kernels/divergence.py, against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from kernels.divergence import kl_divergence, kl_lower_bound


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, kl_divergence, kl_lower_bound
    import torch

    from kernels.divergence import kl_divergence, kl_lower_bound


def exact(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(p_logits.double(), -1), torch.log_softmax(q_logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 4


def test_kl_equals_its_definition_in_float64(logits: torch.Tensor) -> None:
    other = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kl_divergence(logits, other).double(), exact(logits, other), rtol=1e-4, atol=1e-7)


def test_kl_of_nearly_equal_distributions_does_not_cancel(logits: torch.Tensor) -> None:
    other = logits + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    truth = exact(logits, other)
    assert truth.max() < 1e-7
    torch.testing.assert_close(kl_divergence(logits, other).double(), truth, rtol=0.05, atol=1e-10)


def test_kl_ignores_a_constant_shift_of_logits(logits: torch.Tensor) -> None:
    coarse = (logits * 1024).round() / 1024  # so that adding 8 rounds nothing
    assert kl_divergence(coarse, coarse + 8).max() < 1e-7


def test_kl_refuses_other_shapes(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be equal"):
        kl_divergence(logits, logits[:, :-1])


@pytest.mark.parametrize("k", [1, 5, 20, 999])
def test_the_bound_is_below_the_exact_value_and_above_zero(logits: torch.Tensor, k: int) -> None:
    other = logits + 0.5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    p, q = torch.log_softmax(logits.double(), -1), torch.log_softmax(other.double(), -1)
    top = p.topk(k).indices
    bound = kl_lower_bound(p.gather(-1, top), q.gather(-1, top))
    assert (bound <= exact(logits, other) + 1e-12).all()
    assert (bound > 0).all()


def test_the_bound_over_all_tokens_is_the_exact_value(logits: torch.Tensor) -> None:
    other = logits + 0.5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    p, q = torch.log_softmax(logits.double(), -1), torch.log_softmax(other.double(), -1)
    torch.testing.assert_close(kl_lower_bound(p, q), exact(logits, other), rtol=1e-6, atol=1e-9)


def test_padding_a_row_changes_nothing() -> None:
    p, q = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.4, 0.4]]).log()
    pad = torch.tensor([[-torch.inf]])
    torch.testing.assert_close(
        kl_lower_bound(torch.cat([p, pad], -1), torch.cat([q, pad], -1)), kl_lower_bound(p, q)
    )
