"""Whether two tensors are nearly the same.

As `torch.testing.assert_close` says it, for which PyTorch loads its compiler and all it knows of other machines:
half as much again as itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RTOL, ATOL = 1.3e-6, 1e-5
"""PyTorch's own for FP32."""


def assert_close(found: "Tensor", true: "Tensor", rtol: float = RTOL, atol: float = ATOL, what: str = "") -> None:
    """Each number no farther than ``atol`` and ``rtol`` of the true one; integers the same."""
    import torch

    assert (found.shape, found.dtype) == (true.shape, true.dtype), what
    if not found.is_floating_point():
        assert torch.equal(found, true), what
        return
    assert torch.allclose(found, true, rtol, atol), f"{what}: {(found - true).abs().max()} away"
