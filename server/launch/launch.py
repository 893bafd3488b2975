"""What every way has in common in which an engine comes to life. Knows no HTTP, and nothing of callers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tiers.tier import Tier


class Process(Protocol):
    """The processes of an engine that are ours to watch and to end, wherever they run."""

    @property
    def log(self) -> Path | str:
        """Where it writes, for people."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""

    async def wait(self) -> int:
        """Wait until all of it has ended; its exit code."""

    async def stop(self) -> None:
        """End all of it; returns when nothing of it is left. Safe to call again."""

    def last_line(self) -> str:
        """The last thing it logged, for people who wait."""

    def tail(self, size: int = 4096) -> str:
        """The end of its log."""


@dataclass(frozen=True)
class Launched:
    """An engine that was told to start, or that somebody else has started; it need not answer yet."""

    url: str
    """Where it will answer."""
    key: str
    """To whoever shows this."""
    process: Process | None
    """None of one that somebody else runs, or that is told of on another machine than its own."""
    address: str | None = None
    """The one of its host's addresses that is this engine's, where the URL's name has several."""


class Launch(Protocol):
    """One way in which engines come to life."""

    async def begin(self, tier: Tier, log: Path) -> Launched:
        """Have an engine of the tier started, or find the one there is.

        Args:
            tier: as this engine sees it: with GPUs of its own.
            log: where it is to write, if it is ours to say.

        Raises:
            EngineNotStarted: there is nowhere to start one.
        """
