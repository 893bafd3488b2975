"""What each implementation of divergence finds at a position, whichever machine it runs on."""

from typing import NamedTuple

from torch import Tensor


class Figures(NamedTuple):
    """The figures of `kernels.divergence.Comparison` that need all of both distributions; all [T]."""

    kl: Tensor
    tv: Tensor
    ln_p: Tensor
    ln_q: Tensor
    top_p: Tensor
    top_q: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
