"""When an engine is to be there again, guessed from how long its last start took. Knows no engines."""

import math
import time

STARTED_IN_S, FOUND_IN_S = 60.0, 5.0
"""At first: of an engine that is started here, and of one that somebody else runs."""


class Due:
    """One replica's."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._began = 0.0
        self._at = 0.0

    @property
    def in_s(self) -> int:
        """In how many whole seconds it is to be there, or should have been: at least one."""
        return max(1, math.ceil(self._at - time.monotonic()))

    def begins(self) -> None:
        """It is started now."""
        self._began = time.monotonic()
        self._at = self._began + self._start_s

    def is_there(self) -> None:
        """Its start is over, and the next will take as long."""
        self._start_s = time.monotonic() - self._began

    def starts_after(self, wait_s: float) -> None:
        """It is to be started in so long."""
        self._at = time.monotonic() + wait_s + self._start_s

    def after(self, wait_s: float) -> None:
        """It is there, and is to be used again in so long."""
        self._at = time.monotonic() + wait_s
