"""How the processes of an engine on CPUs wait for each other: with naps. Loaded inside the engine.

After each message vLLM's readers look for the next one in a loop, for a second. Beside a GPU that costs nothing
and saves microseconds a step; on a CPU it takes a core from the threads that compute the step. They cannot wait
for vLLM's notices from the first moment instead: of two that come close together ZeroMQ may drop one, and the
engine stands still.
"""

import time
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

_QUEUES: Any = shm_broadcast
NAP_S = 0.0002
"""Between two looks; a step takes a hundred times as long."""


def wait_with_naps() -> None:
    """From now on, on CPUs, sleep between two looks for a message."""
    if current_platform.is_cpu():
        _QUEUES.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP_S)
