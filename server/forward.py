"""One request to one replica of a tier and back: the same bytes there, whole events straight back.

Knows what engines are asked; what an answer says is `server.answer`'s to know.
"""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from server.answer import AnswerGivenUp, EngineBroke, Events, rendered_tokens
from server.engines.affinity import NO_WORK, Burden, Work
from server.engines.places import BrokenOff
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.state import State
from server.engines.upstream import Connection, Draining, NotReached, Upstream, UpstreamBroke
from server.errors import EngineFailed, EngineRefused, FormRefused
from server.exchange import Reply
from server.metrics import Metrics

log = logging.getLogger("assay.forward")

T = TypeVar("T")

MOST_TRIES = 2
"""A request that ends one engine may end the next: two are enough."""


class Format(Protocol):
    """How the answers of one path are given on."""

    @property
    def generates(self) -> bool:
        """Whether the engine computes for it; a tokenizer alone says nothing of its health."""

    @property
    def form(self) -> str | None:
        """The field that says what form the answer is to have, if one does."""

    def briefly(self, body: bytes) -> bytes | None:
        """The body that asks for the least of the same, whole; None where a stream says itself what is refused."""

    def events(self) -> Events:
        """For an answer that comes as a stream."""

    def whole(self, body: bytes) -> bytes:
        """For one that comes at once. Raises EngineBroke."""


class Listener(Protocol):
    """Whoever wants to know that the engine has sent something."""

    def heard(self) -> None:
        """It has, just now."""


@dataclass(frozen=True)
class Errand:
    """What is sent to an engine, and how its answer is given on."""

    path: str
    body: bytes
    request_id: str
    format: Format
    work: Work = NO_WORK
    """What it is to whichever engine takes it."""


async def forward(errand: Errand, pool: Pool, reply: Reply, listener: Listener, metrics: Metrics) -> bytes | None:
    """Do the errand at one of the tier's replicas, and at another one if that breaks before it has said anything.

    Returns:
        The whole answer, still to be sent when the engine is free for others; None of a stream, which has been.

    Raises:
        Refusal: the tier is not ready, the engine refuses the request, or it broke; when the reply has already
            begun, the refusal is still to be sent, as an event.
    """
    return await _at_one_of(
        pool,
        errand,
        errand.path,
        reply,
        metrics,
        lambda replica, burden: _at(replica, burden, errand, reply, listener),
    )


async def count_prompt(errand: Errand, pool: Pool, reply: Reply, metrics: Metrics) -> int:
    """How many tokens the engine makes of the errand's prompt, or of its longest; it generates nothing.

    Raises:
        Refusal: as `forward`.
    """
    path = _rendered(errand)
    return await _at_one_of(pool, errand, path, reply, metrics, lambda replica, _: _count(replica, errand))


def _rendered(errand: Errand) -> str:
    """Where an engine says what it makes of a prompt."""
    return f"{errand.path}/render"


async def _at_one_of(
    pool: Pool,
    errand: Errand,
    path: str,
    reply: Reply,
    metrics: Metrics,
    work: Callable[[Replica, Burden], Awaitable[T]],
) -> T:
    tried: list[Replica] = []
    given = 0
    while True:
        replica = pool.pick(errand.work, tried)
        try:
            with replica.load.take(errand.work) as burden, reply.record.trace.attempt(replica, path):
                return await work(replica, burden)
        except (UpstreamBroke, BrokenOff, EngineBroke) as error:
            if errand.format.form and isinstance(error, AnswerGivenUp):
                raise FormRefused(errand.format.form) from None
            log.warning("%s: request %s broke off: %s", pool.tier.name, errand.request_id, error)
            alive = await replica.is_alive()
            tried.append(replica)
            given += not isinstance(error, NotReached)
            if reply.body_began is not None:
                metrics.broken.labels(pool.tier.name).inc()
                raise EngineFailed(f"The engine of {pool.tier.name} broke off this answer.") from error
            if given < MOST_TRIES and pool.has_another(tried):
                metrics.retries.labels(pool.tier.name).inc()
            elif alive and replica.state is not State.DRAINING:
                raise EngineFailed(f"The engine of {pool.tier.name} failed on this request.") from error
            else:
                raise replica.unavailable() from error


async def _at(replica: Replica, burden: Burden, errand: Errand, reply: Reply, listener: Listener) -> bytes | None:
    async with (
        replica.slot() as upstream,
        upstream.post(errand.path, errand.body, errand.request_id, reply.record.trace.header) as answer,
    ):
        if answer.status != 200:
            await _refuse_like(answer, replica, errand)
        if answer.content_type.startswith(b"text/event-stream"):
            try:
                await _copy_events(answer, errand, replica, burden, reply, listener)
            except UpstreamBroke:
                if reply.body_began is None:
                    await _ask_briefly(upstream, errand, replica)
                raise
            return None
        body = errand.format.whole(await answer.read())
        if errand.format.generates:
            replica.answered()
        return body


async def _ask_briefly(upstream: Upstream, errand: Errand, replica: Replica) -> None:
    """Find out whether a stream that was cut before its first word was refused.

    What vLLM 0.32 finds wrong once it has begun a response, it says only to those who do not stream it.

    Raises:
        EngineRefused: it was.
        EngineBroke: the engine fails at this too.
    """
    if (body := errand.format.briefly(errand.body)) is None:
        return
    with contextlib.suppress(NotReached):  # this time: what it was sent before may have ended it
        async with upstream.post(errand.path, body, errand.request_id) as answer:
            if answer.status != 200:
                await _refuse_like(answer, replica, errand)


async def _count(replica: Replica, errand: Errand) -> int:
    async with (
        replica.slot() as upstream,
        upstream.post(_rendered(errand), errand.body, errand.request_id) as answer,
    ):
        if answer.status != 200:
            await _refuse_like(answer, replica, errand)
        return rendered_tokens(await answer.read())


async def _copy_events(
    answer: Connection, errand: Errand, replica: Replica, burden: Burden, reply: Reply, listener: Listener
) -> None:
    """Copy whole events only, so that what breaks off never leaves half of one."""
    events = errand.format.events()
    reply.error_event = events.error
    pending = b""
    while chunk := await answer.part():
        if pending:
            chunk = pending + chunk
        cut = chunk.rfind(b"\n\n") + 2
        if cut < 2:
            pending = chunk
            continue
        pending = chunk[cut:]
        passed = events.take(chunk[:cut])
        if passed:
            # Only now: a stream's status, and what opens a response, come before the engine has done anything.
            listener.heard()
            replica.answered()
            if reply.status is None:
                burden.has_read()
                await reply.begin_events()
            await reply.send(passed)
        if events.failure is not None:
            _hold_against(replica, events.failure, errand)
            raise events.failure
    if not events.ended:
        raise EngineBroke("the stream ended before its last event")
    await reply.send(b"", more=False)


async def _refuse_like(answer: Connection, replica: Replica, errand: Errand) -> None:
    if answer.drains:
        raise Draining
    refused = EngineRefused.read(answer.status, await answer.read())
    if answer.status in EngineRefused.STATUSES:
        raise refused
    broke = AnswerGivenUp.or_broke(refused, f"it answered {answer.status}")  # whose words may be the caller's
    _hold_against(replica, broke, errand)
    raise broke


def _hold_against(replica: Replica, error: Exception, errand: Errand) -> None:
    """Count an error of the engine's; callers who ask for what cannot be do not take it from all others."""
    if isinstance(error, EngineBroke) and not (errand.format.form and isinstance(error, AnswerGivenUp)):
        replica.erred()
