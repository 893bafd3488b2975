"""A Ray cluster as the gateway sees it: joined once, and asked for its nodes then. Knows no engines."""

import asyncio
import importlib.util
import logging
import os
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.launch.actor import machine_here
from tiers.engine import Backend
from tiers.errors import ConfigError
from tiers.hardware import Machine

REACH_TIMEOUT_S = 5.0


class RayConfig(BaseModel):
    """Which Ray cluster the tiers with `launch: ray` are on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(
        default="auto",
        description="host:port of its head, or auto: RAY_ADDRESS, or else the cluster that this machine is in.",
    )
    namespace: str = Field(default="assay", description="Where in Ray its actors are listed.")
    room_timeout_s: float = Field(
        default=300,
        gt=0,
        description="How long a replica waits for a node with room, which an autoscaler may have to bring, before "
        "that is said and tried again.",
    )

    @field_validator("address")
    @classmethod
    def _is_no_client(cls, address: str) -> str:
        if address.startswith("ray://"):
            raise ValueError(
                "an address of Ray's client cannot be used: have the gateway's machine join with `ray start "
                "--address=HEAD:6379 --num-cpus=0`, and write auto"
            )
        return address


class Cluster:
    """The one that was joined."""

    def __init__(self, ray: ModuleType, settings: RayConfig, here: str, nodes: Sequence[Machine]) -> None:
        self.ray: Any = ray
        """The package, which is only there where it is needed."""
        self.settings = settings
        self.here = here
        """The gateway's own address in it."""
        self.nodes = tuple(nodes)
        """Those that had CPUs or GPUs to give when it was joined."""

    @classmethod
    async def join(cls, settings: RayConfig, backend: Backend) -> "Cluster":
        """Join it.

        Raises:
            ConfigError: Ray is not installed, there is no such cluster, or it has no node that engines could use.
        """
        check_installed()
        # Neither a word to Ray's makers nor a line of its actors' output.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # Not in the main thread: there it would take SIGTERM for itself.
        return await asyncio.to_thread(_join, settings, backend)


def check_installed() -> None:
    """Whether the package is here.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "`launch: ray` needs the package ray, which is not installed: pip install 'assay[ray]', here and on "
            "every node of the cluster."
        )


def _join(settings: RayConfig, backend: Backend) -> Cluster:
    try:
        _check_reached(settings.address)
    except OSError as error:
        raise _no_cluster(settings, error) from error
    import ray

    # What it would say is said here in one sentence, or not worth saying.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=settings.address,
            namespace=settings.namespace,
            log_to_driver=False,
            configure_logging=False,
            ignore_reinit_error=True,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _no_cluster(settings, error) from error
    nodes = _nodes(ray, backend)
    if not nodes:
        ray.shutdown()
        raise ConfigError(
            f"No node of the Ray cluster at {settings.address!r} has {'GPUs' if backend == 'cuda' else 'CPUs'} to "
            "give, which `launch: ray` puts engines on."
        )
    return Cluster(ray, settings, ray.util.get_node_ip_address(), nodes)


def _no_cluster(settings: RayConfig, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return ConfigError(
        f"There is no Ray cluster to join at ray.address {settings.address!r} ({reason}): start one with "
        "`ray start --head`, or name its head's address."
    )


def _check_reached(address: str) -> None:
    """Raise OSError if nobody listens at that host and port, which Ray would find out in minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()


def _nodes(ray: Any, backend: Backend) -> list[Machine]:
    """What engines could use, each node asked for what it really has."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wanted = "GPU" if backend == "cuda" else "CPU"
    look = ray.remote(machine_here)
    asked = [
        look.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(backend, int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get(wanted)
    ]
    try:
        return list(ray.get(asked))
    except ray.exceptions.RayError as error:
        ray.shutdown()
        raise ConfigError(
            "A node of the Ray cluster does not run Assay "
            f"({str(error).splitlines()[-1][:200]}): install the same version there."
        ) from error
