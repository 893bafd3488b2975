"""Where a config's engines run: on this machine's CPU or its GPUs. One answer for those who plan and who start."""

from server.config import Config
from tiers.engine import Backend, VllmMissing, installed_backend
from tiers.hardware import Machine


def backend_of(config: Config) -> Backend:
    """Where the config's engines run: where it says, or by the build of vLLM that is installed.

    Raises:
        VllmMissing: neither says it.
    """
    return installed_backend() if config.backend == "auto" else config.backend


def machine_of(config: Config) -> Machine:
    """What the config's engines would have here. Where nothing says on what they run, by the GPUs that there are.

    Raises:
        PlacementError: there is an NVIDIA driver and it does not answer.
    """
    try:
        return Machine.here(backend_of(config))
    except VllmMissing:
        return Machine.here()
