"""Quantizing, as its definition has it; tests/engines/test_0_fakequant.py holds it against compressed-tensors."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from kernels.fakequant import Scheme


SCHEMES: dict[str, tuple[Any, ...]] = {
    "FP8 tensor": ("fp8", "tensor"),
    "FP8 channel": ("fp8", "channel"),
    "FP8 token": ("fp8", "token"),
    "FP8 block": ("fp8", "block", 128),
    "INT8 channel": ("int8", "channel"),
    "INT8 group": ("int8", "group", 64),
    "INT4 group": ("int4", "group", 32),
    "INT4 group asymmetric": ("int4", "group", 64, False),
}


def scheme(name: str) -> "Scheme":
    from kernels.fakequant import Scheme

    return Scheme(*SCHEMES[name])


def weight() -> "torch.Tensor":
    """[200, 192]: neither width is one that 128 divides. A row of zeros is among them."""
    import torch

    made = torch.randn(200, 192, generator=torch.Generator().manual_seed(0))
    made[3] = 0
    return made


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_left_is_the_nearest_that_the_scheme_has(name: str) -> None:
    import torch

    from kernels.fakequant import Quantized, dequantize, quantize

    x = weight().double()
    held = quantize(x, scheme(name))
    kept = dequantize(held, scheme(name))
    assert kept.shape == x.shape
    assert (kept[3] == 0).all()
    # The scheme's neighbours of each value are no nearer.
    for step in (-1, 1):
        if name.startswith("FP8"):
            bits = held.values.view(torch.uint8).int()
            other = (bits + step).clamp(0, 255).to(torch.uint8).view(torch.float8_e4m3fn)
            usable = (bits & 127 > 0) & (bits & 127 < 126)  # neither beyond zero nor at the end
        else:
            most = 7 if name.startswith("INT4") else 127
            other = (held.values + step).clamp(-most - 1, most)
            usable = (held.values > -most) & (held.values < most)
        beside = dequantize(Quantized(other, held.scales), scheme(name))
        assert ((x - kept).abs() <= (x - beside).abs() + 1e-6)[usable].all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("FP8 tensor", (1,)),
        ("FP8 channel", (200, 1)),
        ("FP8 block", (2, 2)),
        ("INT4 group", (200, 6)),
        ("INT4 group asymmetric", (200, 3)),
    ],
)
def test_scales_have_the_shape_that_checkpoints_have(name: str, shape: tuple[int, ...]) -> None:
    from kernels.fakequant import scales_of

    scales = scales_of(weight().bfloat16(), scheme(name))
    assert scales.scale.shape == shape
    assert str(scales.scale.dtype) == "torch.bfloat16"
    if scales.zero_point is not None:
        assert scales.zero_point.shape == shape


def test_keys_and_values_may_have_a_scale_a_head() -> None:
    import torch

    from kernels.fakequant import Scheme, fake_quantize, scales_of

    keys = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    keys[:, 1] *= 100
    per_head = Scheme("fp8", "head")
    assert scales_of(keys, per_head).scale.shape == (3, 1, 1)
    kept = fake_quantize(keys, per_head)
    for head in range(3):
        assert torch.equal(kept[:, head], fake_quantize(keys[:, head], Scheme("fp8", "tensor")))


def test_zero_points_hold_what_does_not_lie_around_zero() -> None:
    from kernels.fakequant import fake_quantize

    x = weight().abs() + 0.5
    error = {name: (fake_quantize(x, scheme(name)) - x).square().mean() for name in SCHEMES}
    assert error["INT4 group asymmetric"] < error["INT4 group"] / 2


def test_static_scales_clamp_what_lies_beyond_them() -> None:
    import torch

    from kernels.fakequant import Scales, Scheme, fake_quantize

    static = Scales(torch.tensor([0.5]), None)
    kept = fake_quantize(torch.tensor([[[[1.0, 1e6, -1e6, 0.3]]]]), Scheme("fp8", "tensor"), static)
    assert kept.flatten().tolist() == [1.0, 224.0, -224.0, 0.3125]


def test_an_fp8_product_sees_its_weights_in_fp32() -> None:
    import torch

    from kernels.fakequant import dequantize, quantize

    held = quantize(weight().bfloat16(), scheme("FP8 channel"))
    wide = dequantize(held, scheme("FP8 channel"), torch.float32)
    assert torch.equal(wide, held.values.float() * held.scales.scale.float())
    assert not torch.equal(wide, dequantize(held, scheme("FP8 channel")).float()), "BF16 rounds once more"


@pytest.mark.parametrize("columns", [32, 40, 37])
def test_what_was_packed_is_unpacked(columns: int) -> None:
    import torch

    from kernels.fakequant import pack_int4, unpack_int4

    numbers = torch.randint(-8, 8, (6, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    packed = pack_int4(numbers)
    assert packed.shape == (6, -(-columns // 8))
    assert torch.equal(unpack_int4(packed, columns), numbers)


def test_the_first_of_eight_lies_in_the_lowest_bits() -> None:
    import torch

    from kernels.fakequant import pack_int4

    numbers = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
    assert pack_int4(numbers).item() == 0xF6543210 - (1 << 32)


def test_a_group_that_does_not_divide_the_width_is_refused_in_words() -> None:
    import torch

    from kernels.fakequant import quantize

    with pytest.raises(ValueError, match="groups of 64 do not divide a width of 96"):
        quantize(torch.zeros(4, 96), scheme("INT4 group asymmetric"))


def test_a_tensor_of_another_shape_is_refused_in_words() -> None:
    import torch

    from kernels.fakequant import quantize

    with pytest.raises(ValueError, match="per channel is not for a tensor of 3 dimensions"):
        quantize(torch.zeros(4, 2, 96), scheme("FP8 channel"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("fp8", "channel", 0, False), "FP8 has no zero points"),
        (("int4", "group", 0, True), "groups and blocks have sizes"),
        (("int4", "channel", 64, True), "groups and blocks have sizes"),
    ],
)
def test_a_scheme_that_nobody_reads_is_refused(fields: tuple[Any, ...], said: str) -> None:
    from kernels.fakequant import Scheme

    with pytest.raises(ValueError, match=said):
        Scheme(*fields)


def test_what_is_not_a_number_does_not_become_one() -> None:
    import torch

    from kernels.fakequant import fake_quantize

    x = weight()
    x[0, 3] = torch.nan
    kept = fake_quantize(x, scheme("FP8 channel"))
    assert kept[0].isnan().all(), "its channel's scale is none"
    assert kept[1:].isfinite().all()
