"""How the processes of an engine on CPUs wait for each other: asleep. Loaded inside the engine.

After each message vLLM's readers look for the next one in a loop, for a second. Beside a GPU that costs nothing
and saves microseconds a step; on a CPU it takes a core from the threads that compute the step.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform

SPINS_S = 0.0


def wait_asleep() -> None:
    """From now on, on CPUs, wait for a message without looking for it."""
    if current_platform.is_cpu():
        # The one default: for how long a reader spins. Nobody in vLLM 0.32.0 gives another.
        SpinCondition.__init__.__defaults__ = (SPINS_S,)
