"""What lies between logits and tokens, by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels import sampling


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, sampling
    import torch

    from kernels import sampling


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).double().log()


def mask(*kept: int) -> Tensor:
    return torch.tensor([kept], dtype=torch.bool)


def test_log_probabilities_are_those_of_the_softmax() -> None:
    found = sampling.log_softmax(torch.tensor([[0.0, math.log(3)]]))
    assert found.exp().tolist()[0] == pytest.approx([0.25, 0.75])
    assert sampling.softmax(torch.tensor([[1000.0, 0.0]])).tolist() == [[1.0, 0.0]]


def test_heat_flattens() -> None:
    assert sampling.temperature(torch.tensor([[2.0, -4.0]]), torch.tensor([2.0])).tolist() == [[1.0, -2.0]]


def test_a_token_that_was_said_is_less_likely_whatever_the_sign_of_its_logit() -> None:
    seen, said = torch.tensor([[1, 0, 0, 0]]), torch.tensor([[0, 3, 0, 0]])
    found = sampling.repetition_penalty(torch.tensor([[4.0, -4.0, 4.0, -4.0]]), seen, said, torch.tensor([2.0]))
    assert found.tolist() == [[2.0, -8.0, 4.0, -4.0]]


def test_frequency_counts_and_presence_does_not() -> None:
    said = sampling.counts([[1, 1, 2]], 4)
    logits, penalty = torch.zeros(1, 4), torch.tensor([0.5])
    assert sampling.frequency_penalty(logits, said, penalty).tolist() == [[0.0, -1.0, -0.5, 0.0]]
    assert sampling.presence_penalty(logits, said, penalty).tolist() == [[0.0, -0.5, -0.5, 0.0]]


def test_a_bias_is_added_to_its_token_alone() -> None:
    assert sampling.logit_bias(torch.zeros(2, 3), [{}, {1: 2.5}]).tolist() == [[0, 0, 0], [0, 2.5, 0]]


def test_who_is_kept_is_likelier_than_who_is_not() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    answers = [
        sampling.most_likely(logits, mask(*kept)).item() for kept in ((1, 0, 0, 1), (1, 1, 0, 0), (0, 0, 0, 0))
    ]
    assert answers == [True, False, False]


def test_top_k_is_k_tokens_or_all_that_tie_for_the_last_place() -> None:
    logits, two = torch.tensor([[3.0, 2.0, 2.0, 1.0]]), torch.tensor([2])
    misses = [
        sampling.top_k_misses(logits, mask(*kept), two).item()
        for kept in ((1, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 0), (1, 1, 1, 1))
    ]
    assert misses == [1, 0, 0, 1]
    assert sampling.top_k_misses(logits, mask(1, 1, 1, 1), torch.tensor([9])).item() == 0


def test_the_nucleus_is_the_fewest_tokens_with_that_mass() -> None:
    logits, p = logits_of(0.5, 0.3, 0.15, 0.05), torch.tensor([0.7])
    misses = [
        sampling.top_p_misses(logits, mask(*kept), p).item() for kept in ((1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0))
    ]
    assert misses == pytest.approx([0.2, 0.0, 0.1])


def test_one_token_stays_however_small_the_nucleus() -> None:
    assert sampling.top_p_misses(logits_of(0.5, 0.5), mask(1, 0), torch.tensor([0.0])).item() == 0


def test_min_p_is_a_part_of_the_likeliest_ones_probability() -> None:
    logits, bound = logits_of(0.5, 0.3, 0.2), torch.tensor([0.5])
    assert sampling.min_p_misses(logits, mask(1, 1, 0), bound).tolist() == [[0.0, 0.0, 0.0]]
    assert sampling.min_p_misses(logits, mask(1, 0, 1), bound)[0].tolist() == pytest.approx([0.0, 0.2, 0.2])
