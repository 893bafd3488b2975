"""Traces by OpenTelemetry's SDK; imported only where a config asks for them.

A span for each request, named and described by OpenTelemetry's conventions for generative AI and for HTTP, and
by OpenInference's, which Phoenix reads. Below it one for its wait in the queue, and one for each replica that
worked on it, which the engine's own span continues.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import msgspec
from openinference.semconv.trace import OpenInferenceSpanKindValues
from openinference.semconv.trace import SpanAttributes as Inference
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, Tracer, set_span_in_context

from server.conventions import OPERATIONS, PROVIDER
from server.exchange import known_method
from server.tracing.trace import Untraced
from server.tracing.words import Answer, question

if TYPE_CHECKING:
    from server.call import Call
    from server.engines.replica import Replica
    from server.exchange import Message, Reply, Send

FROM_HEADERS = MappingProxyType({
    b"x-assay-tier": "assay.tier", b"x-assay-precision": "assay.precision",
    b"x-assay-checkpoint": "assay.checkpoint", b"x-assay-certificate": "assay.certificate",
})  # fmt: skip
"""What answers say of themselves, spans say too."""
WORTH_A_SPAN_NS = 1_000_000
"""A shorter wait in the queue is none."""

_Number = float | Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None
"""OTLP has no others; one that it cannot write down would take all spans of its batch with it."""


class _Parameters(msgspec.Struct, omit_defaults=True):
    """What a call sets, as far as it is a number or a switch: all else is the caller's words."""

    temperature: _Number = None
    top_p: _Number = None
    top_k: _Number = None
    min_p: _Number = None
    max_tokens: _Number = None
    max_completion_tokens: _Number = None
    max_output_tokens: _Number = None
    n: _Number = None
    seed: _Number = None
    frequency_penalty: _Number = None
    presence_penalty: _Number = None
    repetition_penalty: _Number = None
    stream: bool | None = None

    @property
    def by_convention(self) -> dict[str, _Number]:
        """Those that have a name in OpenTelemetry's."""
        return {
            "gen_ai.request.temperature": self.temperature,
            "gen_ai.request.top_p": self.top_p,
            "gen_ai.request.top_k": self.top_k,
            "gen_ai.request.max_tokens": self.max_tokens or self.max_completion_tokens or self.max_output_tokens,
            "gen_ai.request.choice.count": self.n,
            "gen_ai.request.seed": self.seed,
            "gen_ai.request.frequency_penalty": self.frequency_penalty,
            "gen_ai.request.presence_penalty": self.presence_penalty,
        }


def headers_of(context: SpanContext) -> str:
    """Lines of a request by which whoever gets it continues a span's trace, as W3C has them."""
    line = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}\r\n"
    return f"{line}tracestate: {state}\r\n" if (state := context.trace_state.to_header()) else line


def ids_of(context: SpanContext) -> tuple[str, str]:
    """A span's names in hexadecimal."""
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


class Unsampled(Untraced):
    """That of a request whose trace is not kept: engines are told, or they would begin one of their own."""

    def __init__(self, context: SpanContext) -> None:
        self.header = headers_of(context)
        self.ids = ids_of(context)


class Traced:
    """That of a request whose trace is kept."""

    def __init__(self, tracer: Tracer, span: Span, path: str, *, prompts: bool) -> None:
        self._tracer = tracer
        self._span = span
        self._within: Context = set_span_in_context(span)
        self._operation = OPERATIONS.get(path)
        self._answer = Answer() if prompts and self._operation else None
        self._waits_since: int | None = None
        self._attempts = 0
        self.header = headers_of(span.get_span_context())
        self.ids: tuple[str, str] | None = ids_of(span.get_span_context())

    def overhears(self, send: "Send") -> "Send":
        """See `Trace.overhears`."""
        answer = self._answer
        if answer is None:
            return send

        async def overheard(message: "Message") -> None:
            if message["type"] == "http.response.body":
                answer.take(message.get("body", b""))
            await send(message)

        return overheard

    def asked(self, call: "Call", body: bytes, tier: str) -> None:
        """See `Trace.asked`."""
        if self._operation is None:
            return
        self._span.update_name(f"{self._operation} {tier}")
        set_all(self._span, {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": call.model,
            "gen_ai.request.stream": call.streams,
            "gen_ai.response.model": tier,
            Inference.OPENINFERENCE_SPAN_KIND: OpenInferenceSpanKindValues.LLM.value,
            Inference.LLM_MODEL_NAME: tier,
            Inference.LLM_PROVIDER: PROVIDER,
        })  # fmt: skip
        try:
            parameters = msgspec.json.decode(body, type=_Parameters)
        except (msgspec.DecodeError, RecursionError):
            pass  # not what they must be, which the engine will say
        else:
            set_all(self._span, parameters.by_convention)
            given = {name: value for name, value in msgspec.to_builtins(parameters).items() if value is not None}
            self._span.set_attribute(Inference.LLM_INVOCATION_PARAMETERS, json.dumps(given))
        if self._answer is not None:
            self._span.set_attributes(question(body))

    def waits(self) -> None:
        """See `Trace.waits`."""
        self._waits_since = time.time_ns()

    def admitted(self) -> None:
        """See `Trace.admitted`."""
        since, self._waits_since = self._waits_since, None
        now = time.time_ns()
        if since is not None and now - since >= WORTH_A_SPAN_NS:
            self._tracer.start_span("queue", context=self._within, start_time=since).end(now)

    def attempt(self, replica: "Replica", path: str) -> AbstractContextManager[None]:
        """See `Trace.attempt`."""
        return self._attempt(replica.name, replica.engine.url, path)

    @contextmanager
    def _attempt(self, replica: str, engine: str, path: str) -> Iterator[None]:
        attributes = {"http.request.method": "POST", "assay.replica": replica} | _asked_at(engine, path)
        if self._attempts:
            attributes["http.request.resend_count"] = self._attempts
        self._attempts += 1
        span = self._tracer.start_span("POST", self._within, SpanKind.CLIENT, attributes)
        self.header = headers_of(span.get_span_context())
        self._span.set_attribute("assay.replica", replica)
        try:
            yield
        except asyncio.CancelledError:
            raise  # its caller has left, or its time is over: no failure of this exchange, and said above it
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)  # what it says may be a caller's
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def end(self, reply: "Reply") -> None:
        """See `Trace.end`."""
        self.admitted()  # if it still waits
        record = reply.record
        said = {FROM_HEADERS[name]: value.decode() for name, value in reply.headers if name in FROM_HEADERS}
        # Conventions call it an error of a server's when it is one of its own, and not when it refuses a caller's.
        has_failed = record.has_failed or (reply.status or 0) >= 500 or not (reply.status or record.has_left)
        set_all(self._span, said | {
            "http.response.status_code": reply.status,
            "error.type": record.code if has_failed else None,
            "assay.error": record.code,
            "assay.request_id": record.request_id,
            "assay.key": record.key,
        })  # fmt: skip
        if usage := record.usage:
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt,
                    "gen_ai.usage.output_tokens": usage.answer,
                    "gen_ai.usage.cache_read.input_tokens": usage.cached,
                    Inference.LLM_TOKEN_COUNT_PROMPT: usage.prompt,
                    Inference.LLM_TOKEN_COUNT_COMPLETION: usage.answer,
                    Inference.LLM_TOKEN_COUNT_TOTAL: usage.prompt + usage.answer,
                    Inference.LLM_TOKEN_COUNT_PROMPT_DETAILS_CACHE_READ: usage.cached,
                }
            )
        if record.first_token is not None:
            self._first_token(record.first_token - reply.request_began)
        if self._answer is not None:
            self._span.set_attributes(self._answer.attributes)
        if has_failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _first_token(self, after_s: float) -> None:
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", after_s)
        self._span.add_event("first_token", timestamp=(self._span.start_time or 0) + int(after_s * 1e9))


def _asked_at(engine: str, path: str) -> dict[str, Any]:
    """Where a request to an engine goes, as the conventions for HTTP ask of a client."""
    url = urlsplit(engine)
    port = url.port or (443 if url.scheme == "https" else 80)
    return {"server.address": url.hostname or "", "server.port": port, "url.full": f"{engine.rstrip('/')}{path}"}


def begun(method: str, path: str) -> dict[str, str]:
    """What of a request is known at its head; its path is one of ours."""
    return {
        "http.request.method": known_method(method),
        "http.route": path,
        "url.path": path,
        "url.scheme": "http",
    }


def set_all(span: Span, attributes: dict[str, Any]) -> None:
    """Those that are something."""
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
