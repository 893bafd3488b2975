"""Engines that somebody else runs. Starts nothing; knows where they are."""

from dataclasses import dataclass, field
from pathlib import Path

from server.launch.launch import Launched
from tiers.tier import Tier


@dataclass(frozen=True)
class UrlLaunch:
    """Finds the engine at one address of a URL's host name."""

    url: str
    address: str
    key: str = field(repr=False)

    async def begin(self, tier: Tier, log: Path) -> Launched:
        """See `Launch.begin`: it was begun by somebody else, or will be."""
        return Launched(self.url, self.key, process=None, address=self.address)
