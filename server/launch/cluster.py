"""A Ray cluster as whoever starts engines on it sees it: joined, asked for its nodes, left. Knows no engines."""

import asyncio
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.launch.actor import machine_here
from tiers.engine import Backend
from tiers.errors import ConfigError
from tiers.hardware import Machine

REACH_TIMEOUT_S = 5.0
HEAD_LOST = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's name for how long a process tries to reach a head that is gone, before it ends itself."""
FOR_EVER_S = 365 * 24 * 3600


class RayConfig(BaseModel):
    """Which Ray cluster the tiers with `launch: ray` are on, and what `assay engine` starts over several nodes."""

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
        "that is said and tried again; and `assay engine` for all nodes that its engine goes over, before it "
        "ends.",
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

    def __init__(
        self, ray: ModuleType, settings: RayConfig, backend: Backend, here: str, nodes: Sequence[Machine]
    ) -> None:
        self.ray: Any = ray
        """The package, which is only there where it is needed."""
        self.settings = settings
        self._backend = backend
        self.here = here
        """The address in it of the node that this is."""
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
        with _outliving_its_head():
            # Not in the main thread: there it would take SIGTERM for itself.
            return await asyncio.to_thread(_join, settings, backend)

    @property
    def gcs_address(self) -> str:
        """Where its nodes meet, as host:port."""
        return str(self.ray.get_runtime_context().gcs_address)

    async def look(self) -> Sequence[Machine]:
        """Those of its nodes that have CPUs or GPUs to give by now.

        Raises:
            ConfigError: one of them does not run Assay, or was lost as it was asked.
        """
        return await asyncio.to_thread(_nodes, self.ray, self._backend)

    async def leave(self) -> None:
        """Be in it no longer; what runs there for this process ends."""
        await asyncio.to_thread(self.ray.shutdown)


def check_installed() -> None:
    """Whether the package is here.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "Engines on a Ray cluster need the package ray, which is not installed: pip install 'assay[ray]', "
            "here and on every node of the cluster."
        )


@contextmanager
def _outliving_its_head() -> Iterator[None]:
    """Who joins within the block goes on when the cluster's head is lost.

    After a minute Ray would end this process, in its midst, and with it tiers that have nothing to do with Ray. It
    reads that from its environment, of which engines are to inherit nothing: theirs is to end with their nodes.
    """
    if HEAD_LOST in os.environ:
        yield
        return
    os.environ[HEAD_LOST] = str(FOR_EVER_S)
    try:
        yield
    finally:
        del os.environ[HEAD_LOST]


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
    try:
        nodes = _nodes(ray, backend)
    except ConfigError:
        ray.shutdown()
        raise
    if not nodes:
        ray.shutdown()
        raise ConfigError(
            f"No node of the Ray cluster at {settings.address!r} has {'GPUs' if backend == 'cuda' else 'CPUs'} to "
            "give to engines."
        )
    return Cluster(ray, settings, backend, ray.util.get_node_ip_address(), nodes)


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
        raise ConfigError(
            "A node of the Ray cluster does not run Assay "
            f"({str(error).splitlines()[-1][:200]}): install the same version there."
        ) from error
