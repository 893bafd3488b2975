"""Quantizes and dequantizes, bit for bit as compressed-tensors writes checkpoints and vLLM reads them.

Every formula is that of compressed-tensors (``quantization/utils/helpers.py``, ``calculate_qparams``, and
``quantization/lifecycle/forward_helpers.py``) with llm-compressor's minmax observer, and is computed in the dtype
of what is quantized: dividing BF16 weights in FP32 rounds some of them to other FP8 numbers. Knows no layers.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Number = Literal["fp8", "int8", "int4"]
"""FP8 is E4M3 without infinities (``torch.float8_e4m3fn``)."""
Shared = Literal["tensor", "channel", "token", "head", "group", "block"]

_LEAST: dict[Number, float] = {"fp8": -448.0, "int8": -128.0, "int4": -8.0}
_MOST: dict[Number, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
_PER_WORD = 8
"""INT4 values in an int32."""
_MIDDLE = 8
"""Packed values are unsigned: this is added to each."""


@dataclass(frozen=True)
class Scheme:
    """What numbers become, and which of them share a scale."""

    number: Number
    shared: Shared
    """``tensor`` [1]; ``channel`` of a weight [N, K] → [N, 1]; ``token`` of activations [..., K] → [..., 1];
    ``head`` of keys or values [B, H, T, D] → [H, 1, 1]; ``group`` of neighbours [..., K] → [..., K / size];
    ``block``, a square of a weight [N, K] → [⌈N / size⌉, ⌈K / size⌉]."""
    size: int = 0
    """Of a group or along each side of a block, and of nothing else."""
    symmetric: bool = True
    """Without zero points: the scale follows the largest magnitude, and 0 is 0."""

    def __post_init__(self) -> None:
        if (self.size > 0) != (self.shared in ("group", "block")):
            raise ValueError(f"a scale per {self.shared} and a size of {self.size}: groups and blocks have sizes")
        if self.number == "fp8" and not self.symmetric:
            raise ValueError("FP8 has no zero points: neither compressed-tensors nor vLLM knows any")


class Scales(NamedTuple):
    """By what values are divided, and what is added then; of the shapes that `Scheme.shared` says."""

    scale: Tensor
    """In the dtype of what it was taken from."""
    zero_point: Tensor | None
    """int8; None where the scheme is symmetric."""


class Quantized(NamedTuple):
    """What a checkpoint holds, before INT4 is packed."""

    values: Tensor
    """Of the shape of what was quantized, ``float8_e4m3fn`` or int8."""
    scales: Scales


def scales_of(x: Tensor, scheme: Scheme) -> Scales:
    """The scales, and zero points, of these values: dynamic ones, or those of a weight.

    Args:
        x: of a shape that `Scheme.shared` names, in any floating dtype.
        scheme: into what.

    Raises:
        ValueError: the scheme is not for such a shape, or its group does not divide the width.

    With r the number's range, s = max|x| / (r / 2), or s = (max x − min x) / r and z = round(least − min x / s),
    where 0 counts among the x so that it stays exact. Values that are all 0 get the dtype's epsilon for a scale.
    INT8 activations, which only an engine ever quantizes, get vLLM's: s = max|x| / 127 where r / 2 is 127.5.
    """
    rows = _together(x, scheme)
    # As amin and amax: NaN stays NaN, and an infinity one, instead of becoming a number that looks right.
    low, high = rows.amin(-1).clamp_max(0), rows.amax(-1).clamp_min(0)
    least, most = _LEAST[scheme.number], _MOST[scheme.number]
    zero_point = None
    if scheme.symmetric:
        half = most if (scheme.number, scheme.shared) == ("int8", "token") else (most - least) / 2
        scale = torch.maximum(low.abs(), high.abs()) / half
    else:
        scale = (high - low) / (most - least)
        # Where all are 0 this is 0 / 0; which int8 that becomes is the processor's to choose, and 0 what it means.
        zero_point = (least - low / scale).clamp(least, most).round().nan_to_num(0).to(torch.int8)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return Scales(_kept(scale, scheme), None if zero_point is None else _kept(zero_point, scheme))


def quantize(x: Tensor, scheme: Scheme, scales: Scales | None = None) -> Quantized:
    """The nearest values of the scheme, ties to even; what lies beyond its range becomes the range's end.

    Args:
        x: as for `scales_of`.
        scheme: into what.
        scales: static ones, such as a KV cache's; taken from ``x`` itself by default.

    Raises:
        ValueError: as `scales_of`.
    """
    scales = scales_of(x, scheme) if scales is None else scales
    rows = _together(x, scheme)
    # compressed-tensors adds a zero point of 0 where there is none, which makes 0 of what came out as −0.
    zero = 0 if scales.zero_point is None else _over(scales.zero_point, scheme).to(x.dtype)
    scaled = rows / _over(scales.scale, scheme) + zero
    scaled = scaled.clamp(_LEAST[scheme.number], _MOST[scheme.number])
    values = scaled.to(torch.float8_e4m3fn) if scheme.number == "fp8" else scaled.round().to(torch.int8)
    return Quantized(_apart(values, x, scheme), scales)


def dequantize(quantized: Quantized, scheme: Scheme, dtype: torch.dtype | None = None) -> Tensor:
    """(value − zero point) · scale, rounded to ``dtype`` once and of the values' shape.

    Args:
        quantized: as `quantize` gives it, or as a checkpoint holds it.
        scheme: of which.
        dtype: what is computed in; the scales' own by default, as compressed-tensors has it and vLLM's INT4
            kernels do. An FP8 or INT8 product multiplies by its scales in FP32: give that to have what it sees.
    """
    dtype = quantized.scales.scale.dtype if dtype is None else dtype
    rows = _together(quantized.values, scheme).to(dtype)
    if quantized.scales.zero_point is not None:
        rows = rows - _over(quantized.scales.zero_point, scheme).to(dtype)
    return _apart(rows * _over(quantized.scales.scale, scheme).to(dtype), quantized.values, scheme)


def fake_quantize(
    x: Tensor, scheme: Scheme, scales: Scales | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """What is left of ``x`` [...] when it has been quantized: `quantize`, then `dequantize`."""
    return dequantize(quantize(x, scheme, scales), scheme, dtype)


def pack_int4(values: Tensor) -> Tensor:
    """INT4 as compressed-tensors packs it: eight in an int32, the first in its lowest bits.

    Args:
        values: −8 to 7, [N, K], int8. Weights are packed as they are, zero points transposed.

    Returns:
        [N, ⌈K / 8⌉], int32.
    """
    columns = math.ceil(values.shape[1] / _PER_WORD)
    padded = torch.nn.functional.pad(values.long() + _MIDDLE, (0, columns * _PER_WORD - values.shape[1]))
    words = (padded.reshape(len(values), columns, _PER_WORD) << _shifts(values)).sum(-1)
    # The eighth value may set the highest bit, which is an int32's sign.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The other way round.

    Args:
        packed: [N, ⌈K / 8⌉], int32.
        columns: K.

    Returns:
        [N, K], int8, −8 to 7.
    """
    values = (packed.long().unsqueeze(-1) >> _shifts(packed)) & 15
    return (values.flatten(1)[:, :columns] - _MIDDLE).to(torch.int8)


def _shifts(like: Tensor) -> Tensor:
    return 4 * torch.arange(_PER_WORD, device=like.device)


def _together(x: Tensor, scheme: Scheme) -> Tensor:
    """With all that shares a scale in the last dimension."""
    size = scheme.size
    match scheme.shared:
        case "tensor":
            return x.reshape(1, -1)
        case "channel" if x.ndim == 2:
            return x
        case "token":
            return x
        case "head" if x.ndim == 4:
            return x.transpose(0, 1).flatten(1)
        case "group" if x.shape[-1] % size == 0:
            return x.reshape(*x.shape[:-1], -1, size)
        case "group":
            raise ValueError(f"groups of {size} do not divide a width of {x.shape[-1]}: take another group size")
        case "block" if x.ndim == 2:
            # Zeros, which change no scale.
            rows, columns = (math.ceil(width / size) for width in x.shape)
            padded = torch.zeros(rows * size, columns * size, dtype=x.dtype, device=x.device)
            padded[: x.shape[0], : x.shape[1]] = x
            return padded.reshape(rows, size, columns, size).transpose(1, 2).flatten(2)
    raise ValueError(f"a scale per {scheme.shared} is not for a tensor of {x.ndim} dimensions")


def _apart(rows: Tensor, like: Tensor, scheme: Scheme) -> Tensor:
    """Back from `_together` to the shape of ``like``."""
    size = scheme.size
    match scheme.shared:
        case "head":
            batch, heads, *rest = like.shape
            return rows.reshape(heads, batch, *rest).transpose(0, 1)
        case "block":
            down, across = rows.shape[:2]
            squares = rows.reshape(down, across, size, size).transpose(1, 2)
            return squares.reshape(down * size, across * size)[: like.shape[0], : like.shape[1]]
        case _:
            return rows.reshape(like.shape)


def _kept(scale: Tensor, scheme: Scheme) -> Tensor:
    """From one for each row of `_together` to the shape that checkpoints have."""
    if scheme.shared in ("channel", "token"):
        return scale.unsqueeze(-1)
    return scale.reshape(-1, 1, 1) if scheme.shared == "head" else scale


def _over(scale: Tensor, scheme: Scheme) -> Tensor:
    """From there to what broadcasts over the rows of `_together`."""
    if scheme.shared in ("channel", "token"):
        return scale
    return scale.reshape(-1, 1) if scheme.shared in ("tensor", "head") else scale.unsqueeze(-1)
