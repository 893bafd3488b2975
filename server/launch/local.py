"""Engines as processes on this machine."""

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.launch.launch import Launched
from server.launch.over_nodes import OverNodes
from server.launch.process import LocalProcess, free_port
from tiers.engine import LOOPBACK, Backend, EngineCommand, engine_command
from tiers.tier import Tier


@dataclass(frozen=True)
class LocalLaunch:
    """Starts an engine here; unless it is told otherwise on a loopback port, with a key that nobody else has."""

    backend: Backend
    takes_faults: bool = False
    """Whether the engine is there to be broken, for the self-test."""
    host: str = LOOPBACK
    port: int | None = None
    """A free one by default."""
    key: str | None = field(default=None, repr=False)
    finishes_within_s: int = 0
    """How long vLLM lets running requests take when it is ended by somebody else."""
    waits: bool = False
    """Whether orchestrators are to find it well only once it was told that it is ready."""
    traces_url: str | None = None
    """Where it sends its spans of requests that are traced."""
    over: OverNodes | None = None
    """The Ray cluster over whose nodes vLLM puts its workers, if they are not all here."""

    def command(self, tier: Tier) -> EngineCommand:
        """What it starts.

        Raises:
            ConfigError: the config asks vLLM for what cannot be.
        """
        command = engine_command(
            tier,
            self.backend,
            self.port or free_port(),
            self.key or secrets.token_urlsafe(32),
            host=self.host,
            over_nodes=self.over is not None,
            finishes_within_s=self.finishes_within_s,
            takes_faults=self.takes_faults,
            waits=self.waits,
            traces_url=self.traces_url,
        )
        if self.over is None:
            return command
        return replace(command, environment=command.environment | self.over.environment(tier))

    async def begin(self, tier: Tier, log: Path) -> Launched:
        """See `Launch.begin`."""
        command = self.command(tier)
        process = await LocalProcess.start(command.arguments, command.environment, log)
        return Launched(url_at(self.host, command.port), command.api_key, process)


def url_at(host: str, port: int) -> str:
    """Where this machine reaches what listens on that address, which may stand for all that it has."""
    own = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104  # asked for, not bound
    return f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"
