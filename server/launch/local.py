"""Engines as processes on this machine."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from server.launch.launch import Launched
from server.launch.process import LocalProcess, free_port
from tiers.engine import Backend, engine_command
from tiers.tier import Tier


@dataclass(frozen=True)
class LocalLaunch:
    """Starts an engine here, on a loopback port, with a key that nobody else has."""

    backend: Backend
    takes_faults: bool = False
    """Whether the engine is there to be broken, for the self-test."""

    traces_url: str | None = None
    """Where it sends its spans of requests that are traced."""

    async def begin(self, tier: Tier, log: Path) -> Launched:
        """See `Launch.begin`."""
        port, key = free_port(), secrets.token_urlsafe(32)
        command = engine_command(
            tier, self.backend, port, key, takes_faults=self.takes_faults, traces_url=self.traces_url
        )
        process = await LocalProcess.start(command.arguments, command.environment, log)
        return Launched(f"http://127.0.0.1:{port}", key, process)
