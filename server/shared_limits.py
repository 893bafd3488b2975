"""The requests and tokens of keys, counted in Redis by all gateways together.

The same windows and answers as in one process (`server/rates.py`), with two differences of place: time is Redis's
own, so that gateways whose clocks differ agree when a minute ends; and a request under way is a lease that its
gateway refreshes, so that what a gateway took with it when it died comes back by itself.

Each step is one script, hence one round trip, and nobody else's request comes between its looking and its
counting. The library `limits` counts in Redis too, but asks for a window's end in a second call, in whole seconds,
and cannot say which window a correction is meant for; and it knows no requests under way.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import time
from collections.abc import Sequence
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from server.errors import RateExceeded, RetryLater, TooManyAtOnce
from server.keys import Key
from server.limit_scripts import ENTER, FORGET, LEAVE, REFRESH, TAKE
from server.limits import Entry
from server.rates import Charge, Standing
from tiers.errors import AssayError

log = logging.getLogger("assay.limits")

PATIENCE_S = 1.0
"""A caller waits no longer for Redis."""
RETRY_AFTER_S = 5
LEASE_S = 15.0
"""So long the requests of a gateway that died still count as under way."""
REFRESH_S = LEASE_S / 3
"""Two may fail."""
TAKE_BACK_S = 0.2
GIVEN_UP_S = 4 * LEASE_S
"""What could not be taken back by then ends by itself, unless Redis stands still for so long and then goes on."""
GONE_AFTER_S = 15
"""A connection whose other side has vanished is found out by then, and not by the next request."""
CONNECTIONS = 32
"""To Redis, which does one thing at a time anyway; more wait for one, within their patience."""


class LimitsUnreachable(RetryLater):
    """The key has limits, and where they are counted nobody answers: without a count nobody is let in."""

    status, type, code = 503, "server_error", "limits_unreachable"

    def __init__(self) -> None:
        super().__init__(
            f"This key has limits, which cannot be counted now; try again in {RETRY_AFTER_S} s.", RETRY_AFTER_S
        )


class RedisUnreachable(AssayError):
    """Limits are to be counted in a Redis that does not answer."""


class SharedLimits:
    """As `Limits` has it, for all gateways with the same Redis."""

    def __init__(self, url: str, password: str | None) -> None:
        self._where = urlsplit(url).hostname or urlsplit(url).path
        given: dict[str, Any] = {"password": password} if password else {}
        if not url.startswith("unix:"):
            given["socket_keepalive"] = True
            given["socket_keepalive_options"] = {
                socket.TCP_KEEPIDLE: GONE_AFTER_S // 3,
                socket.TCP_KEEPINTVL: GONE_AFTER_S // 3,
                socket.TCP_KEEPCNT: 2,
                socket.TCP_USER_TIMEOUT: GONE_AFTER_S * 1000,
            }
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=PATIENCE_S,
            socket_connect_timeout=PATIENCE_S,
            # A script that was sent may have been run: one more try would count twice, and the caller waits.
            retry=Retry(NoBackoff(), 0),
            **given,
        )
        self._redis = Redis.from_pool(pool)
        self._enter, self._take, self._leave, self._refresh, self._forget = map(
            self._redis.register_script, (ENTER, TAKE, LEAVE, REFRESH, FORGET)
        )
        self._name = secrets.token_hex(8)
        self._numbers = count()
        self._leases: dict[str, set[str]] = {}
        """Of the requests that run here, by key."""
        self._strays: dict[tuple[str, str], float] = {}
        """Of requests that do not run, by key, which Redis may count all the same, and since when."""
        self._refreshing: asyncio.Task[None] | None = None
        self._taking_back: asyncio.Task[None] | None = None
        self._is_lost = False

    async def enter(self, key: Key) -> Entry:
        """See `Limits`. Raises LimitsUnreachable too."""
        at_once, limit = key.concurrent_requests, key.requests_per_minute
        if at_once is None and limit is None:
            return Entry()
        lease = f"{self._name}-{next(self._numbers)}" if at_once is not None else ""
        try:
            refused, taken, left_ms = await self._ask(
                self._enter,
                (_leases(key.name), f"assay:{{{key.name}}}:requests"),
                (at_once or 0, lease, round(LEASE_S * 1000), limit or 0),
            )
        except (LimitsUnreachable, asyncio.CancelledError):
            self._take_back(key.name, lease)  # it may have been counted: only its answer did not come
            raise
        if refused == b"at once":
            assert at_once is not None
            raise TooManyAtOnce(at_once)
        if refused:
            assert limit is not None
            raise RateExceeded("requests", limit, max(1, _seconds(left_ms)))
        if lease:
            self._keep(key.name, lease)
        standing = None if limit is None else Standing(limit, limit - taken - 1, _seconds(left_ms))
        return Entry(standing, lease)

    async def take_tokens(self, key: Key, limit: int, tokens: int) -> tuple[Standing, Charge]:
        """See `Limits`. Raises LimitsUnreachable too."""
        refused, taken, left_ms, ends_ms = await self._ask(self._take, (_tokens(key.name),), (limit, tokens))
        if refused:
            raise RateExceeded("tokens", limit, max(1, _seconds(left_ms)))
        standing = Standing(limit, max(0, limit - taken - tokens), _seconds(left_ms))
        return standing, Charge(key.name, tokens, ends_ms / 1000)

    async def leave(self, key: Key, entry: Entry, charge: Charge | None, tokens: int | None) -> None:
        """See `Limits`. Without Redis what was reserved stays taken."""
        more, ends_ms = 0, 0
        if charge is not None and tokens is not None:
            more, ends_ms = tokens - charge.tokens, round(charge.window_ends * 1000)
        if entry.lease:
            self._let_go(key.name, entry.lease)
        if entry.lease or more:
            try:
                await self._ask(self._leave, (_leases(key.name), _tokens(key.name)), (entry.lease, more, ends_ms))
            except LimitsUnreachable:  # its caller has their answer, and the log has the reason
                self._take_back(key.name, entry.lease)

    async def check(self) -> None:
        """See `Limits`: sends what enters nobody, so that a Redis which allows no scripts is found too."""
        try:
            await self._ask(self._enter, (_leases("nobody"), "assay:{nobody}:requests"), (0, "", 0, 0))
        except LimitsUnreachable as error:
            raise RedisUnreachable(
                f"Limits cannot be counted in the Redis at {self._where} ({_reason(error.__cause__)}): start it, "
                "or correct `limits` and `limits_password`."
            ) from error.__cause__

    async def close(self) -> None:
        """End its connections; leases of what still runs end by themselves."""
        tasks = [task for task in (self._refreshing, self._taking_back) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._redis.aclose()

    def _keep(self, name: str, lease: str) -> None:
        self._leases.setdefault(name, set()).add(lease)
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._keep_refreshing())

    def _let_go(self, name: str, lease: str) -> None:
        self._leases[name].remove(lease)
        if not self._leases[name]:
            del self._leases[name]

    def _take_back(self, name: str, lease: str) -> None:
        """Have it count for nobody, as soon as Redis answers."""
        if lease:
            self._strays[name, lease] = time.monotonic()
            if self._taking_back is None or self._taking_back.done():
                self._taking_back = asyncio.create_task(self._keep_taking_back())

    async def _keep_taking_back(self) -> None:
        while self._strays:
            await asyncio.sleep(TAKE_BACK_S)
            given_up = time.monotonic() - GIVEN_UP_S
            self._strays = {stray: since for stray, since in self._strays.items() if since > given_up}
            for name in {name for name, _ in self._strays}:
                leases = [lease for of, lease in self._strays if of == name]
                try:
                    await self._ask(self._forget, (_leases(name),), leases)
                except LimitsUnreachable:
                    break
                for lease in leases:
                    del self._strays[name, lease]

    async def _keep_refreshing(self) -> None:
        """Prolong the leases of what runs here, until nothing does."""
        while self._leases:
            await asyncio.sleep(REFRESH_S)
            await asyncio.gather(*(self._refresh_leases(name) for name in list(self._leases)))

    async def _refresh_leases(self, name: str) -> None:
        """Those of one key. What fails is no reason to let those of others end, and is done again soon."""
        with contextlib.suppress(LimitsUnreachable):
            await self._refresh_leases_now(name)

    async def _refresh_leases_now(self, name: str) -> None:
        leases = sorted(self._leases.get(name, ()))
        if leases:
            await self._ask(self._refresh, (_leases(name),), (round(LEASE_S * 1000), *leases))
        # On two connections the end of a request may have overtaken this, which then brought its lease back.
        if over := set(leases) - self._leases.get(name, set()):
            await self._ask(self._forget, (_leases(name),), tuple(over))

    async def _ask(self, script: Any, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """One round trip, and no more than `PATIENCE_S`. Raises LimitsUnreachable."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await script(keys, arguments)
        except (RedisError, OSError, TimeoutError) as error:
            if not self._is_lost:
                log.error(  # noqa: TRY400  # the sentence says it all
                    "the Redis at %s does not count (%s): requests of keys with limits are refused until it does",
                    self._where,
                    _reason(error),
                )
            self._is_lost = True
            raise LimitsUnreachable from error
        if self._is_lost:
            log.warning("the Redis at %s counts again", self._where)
        self._is_lost = False
        return answer


def _leases(name: str) -> str:
    # In braces: one key's counts lie together where a Redis is spread over several.
    return f"assay:{{{name}}}:leases"


def _tokens(name: str) -> str:
    return f"assay:{{{name}}}:tokens"


def _seconds(ms: int) -> int:
    return math.ceil(ms / 1000)


def _reason(error: BaseException | None) -> str:
    return str(error).rstrip(".") or f"no answer within {PATIENCE_S:.0f} s"
