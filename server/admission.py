"""Whether a request may go to a tier now, and when: its key's limits, then the tier's queue.

Knows keys, limits and queues; knows nothing of HTTP bodies or engines.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from server.engines.pool import Pool
from server.exchange import Headers
from server.fair_queue import FairQueue, Place
from server.keys import Key
from server.limits import Entry, Limits
from server.rates import Charge, Standing

AT_THE_TOKENIZER = 4
"""Texts at once, of which an engine does one after another."""
MOST_AT_IT = 64
"""That wait besides."""
ANYBODY = "anybody"
"""Whose turn it is where no keys are asked for."""
_STANDING = {
    what: tuple(f"x-ratelimit-{name}-{what}".encode() for name in ("limit", "remaining", "reset"))
    for what in ("requests", "tokens")
}
"""The headers that say how a key stands."""


class Bill:
    """What one request takes of its key's limits within the block; corrected when it is known what it really took.

    A class, for every request has one, and a generator costs more.
    """

    def __init__(self, key: Key | None, limits: Limits, headers: Headers) -> None:
        self._key = key if key is not None and key.has_limits else None
        self._limits = limits
        self._headers = headers
        self._entry = Entry()
        self._charge: Charge | None = None
        self.tokens: int | None = None
        """Prompt and answer, once the engine has said; what was reserved stays taken otherwise."""

    async def __aenter__(self) -> Self:
        if self._key is not None:
            self._entry = await self._limits.enter(self._key)
            if self._entry.standing is not None:
                self._note("requests", self._entry.standing)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._key is not None:
            await self._limits.leave(self._key, self._entry, self._charge, self.tokens)

    async def reserve(self, tokens: int) -> None:
        """Count the tokens it may take, at most. Raises RateExceeded."""
        if self._key is not None and self._key.tokens_per_minute is not None:
            limit = self._key.tokens_per_minute
            standing, self._charge = await self._limits.take_tokens(self._key, limit, tokens)
            self._note("tokens", standing)

    def _note(self, what: str, standing: Standing) -> None:
        limit, remaining, reset = _STANDING[what]
        self._headers += (
            (limit, b"%d" % standing.limit),
            (remaining, b"%d" % standing.remaining),
            (reset, b"%ds" % standing.reset_s),
        )


class Admission:
    """The limits of all keys and the queues of all tiers."""

    def __init__(self, pools: Iterable[Pool], limits: Limits) -> None:
        self._limits = limits
        self._queues = {pool: _queue_of(pool) for pool in pools}
        self._tokenizers = {pool: _tokenizer_of(pool) for pool in self._queues}
        for pool in self._queues:
            pool.service.follow(self._queues[pool], self._tokenizers[pool])

    def queue(self, pool: Pool) -> FairQueue:
        """The tier's queue for a place in its engines."""
        return self._queues[pool]

    def waiting(self, pool: Pool) -> int:
        """Requests in the tier's queue."""
        return self._queues[pool].waiting

    def bill(self, key: Key | None, headers: Headers) -> Bill:
        """One of the key's requests, within the block; how the key stands is added to ``headers``.

        Raises:
            TooManyAtOnce, RateExceeded: into the block; one of the key's limits is reached.
            LimitsUnreachable, LimitsNotShared: into the block; the key has limits that nobody can count.
        """
        return Bill(key, self._limits, headers)

    def place(self, key: Key | None, pool: Pool, places: int) -> Place:
        """Places in the tier's engines for one request, in turn; see `FairQueue.place`.

        Raises:
            TierDrained: it is out of service, by an operator's word.
        """
        pool.service.check_open()
        return self._queues[pool].place(_name(key), places)

    def tokenizer(self, key: Key | None, pool: Pool) -> Place:
        """The tier's tokenizer for one request, which waits for no answer that is being generated.

        Raises:
            TierDrained: as `place`.
        """
        pool.service.check_open()
        return self._tokenizers[pool].place(_name(key))


def _name(key: Key | None) -> str:
    return key.name if key else ANYBODY


def _queue_of(pool: Pool) -> FairQueue:
    return FairQueue(pool.tier.name, lambda: pool.requests_at_once, pool.tier.resources.max_waiting)


def _tokenizer_of(pool: Pool) -> FairQueue:
    return FairQueue(pool.tier.name, lambda: 0 if pool.service.is_paused else AT_THE_TOKENIZER, MOST_AT_IT)
