"""The requests and tokens of keys, counted in Redis by all gateways together.

The same windows and answers as in one process (`server/rates.py`), with two differences of place: time is Redis's
own, so that gateways whose clocks differ agree when a minute ends; and a request under way is a lease that its
gateway refreshes, so that what a gateway took with it when it died comes back by itself.

Each step is one script, hence one round trip, and nobody else's request comes between its looking and its
counting. The library `limits` counts in Redis too, but asks for a window's end in a second call, in whole seconds,
and cannot say which window a correction is meant for; and it knows no requests under way.
"""

import asyncio
import logging
import math
import secrets
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
from server.limits import Entry
from server.rates import WINDOW_S, Charge, Standing
from tiers.errors import AssayError

log = logging.getLogger("assay.limits")

PATIENCE_S = 1.0
"""A caller waits no longer for Redis."""
RETRY_AFTER_S = 5
LEASE_S = 15.0
"""So long the requests of a gateway that died still count as under way."""
REFRESH_S = LEASE_S / 3
"""Two may fail."""
CONNECTIONS = 32
"""To Redis, which does one thing at a time anyway; more wait for one, within their patience."""

_TIME = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_WINDOW = (
    _TIME
    + f"""
-- A minute that begins with the first request after the last one: when it ends, and what was taken in it.
local function window(key)
  local ends = tonumber(redis.call('HGET', key, 'ends'))
  if ends and ends > now then return ends, tonumber(redis.call('HGET', key, 'taken')) end
  ends = now + {WINDOW_S * 1000}
  redis.call('HSET', key, 'ends', ends, 'taken', 0)
  redis.call('PEXPIREAT', key, ends)
  return ends, 0
end
"""
)

_ENTER = (
    _WINDOW
    + """
-- KEYS: leases, requests. ARGV: most at once or 0, this lease, its ms, requests a minute or 0.
-- Which limit refuses it, how many were taken before it, and the ms until they are there again.
local at_once, limit, taken, left = tonumber(ARGV[1]), tonumber(ARGV[4]), 0, 0
if at_once > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  if redis.call('ZCARD', KEYS[1]) >= at_once then return {'at once', 0, 0} end
end
if limit > 0 then
  local ends
  ends, taken = window(KEYS[2])
  left = ends - now
  if taken >= limit then return {'requests', taken, left} end
  redis.call('HINCRBY', KEYS[2], 'taken', 1)
end
if at_once > 0 then
  redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {'', taken, left}
"""
)

_TAKE = (
    _WINDOW
    + """
-- KEYS: tokens. ARGV: tokens a minute, tokens.
-- 1 if they are refused, how many were taken before, the ms until they are there again, and when that is.
local limit, tokens = tonumber(ARGV[1]), tonumber(ARGV[2])
local ends, taken = window(KEYS[1])
if taken + math.min(tokens, limit) > limit then return {1, taken, ends - now, ends} end
redis.call('HINCRBY', KEYS[1], 'taken', tokens)
return {0, taken, ends - now, ends}
"""
)

_LEAVE = (
    _WINDOW
    + """
-- KEYS: leases, tokens. ARGV: this lease or nothing, tokens beyond those counted, when the window of these ends.
if ARGV[1] ~= '' then redis.call('ZREM', KEYS[1], ARGV[1]) end
local more = tonumber(ARGV[2])
if more > 0 then
  window(KEYS[2])
  redis.call('HINCRBY', KEYS[2], 'taken', more)
elseif more < 0 and tonumber(redis.call('HGET', KEYS[2], 'ends')) == tonumber(ARGV[3]) then
  redis.call('HINCRBY', KEYS[2], 'taken', more)
end
"""
)

_REFRESH = (
    _TIME
    + """
-- KEYS: leases. ARGV: their ms, and each. Redis may have lost them, so they are set and not only prolonged.
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)


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
        self._enter, self._take, self._leave, self._refresh = map(
            self._redis.register_script, (_ENTER, _TAKE, _LEAVE, _REFRESH)
        )
        self._name = secrets.token_hex(8)
        self._numbers = count()
        self._leases: dict[str, set[str]] = {}
        """Of the requests that run here, by key."""
        self._refreshing: asyncio.Task[None] | None = None
        self._is_lost = False

    async def enter(self, key: Key) -> Entry:
        """See `Limits`. Raises LimitsUnreachable too."""
        at_once, limit = key.concurrent_requests, key.requests_per_minute
        if at_once is None and limit is None:
            return Entry()
        lease = f"{self._name}-{next(self._numbers)}" if at_once is not None else ""
        refused, taken, left_ms = await self._ask(
            self._enter,
            (_leases(key.name), f"assay:{{{key.name}}}:requests"),
            (at_once or 0, lease, round(LEASE_S * 1000), limit or 0),
        )
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
        """See `Limits`. Without Redis the lease ends by itself, and what was reserved stays taken."""
        more, ends_ms = 0, 0
        if charge is not None and tokens is not None:
            more, ends_ms = tokens - charge.tokens, round(charge.window_ends * 1000)
        if entry.lease:
            self._let_go(key.name, entry.lease)
        if entry.lease or more:
            try:
                await self._ask(self._leave, (_leases(key.name), _tokens(key.name)), (entry.lease, more, ends_ms))
            except LimitsUnreachable:
                return  # its caller has their answer, and the log has the reason

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
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self._redis.aclose()

    def _keep(self, name: str, lease: str) -> None:
        self._leases.setdefault(name, set()).add(lease)
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._keep_refreshing())

    def _let_go(self, name: str, lease: str) -> None:
        self._leases[name].remove(lease)
        if not self._leases[name]:
            del self._leases[name]

    async def _keep_refreshing(self) -> None:
        """Prolong the leases of what runs here, until nothing does."""
        while self._leases:
            await asyncio.sleep(REFRESH_S)
            try:
                for name in list(self._leases):
                    await self._refresh_leases(name)
            except LimitsUnreachable:
                continue

    async def _refresh_leases(self, name: str) -> None:
        leases = sorted(self._leases.get(name, ()))
        if leases:
            await self._ask(self._refresh, (_leases(name),), (round(LEASE_S * 1000), *leases))
        # On two connections the end of a request may have overtaken this, which then brought its lease back.
        for lease in set(leases) - self._leases.get(name, set()):
            await self._ask(self._leave, (_leases(name), _tokens(name)), (lease, 0, 0))

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
