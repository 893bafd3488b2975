"""Whether a request may go to a tier now, and when: its key's limits, then the tier's queue.

Knows keys, limits and queues; knows nothing of HTTP bodies or engines.
"""

from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from server.engines.pool import Pool
from server.errors import TooManyAtOnce
from server.exchange import Headers
from server.fair_queue import FairQueue, Place
from server.keys import Key
from server.rates import Charge, Rates, Standing

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


class Account:
    """What one request takes of its key's limits within the block; corrected when it is known what it really took.

    A class, for every request has one, and a generator costs more.
    """

    def __init__(self, key: Key | None, rates: Rates, running: "Counter[str]", headers: Headers) -> None:
        self._key = key
        self._rates = rates
        self._running = running
        self._headers = headers
        self._charge: Charge | None = None
        self.tokens: int | None = None
        """Prompt and answer, once the engine has said; what was reserved stays taken otherwise."""

    async def __aenter__(self) -> Self:
        if self._key is not None:
            self._begin(self._key)
            try:
                await self._take_request(self._key)
            except BaseException:
                self._end(self._key)
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._key is not None:
            self._end(self._key)
            await self._settle()

    def _begin(self, key: Key) -> None:
        if key.concurrent_requests is not None and self._running[key.name] >= key.concurrent_requests:
            raise TooManyAtOnce(key.concurrent_requests)
        self._running[key.name] += 1

    def _end(self, key: Key) -> None:
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]

    async def _take_request(self, key: Key) -> None:
        if key.requests_per_minute is not None:
            self._note("requests", await self._rates.take_request(key.name, key.requests_per_minute))

    async def reserve(self, tokens: int) -> None:
        """Count the tokens it may take, at most. Raises RateExceeded."""
        if self._key is not None and self._key.tokens_per_minute is not None:
            limit = self._key.tokens_per_minute
            standing, self._charge = await self._rates.take_tokens(self._key.name, limit, tokens)
            self._note("tokens", standing)

    async def _settle(self) -> None:
        if self._charge is not None and self.tokens is not None:
            await self._rates.settle(self._charge, self.tokens)

    def _note(self, what: str, standing: Standing) -> None:
        limit, remaining, reset = _STANDING[what]
        self._headers += (
            (limit, b"%d" % standing.limit),
            (remaining, b"%d" % standing.remaining),
            (reset, b"%ds" % standing.reset_s),
        )


class Admission:
    """The limits of all keys and the queues of all tiers."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self._rates = Rates()
        self._running: Counter[str] = Counter()
        self._queues = {pool: _queue_of(pool) for pool in pools}
        self._tokenizers = {pool: _tokenizer_of(pool) for pool in self._queues}
        for pool in self._queues:
            pool.service.follow(self._queues[pool], self._tokenizers[pool])

    def waiting(self, pool: Pool) -> int:
        """Requests in the tier's queue."""
        return self._queues[pool].waiting

    def account(self, key: Key | None, headers: Headers) -> Account:
        """One of the key's requests, within the block; how the key stands is added to ``headers``.

        Raises:
            TooManyAtOnce, RateExceeded: into the block; one of the key's limits is reached.
        """
        return Account(key, self._rates, self._running, headers)

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
