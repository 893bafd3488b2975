"""What runs on a node of a Ray cluster: one engine, in an actor that it does not outlive. Knows no gateway."""

import asyncio
import contextlib
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from server.launch.launch import Launched
from server.launch.over_nodes import over_nodes_environment
from server.launch.process import LocalProcess, free_port, tethered
from tiers.engine import LOOPBACK, Backend, engine_command
from tiers.errors import AssayError
from tiers.hardware import Machine
from tiers.manifest import MANIFEST_NAME
from tiers.tier import Tier

REPORT_EVERY_S = 1.0


class NodeLacks(AssayError):
    """Something that the engine needs is not on the node."""


@dataclass(frozen=True)
class Order:
    """What a node is to start."""

    tier: Tier
    backend: Backend
    log: Path
    asked_from: str
    """The gateway's node: on the same one nothing needs to leave it."""
    takes_faults: bool
    traces_url: str | None
    group: str | None
    """The placement group by its name in Ray, if vLLM is to put workers on several nodes of it."""


@dataclass(frozen=True)
class Report:
    """How the engine is doing."""

    exit_code: int | None
    tail: str


class EngineActor:
    """One engine. Ray does not start it again: that is for whoever has begun it."""

    def __init__(self) -> None:
        self._process: LocalProcess | None = None

    async def start(self, order: Order) -> Launched:
        """Start the engine on a free port of this node; the answer has no process, which is this actor's.

        Raises:
            NodeLacks: the checkpoint is not here.
        """
        import ray

        node = ray.util.get_node_ip_address()
        manifest = order.tier.checkpoint / MANIFEST_NAME
        if not manifest.is_file():
            raise NodeLacks(
                f"{order.tier.name}: node {node} has no checkpoint in {order.tier.checkpoint}: it must be on "
                "storage that every node of the Ray cluster has at the same path."
            )
        host = LOOPBACK if node == order.asked_from and order.group is None else node
        port, key = free_port(host), secrets.token_urlsafe(32)
        command = engine_command(
            _as_here(order.tier),
            order.backend,
            port,
            key,
            host=host,
            over_nodes=order.group is not None,
            takes_faults=order.takes_faults,
            traces_url=order.traces_url,
        )
        # Ray kills an actor's own children with it, by SIGKILL, tethers included; it does not see the second one,
        # which finds its input ended and ends the engine, at once: what it still said would be no whole answer.
        self._process = await LocalProcess.start(
            tethered(command.arguments, orphaned_s=0),
            command.environment | _environment(order, node),
            order.log,
        )
        return Launched(f"http://{host}:{port}", key, process=None)

    async def report(self) -> Report:
        """How the engine is doing; waits a moment, unless it ends before."""
        assert self._process is not None, "asked before it was started"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), REPORT_EVERY_S)
        return Report(self._process.exit_code, self._process.tail())

    async def stop(self) -> None:
        """End it; returns when nothing of it is left."""
        if self._process is not None:
            await self._process.stop()


def machine_here(backend: Backend, gpus: int) -> Machine:
    """The node that this runs on, with as many GPUs as Ray gives away there."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # empty, as Ray sets it for what asks for none
    machine = Machine.here(backend)
    return replace(machine, gpus=machine.gpus[:gpus])


def _as_here(tier: Tier) -> Tier:
    """The tier with its GPUs as this process counts them: Ray shows an actor those that are its own."""
    own = tuple(range(len(tier.resources.gpus)))
    return replace(tier, resources=tier.resources.model_copy(update={"gpus": own}))


def _environment(order: Order, node: str) -> dict[str, str]:
    """What an engine on a Ray node has besides."""
    import ray

    environment = {"OMP_NUM_THREADS": str(order.tier.resources.cpus)} if order.backend == "cpu" else {}
    if order.group is not None:
        environment |= over_nodes_environment(ray.get_runtime_context().gcs_address, node, order.group)
    return environment
