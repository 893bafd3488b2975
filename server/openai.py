"""The OpenAI-compatible API: what each of its paths reads, asks an engine, and answers."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from msgspec import UNSET
from pydantic import BaseModel

from server.admission import Admission, Bill
from server.answer import (
    EngineBroke,
    Events,
    Fields,
    ResponseEvents,
    TextEvents,
    Usage,
    clean_completion,
    clean_nothing,
    clean_response,
    whole_answer,
)
from server.call import Call, read_call
from server.conventions import OPERATIONS
from server.engines.affinity import Work, head_of
from server.engines.pool import Pool
from server.errors import OutputTooLong, PromptTooLong, Refusal, TierNotAllowed
from server.exchange import ClientLeft, Headers, Receive, Reply, read_body
from server.forward import Errand, count_prompt, forward
from server.gate import Gate
from server.keys import Key
from server.meter import Course
from server.metrics import Metrics
from server.responses_call import ResponsesCall
from server.routing import Routes
from server.standing import OUTCOMES, Outcome, Standings
from server.text_call import ChatCall, CompletionCall, DetokenizeCall, TokenizeCall
from server.watch import TimeLimits, Watch

LAST_WORD_S = 10.0
"""For an error to reach a caller who reads slowly."""
BYTES_PER_TOKEN = 4
"""Of a prompt in English, roughly: what a key is charged until the engine has counted."""
LARGEST_TEXT = 1 << 20
"""Bytes to turn into tokens or back: an engine does one such request after another, this much in half a second."""
LONGEST_TEMPLATE = 512
"""Tokens that a chat template may add to what the caller wrote."""


@dataclass(frozen=True)
class Path:
    """One path of the API and what is particular to it."""

    path: str
    kind: type[Call]
    clean: Callable[[Fields], None]
    events: Callable[[Call], Events] | None = None
    """None where nothing is generated: such requests take no place in the engine's batch."""


def _text_events(call: Call) -> Events:
    return TextEvents(show_usage=call.asks_usage)


PATHS = (
    Path("/v1/chat/completions", ChatCall, clean_completion, _text_events),
    Path("/v1/completions", CompletionCall, clean_completion, _text_events),
    Path("/v1/responses", ResponsesCall, clean_response, lambda _: ResponseEvents()),
    Path("/tokenize", TokenizeCall, clean_nothing),
    Path("/detokenize", DetokenizeCall, clean_nothing),
)


class _Format:
    """How the answer to one call is given on, and what it took."""

    def __init__(self, path: Path, call: Call, prompt_guess: int) -> None:
        self._path = path
        self._call = call
        self._prompt_guess = prompt_guess
        self._events: Events | None = None
        self._usage: Usage | None = None

    @property
    def generates(self) -> bool:
        return self._path.events is not None

    @property
    def usage(self) -> Usage | None:
        """What the engine has counted, if it came so far."""
        return self._events.usage if self._events else self._usage

    @property
    def tokens(self) -> int | None:
        """What the request took, or of a stream that was cut roughly; None if nothing is known."""
        if usage := self.usage:
            return usage.prompt + usage.answer
        return self._prompt_guess + self._events.seen if self._events else None

    @property
    def form(self) -> str | None:
        return self._call.form

    def briefly(self, body: bytes) -> bytes | None:
        return self._call.briefly(body)

    def events(self) -> Events:
        if self._path.events is None:
            raise EngineBroke("it streams what cannot be streamed")
        self._events = self._path.events(self._call)
        return self._events

    def whole(self, body: bytes) -> bytes:
        answer, self._usage = whole_answer(body, self._path.clean)
        return answer


class Endpoint:
    """Raw ASGI, the hot path: one tier chosen by the body's ``model``, its engine's bytes straight back."""

    def __init__(
        self,
        path: Path,
        routes: Routes,
        gate: Gate,
        admission: Admission,
        metrics: Metrics,
        *,
        body_limit: int,
        body_timeout_s: float,
        limits: TimeLimits,
    ) -> None:
        self._path = path
        self._routes = routes
        self._gate = gate
        self._admission = admission
        self._metrics = metrics
        self._body_limit = body_limit if path.events else min(body_limit, LARGEST_TEXT)
        self._body_timeout_s = body_timeout_s
        self._limits = limits
        self._tier_headers = {
            (pool, verdict): tier_headers(pool, verdict) for pool in routes.pools for verdict in OUTCOMES
        }

    async def __call__(self, headers: Headers, receive: Receive, reply: Reply, key: Key | None) -> None:
        """Answer one POST, or refuse it."""
        began = reply.request_began
        course = Course(self._metrics, OPERATIONS.get(self._path.path), reply)
        try:
            async with self._admission.bill(key, reply.headers) as bill:
                body = await read_body(headers, receive, self._body_limit, self._body_timeout_s)
                call = read_call(body, self._path.kind)
                call.check()
                pool = self._routes.resolve(call.model)
                course.found(call, pool.tier.name)
                reply.record.trace.asked(call, body, course.tier)
                self._hold_to_tier(call, pool, key)
                standing = self._gate.standing(pool)
                reply.headers += self._tier_headers[pool, standing.verdict]
                self._gate.check(pool, standing)
                try:
                    with Watch(reply, self._limits, began, streams=call.streams) as watch:
                        await self._answer(call, body, pool, reply, watch, bill, key, course)
                except Refusal:
                    if reply.body_began is None:
                        bill.tokens = 0  # it got nothing
                    raise
        except Refusal as refusal:
            course.refused(refusal)
            with contextlib.suppress(TimeoutError):  # of a caller who does not read even this
                async with asyncio.timeout(LAST_WORD_S):
                    await reply.refuse(refusal)
        except ClientLeft:
            course.left()
        finally:
            course.tell()

    def _hold_to_tier(self, call: Call, pool: Pool, key: Key | None) -> None:
        if key is not None and not key.may_use(pool.tier):
            raise TierNotAllowed(key.name, pool.tier.name)
        if call.precision is not UNSET:
            self._routes.check_pin(pool, call.precision)
        most = pool.tier.resources.max_output_tokens
        if most is not None and (call.output_tokens or 0) > most:
            raise OutputTooLong(pool.tier.name, call.output_field, call.output_tokens or 0, most)

    async def _answer(
        self,
        call: Call,
        body: bytes,
        pool: Pool,
        reply: Reply,
        watch: Watch,
        bill: Bill,
        key: Key | None,
        course: Course,
    ) -> None:
        prompt_guess = len(body) // BYTES_PER_TOKEN
        answer_format = _Format(self._path, call, prompt_guess)
        sent = call.for_engine(body, key.name if key else "", reply.request_id)
        errand = Errand(self._path.path, sent, reply.request_id, answer_format)
        trace = reply.record.trace
        if not answer_format.generates:
            trace.waits()
            async with self._admission.tokenizer(key, pool):
                trace.admitted()
                whole = await forward(errand, pool, reply, watch, self._metrics)
        else:
            await bill.reserve(prompt_guess + call.choices * (call.output_tokens or 0))
            if len(pool.replicas) > 1:
                errand = replace(errand, work=_work(call, pool, prompt_guess))
            try:
                trace.waits()
                async with self._admission.place(key, pool, call.choices):
                    self._gate.check(pool, self._gate.standing(pool))  # it may have waited for another engine
                    trace.admitted()
                    await self._hold_prompt_to_tier(errand, pool, reply)
                    whole = await forward(errand, pool, reply, watch, self._metrics)
            finally:
                bill.tokens = answer_format.tokens
                course.used(answer_format.usage)
                if answer_format.usage:
                    pool.answered(answer_format.usage.answer)
        if whole is not None:
            await reply.whole(200, whole)  # the place is another's by now: this caller may read slowly

    async def _hold_prompt_to_tier(self, errand: Errand, pool: Pool, reply: Reply) -> None:
        most = pool.tier.resources.max_prompt_tokens
        if most is None or len(errand.body) + LONGEST_TEMPLATE <= most:
            return  # a token is a byte at the least, so that most prompts need not be counted
        if (tokens := await count_prompt(errand, pool, reply, self._metrics)) > most:
            raise PromptTooLong(pool.tier.name, tokens, most)


def _work(call: Call, pool: Pool, prompt_guess: int) -> Work:
    salt = call.cache_salt if isinstance(call.cache_salt, str) else ""
    answers = call.choices * pool.expected_answer(call.output_tokens)
    return Work(prompt_guess, answers, head_of(call.beginning, salt))


def tier_headers(pool: Pool, verdict: Outcome) -> Headers:
    """The headers that say what answered, and how it stands."""
    manifest = pool.manifest
    return [
        (b"x-assay-tier", pool.tier.kind.value.encode()),
        (b"x-assay-precision", manifest.precision.name.encode()),
        (b"x-assay-checkpoint", manifest.short_digest.encode()),
        (b"x-assay-certificate", verdict.encode()),
    ]


class Model(BaseModel):
    """One name that callers may use; the first four fields are OpenAI's."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "assay"
    tier: str
    precision: str
    checkpoint: str
    certificate: Outcome
    """How its tier stands, as `x-assay-certificate` says it."""
    context_length: int

    @classmethod
    def of(cls, name: str, pool: Pool, verdict: Outcome) -> "Model":
        """The entry of ``name``, which the tier answers to."""
        return cls(
            id=name,
            created=int(pool.manifest.created.timestamp()),
            tier=pool.tier.kind,
            precision=pool.manifest.precision.name,
            checkpoint=pool.manifest.short_digest,
            certificate=verdict,
            context_length=pool.context_length,
        )


class ModelList(BaseModel):
    """All names that callers may use."""

    object: str = "list"
    data: list[Model]


def models_router(routes: Routes, standings: Standings) -> APIRouter:
    """GET /v1/models and /v1/models/{id}."""
    router = APIRouter(tags=["models"])

    def model_of(name: str, pool: Pool) -> Model:
        return Model.of(name, pool, standings.of(pool).verdict)

    @router.get("/v1/models")
    async def list_models(request: Request) -> ModelList:
        """The names that the caller's key may use."""
        key: Key | None = request.state.key
        pools = {name: routes.resolve(name) for name in routes.names}
        allowed = {name: pool for name, pool in pools.items() if key is None or key.may_use(pool.tier)}
        return ModelList(data=[model_of(name, pool) for name, pool in allowed.items()])

    @router.get("/v1/models/{model:path}")
    async def get_model(request: Request, model: str) -> Model:
        """One of them."""
        pool = routes.resolve(model)
        key: Key | None = request.state.key
        if key is not None and not key.may_use(pool.tier):
            raise TierNotAllowed(key.name, pool.tier.name)
        return model_of(model, pool)

    return router
