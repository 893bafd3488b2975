"""Logits in FP32 from BF16 weights, and what is kept of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from kernels.head import fp32_logits, likeliest

    HIDDEN: torch.Tensor
    HEAD: torch.Tensor
    GIVEN: torch.Tensor

ROWS, VOCABULARY, WIDTH = 300, 1000, 32
VOCABULARY_AT_ONCE, ROWS_AT_ONCE = 384, 200
"""Less than there is, and no divisor of it; the rows are cut to a whole tile."""


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, fp32_logits, likeliest, HIDDEN, HEAD, GIVEN
    import torch

    from kernels.head import fp32_logits, likeliest

    generator = torch.Generator().manual_seed(0)
    HIDDEN = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    HEAD = torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16()
    GIVEN = torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.fixture(autouse=True)
def _little_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.head._VOCABULARY_AT_ONCE", VOCABULARY_AT_ONCE)
    monkeypatch.setattr("kernels.head._LOGITS_AT_ONCE", ROWS_AT_ONCE * VOCABULARY)


def test_logits_of_bf16_weights_are_those_of_float64() -> None:
    assert torch.allclose(fp32_logits(HIDDEN, HEAD).double(), HIDDEN.double() @ HEAD.double().T, atol=1e-4)


def test_the_likeliest_come_first_and_the_rest_is_what_they_leave() -> None:
    ln_p = (HIDDEN.double() @ HEAD.double().T).log_softmax(-1)
    found = likeliest(HIDDEN, HEAD, GIVEN, 20)
    assert torch.allclose(found.ln_top.double(), ln_p.topk(20).values, atol=1e-4)
    assert torch.allclose(found.ln_top.double(), ln_p.gather(-1, found.top.long()), atol=1e-4)
    assert torch.allclose(found.ln_given.double(), ln_p.gather(-1, GIVEN[:, None]).squeeze(-1), atol=1e-4)
    others = ln_p.scatter(-1, found.top.long(), -torch.inf).logsumexp(-1)
    assert torch.allclose(found.ln_rest.double(), others, atol=1e-4), (
        "with digits left where it is next to nothing"
    )


def test_of_fewer_tokens_all_are_kept_and_nothing_is_left() -> None:
    found = likeliest(HIDDEN[:3], HEAD[:5], GIVEN[:3] % 5, 20)
    assert found.top.shape == (3, 5)
    assert found.ln_rest.tolist() == [-torch.inf] * 3
