"""An operator's result beside its definition: how far it is, and whether rounding explains that."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rounding import Allowance, nothing, ulp, ulp_in_its_row
from tiers.operators.findings import Finding

SAMPLING = 6.0
"""Standard deviations that a root mean square over finitely many errors may be above its expectation."""
_NAMES = {torch.bfloat16: "BF16", torch.float32: "FP32"}


@dataclass(frozen=True)
class Case:
    """One run of an operator."""

    kernel: str
    shape: str
    error: Tensor
    """Absolute, float64."""
    unit: Tensor
    """One ulp, where each error is."""
    allowed: Allowance
    dtype: torch.dtype


@dataclass(frozen=True)
class Absent:
    """That the operator is not on this machine."""

    reason: str
    kernel: str = ""


def compared(kernel: str, shape: str, ran: Tensor, exact: Tensor, allowed: Allowance) -> Case:
    """A case whose result is values: [..., N], in the precision of ``ran``."""
    error = (ran.double() - exact.double()).abs()
    # What is no number is as far off as can be, and so is infinity where the definition has another value.
    error = torch.where(ran.double() == exact.double(), 0.0, error.nan_to_num(nan=math.inf))
    return Case(kernel, shape, error, ulp_in_its_row(exact, ran.dtype), allowed, ran.dtype)


def decided(kernel: str, shape: str, misses: Tensor, dtype: torch.dtype, within: Tensor | float = 0.0) -> Case:
    """A case whose result is a choice: by how much it is wrong, in the units of ``kernels.sampling``, of which
    rounding explains as much as ``within``.
    """
    allowed = nothing(misses)
    limit = torch.as_tensor(within, dtype=torch.float64).expand_as(misses)
    unit = ulp(torch.ones_like(misses), dtype)
    return Case(kernel, shape, misses, unit, Allowance(allowed.most + limit, allowed.spread + limit), dtype)


def judge(operator: str, widths: str, case: Case) -> Finding:
    """PASS if each error is at most what rounding allows there, and their root mean square what it allows of
    that.
    """
    ulps, allowed = case.error / case.unit, case.allowed.most / case.unit
    rms = float(ulps.square().mean().sqrt())
    slack = 1 + SAMPLING / math.sqrt(2 * ulps.numel())
    allowed_rms = float((case.allowed.spread / case.unit).square().mean().sqrt()) * slack
    # The error that is told is the one farthest beyond what is allowed, or else the largest.
    beyond = ulps > allowed
    worst = int(torch.where(beyond, ulps - allowed, -torch.inf).argmax() if bool(beyond.any()) else ulps.argmax())
    reasons = []
    if bool(beyond.any()):
        reasons.append(f"{int(beyond.sum())} of {ulps.numel()} values are farther off than rounding explains")
    if not rms <= allowed_rms:
        reasons.append("errors are larger on average than rounding explains")
    return Finding(
        operator=operator,
        outcome="FAIL" if reasons else "PASS",
        kernel=case.kernel,
        widths=widths,
        shape=case.shape,
        precision=_NAMES.get(case.dtype, str(case.dtype)),
        max_ulps=float(ulps.flatten()[worst]),
        allowed_ulps=float(allowed.flatten()[worst]),
        rms_ulps=rms,
        allowed_rms_ulps=allowed_rms,
        values=ulps.numel(),
        reason="; ".join(reasons),
    )
