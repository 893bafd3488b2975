"""What was found of an operator, as plain data."""

import math
from typing import Literal

from pydantic import BaseModel

Outcome = Literal["PASS", "FAIL", "absent"]


class Finding(BaseModel, frozen=True, ser_json_inf_nan="strings"):
    """One operator on one shape, or that it is not here."""

    operator: str
    outcome: Outcome
    kernel: str = ""
    """The class or function that computed it, read back from the engine's layer."""
    widths: str = ""
    """Whose: a model's name."""
    shape: str = ""
    """Which layer, how wide, how many tokens."""
    precision: str = ""
    """In whose ulps errors are told."""
    max_ulps: float | None = None
    """The largest error."""
    allowed_ulps: float | None = None
    """The largest that rounding explains where that error is."""
    rms_ulps: float | None = None
    """The root mean square of all errors."""
    allowed_rms_ulps: float | None = None
    """What rounding explains of it."""
    values: int = 0
    """How many were compared."""
    reason: str = ""
    """Why it is absent, or what failed."""

    @property
    def nearness(self) -> float:
        """How much of what rounding explains is there, by the larger of both measures: over 1 it is a FAIL."""
        pairs = ((self.max_ulps, self.allowed_ulps), (self.rms_ulps, self.allowed_rms_ulps))
        return max((found / allowed if allowed else math.inf) if found else 0.0 for found, allowed in pairs)
