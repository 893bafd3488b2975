"""The definitions, against numbers worked out by hand; `tests/engines/test_0_definitions.py` has Transformers'."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from kernels import linear, reference


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, linear, reference
    import torch

    from kernels import linear, reference


def test_the_norm_of_3_and_4_is_by_their_root_mean_square() -> None:
    made = reference.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert made[0].tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])


def test_epsilon_stands_under_the_root() -> None:
    made = reference.rms_norm(torch.tensor([[3.0, 3.0]]), torch.ones(2), 16.0)
    assert made[0].tolist() == pytest.approx([0.6, 0.6])


def test_what_is_added_is_added_before_the_norm_and_kept() -> None:
    x, residual = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    normed, total = reference.add_rms_norm(x, residual, torch.ones(2), 0.0)
    assert total.tolist() == [[3.0, 4.0]]
    assert normed[0].tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])


def test_frequencies_fall_and_long_waves_are_slowed_by_the_factor() -> None:
    assert reference.inverse_frequencies(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
    scaling = reference.Llama3Scaling(8.0, 1.0, 4.0, 8192)
    scaled, plain = (reference.inverse_frequencies(128, 500000.0, each) for each in (scaling, None))
    ratios = plain / scaled
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(8)
    assert ((ratios > 1) & (ratios < 7.99)).sum() > 3, "between the two the scaling is gradual"


def test_a_quarter_turn_takes_the_first_half_to_the_second() -> None:
    x = torch.tensor([[[1.0, 2.0, 0.0, 0.0]]])
    turned = reference.rotate(x, torch.tensor([1]), torch.tensor([math.pi / 2, 0.0], dtype=torch.float64))
    assert turned[0, 0].tolist() == pytest.approx([0.0, 2.0, 1.0, 0.0])


def test_the_gate_comes_before_what_it_lets_through() -> None:
    made = reference.swiglu(torch.tensor([[0.0, 100.0, -1.0, 7.0, 2.0, 3.0]]))
    assert made[0].tolist() == pytest.approx([0.0, 200.0, -3 / (1 + math.e)])


def test_a_page_holds_what_its_table_says() -> None:
    cache = torch.arange(4 * 2 * 1 * 1).view(4, 2, 1, 1)
    assert reference.paged(cache, torch.tensor([3, 0, 2]), 5).flatten().tolist() == [6, 7, 0, 1, 4]


def test_one_position_gives_its_own_value_and_equal_keys_the_mean() -> None:
    values = torch.tensor([[[2.0]], [[6.0]]])
    made = reference.attention(torch.ones(2, 1, 1), torch.zeros(2, 1, 1), values, 1.0)
    assert made.output.flatten().tolist() == pytest.approx([2.0, 4.0])


def test_neighbouring_query_heads_share_keys() -> None:
    values = torch.tensor([[[1.0], [2.0]]])
    made = reference.attention(torch.zeros(1, 4, 1), torch.zeros(1, 2, 1), values, 1.0)
    assert made.output.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_every_fp8_number_and_every_middle_between_two_is_rounded_as_pytorch_does() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    for x in (numbers, middles, -middles, middles * (1 + 2**-20), middles * (1 - 2**-20)):
        assert torch.equal(linear.to_fp8(x), x.float().to(torch.float8_e4m3fn).double())
    assert linear.to_fp8(torch.tensor([1e6, -1e6])).tolist() == [448.0, -448.0]


def test_a_value_in_the_middle_may_become_either_number_and_others_may_not() -> None:
    found = linear.quantized_input(torch.tensor([[448.0, 17.0, 18.0]]), torch.tensor([[1.0]]), 1e-6)
    assert found.values.tolist() == [[448.0, 16.0, 18.0]]
    assert found.either.tolist() == [[0.0, 2.0, 0.0]]


def test_the_largest_value_of_a_token_becomes_448() -> None:
    scales = linear.token_scales(torch.tensor([[1.0, -896.0], [0.0, 0.0]]))
    assert scales.tolist() == [[2.0], [1.0]]
    grouped = linear.block_token_scales(torch.cat([torch.full((1, 128), 448.0), torch.full((1, 128), 4.48)], 1))
    assert grouped[0, [0, 127, 128, 255]].tolist() == pytest.approx([1.0, 1.0, 0.01, 0.01])


def test_a_block_has_one_scale() -> None:
    weight, scales = torch.ones(130, 256), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    made = linear.block_weight(weight, scales)
    assert [made[at].item() for at in ((0, 0), (127, 127), (0, 128), (129, 0), (129, 255))] == [1, 1, 2, 3, 4]


def test_int4_words_hold_eight_numbers_the_lowest_bits_first() -> None:
    word = sum((number + 8) << (4 * place) for place, number in enumerate([-8, 7, 0, 1, -1, 2, 3, -3]))
    assert linear.unpack_int4(
        torch.tensor([[word - (1 << 32) if word >> 31 else word]], dtype=torch.int32)
    ).tolist() == [[-8, 7, 0, 1, -1, 2, 3, -3]]


def test_a_linear_layer_has_a_row_for_each_output() -> None:
    assert linear.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])).tolist() == [
        [11.0, 17.0]
    ]


def test_a_token_has_its_row() -> None:
    assert reference.embed(torch.tensor([2, 0]), torch.arange(6).view(3, 2)).tolist() == [[4, 5], [0, 1]]
