"""What the requests of keys are held to: counted in this process, or in Redis for several gateways.

Knows keys and counts; knows nothing of HTTP or tiers.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.errors import Refusal, TooManyAtOnce
from server.keys import Key, KeyFile
from server.rates import Charge, Rates, Standing
from tiers.errors import ConfigError

if TYPE_CHECKING:
    from server.config import Config


class LimitsNotShared(Refusal):
    """The key has limits, and of several gateways on one port each could count its own requests only."""

    status, type, code = 503, "server_error", "limits_not_shared"

    def __init__(self) -> None:
        super().__init__(
            "This key has limits, and the processes of this server have no common place to count its requests in; "
            "its operator sets `limits`."
        )


@dataclass(frozen=True)
class Entry:
    """One request under way, of a key that has limits."""

    standing: Standing | None = None
    """Towards the minute's requests, where these are limited."""
    lease: str = ""
    """What it is counted by among those under way, where these are limited and counted elsewhere."""


class Limits(Protocol):
    """Where the requests and tokens of keys are counted."""

    async def enter(self, key: Key) -> Entry:
        """Begin one of the key's requests.

        Raises:
            TooManyAtOnce: as many are under way as may be.
            RateExceeded: the minute's requests are used up; then it is not under way either.
        """

    async def take_tokens(self, key: Key, limit: int, tokens: int) -> tuple[Standing, Charge]:
        """Count the tokens that it may take; as `Rates.take_tokens`."""

    async def leave(self, key: Key, entry: Entry, charge: Charge | None, tokens: int | None) -> None:
        """End the request; with ``tokens`` known they count instead of the charge, as `Rates.settle` has it."""

    async def check(self) -> None:
        """Whether requests can be counted.

        Raises:
            AssayError: they cannot, in one sentence.
        """

    async def close(self) -> None:
        """Let go of what it holds."""


class LocalLimits:
    """Counted in this process, for a server that is one."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._running: Counter[str] = Counter()

    async def enter(self, key: Key) -> Entry:
        """See `Limits`."""
        if key.concurrent_requests is not None and self._running[key.name] >= key.concurrent_requests:
            raise TooManyAtOnce(key.concurrent_requests)
        self._running[key.name] += 1
        try:
            limit = key.requests_per_minute
            return Entry() if limit is None else Entry(await self._rates.take_request(key.name, limit))
        except BaseException:
            self._end(key)
            raise

    async def take_tokens(self, key: Key, limit: int, tokens: int) -> tuple[Standing, Charge]:
        """See `Limits`."""
        return await self._rates.take_tokens(key.name, limit, tokens)

    async def leave(self, key: Key, entry: Entry, charge: Charge | None, tokens: int | None) -> None:
        """See `Limits`."""
        self._end(key)
        if charge is not None and tokens is not None:
            await self._rates.settle(charge, tokens)

    def _end(self, key: Key) -> None:
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]

    async def check(self) -> None:
        """They always can be."""

    async def close(self) -> None:
        """There is nothing to let go of."""


class NoCommonLimits(LocalLimits):
    """For several gateways on one port that have none: whoever has limits is refused, and never let in N times."""

    async def enter(self, key: Key) -> Entry:
        """Refuse it."""
        raise LimitsNotShared


def limits_of(config: "Config") -> Limits:
    """Where this server counts.

    Raises:
        ConfigError: the file with Redis's password cannot be read.
    """
    if config.limits is None:
        return LocalLimits() if config.workers == 1 else NoCommonLimits()
    from server.shared_limits import SharedLimits  # Redis's client, for which a server of one need not wait

    return SharedLimits(config.limits, config.read_limits_password())


async def check_limits(config: "Config") -> None:
    """Find out before anything is started whether requests can be counted.

    Raises:
        ConfigError: several processes would each count for themselves.
        AssayError: Redis does not answer.
    """
    if config.limits is None and config.workers > 1:
        limited = [key.name for key in KeyFile(config.keys_file).read() if key.has_limits]
        if limited:
            raise ConfigError(
                f"The key {limited[0]!r} has limits, and each of {config.workers} workers would count them by "
                "itself: set `limits: redis://…`, where all count together, or `workers: 1`."
            )
    limits = limits_of(config)
    try:
        await limits.check()
    finally:
        await limits.close()
