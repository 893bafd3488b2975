"""The machine that a bench runs on: who has which core, and how busy others keep it."""

import os
import time
from collections.abc import Callable

import psutil

CALM = 0.05
"""Of the machine may go to others."""


def first_core() -> list[int]:
    """The core of whatever is measured."""
    return sorted(os.sched_getaffinity(0))[:1]


def other_cores() -> list[int]:
    """Those of all that takes part without being measured: the others, if there are any."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[1:] or cores


class Machine:
    """How busy others keep this machine, from when this was made."""

    def __init__(self, measured_s: Callable[[], float]) -> None:
        """``measured_s`` is the CPU time of all processes that take part and go on; those that end are counted."""
        self._measured_s = measured_s
        self._busy_s, self._own_s = self._now()
        self._began = time.monotonic()

    @property
    def others(self) -> float:
        """The share of all cores' time that went to processes which take no part."""
        busy_s, own_s = self._now()
        others_s = (busy_s - self._busy_s) - (own_s - self._own_s)
        return max(0.0, others_s) / (time.monotonic() - self._began) / (psutil.cpu_count() or 1)

    def _now(self) -> tuple[float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy_s = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        own_s = own.user + own.system + own.children_user + own.children_system
        return busy_s, own_s + self._measured_s()
