"""What the metrics hear of requests: a tier's instruments, found once, and the course of one request."""

import time
from functools import cached_property
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from server.answer import Usage
from server.call import Call
from server.conventions import PROVIDER
from server.errors import Refusal
from server.exchange import Reply
from server.record import CLIENT_CLOSED_REQUEST, CLIENT_LEFT, code_of

if TYPE_CHECKING:
    from server.metrics import Metrics

NO_TIER = "none"
INTERNAL_ERROR = "internal_error"
"""What it ended with if nobody knows better."""


class Meter:
    """The instruments of one tier, found once and not at every request."""

    def __init__(self, metrics: "Metrics", tier: str) -> None:
        self._metrics = metrics
        self._tier = tier
        self._requests: dict[tuple[str, str], Counter] = {}
        self._operations: dict[str, OperationMeter] = {}

    def answered(self, status: str, code: str) -> None:
        """A request has ended so; ``code`` is its error's, or empty."""
        counter = self._requests.get((status, code))
        if counter is None:
            counter = self._requests[status, code] = self._metrics.requests.labels(self._tier, status, code)
        counter.inc()

    def operation(self, name: str) -> "OperationMeter":
        """Those of requests for text of one kind."""
        meter = self._operations.get(name)
        if meter is None:
            meter = self._operations[name] = OperationMeter(self._metrics, self._tier, name)
        return meter


class OperationMeter:
    """The conventions' instruments of one operation on one tier."""

    def __init__(self, metrics: "Metrics", tier: str, operation: str) -> None:
        self._metrics = metrics
        self._tier = tier
        self._labels = (operation, PROVIDER, tier)
        self._durations: dict[str, Histogram] = {}

    @cached_property
    def first_token(self) -> Histogram:
        """Seconds until a stream's first."""
        return self._metrics.first_token.labels(*self._labels)

    @cached_property
    def per_token(self) -> Histogram:
        """Seconds between a stream's tokens, on average."""
        return self._metrics.per_token.labels(*self._labels)

    @cached_property
    def _tokens(self) -> tuple[Histogram, Histogram, Counter]:
        read, written = (self._metrics.tokens.labels(*self._labels, kind) for kind in ("input", "output"))
        return read, written, self._metrics.cached.labels(self._tier)

    def ended(self, code: str, seconds: float) -> None:
        """A request has ended, after so long, with this error or without."""
        duration = self._durations.get(code)
        if duration is None:
            duration = self._durations[code] = self._metrics.duration.labels(*self._labels, code)
        duration.observe(seconds)

    def used(self, usage: Usage) -> None:
        """An engine has counted so many tokens."""
        read, written, cached = self._tokens
        read.observe(usage.prompt)
        written.observe(usage.answer)
        cached.inc(usage.cached)


class Course:
    """One request: what is noted of it while it goes on, and told once it is over.

    Nothing is done for a single token: time between tokens is the mean over a stream, as OpenTelemetry's
    conventions have it. Engines keep the time before every token themselves (`vllm:inter_token_latency_seconds`).
    """

    __slots__ = (
        *("_code", "_first_token", "_metrics", "_operation", "_reply", "_status", "_usage"),
        *("choices", "streams", "tier"),
    )

    def __init__(self, metrics: "Metrics", operation: str | None, reply: Reply) -> None:
        self._metrics = metrics
        self._operation = operation
        self._reply = reply
        self._code = ""
        self._status: int | None = None
        self._first_token: float | None = None
        self.tier: str = NO_TIER
        """Once it is known."""
        self.streams = False
        self.choices = 1
        self._usage: Usage | None = None

    def found(self, call: Call, tier: str) -> None:
        """It is for this tier."""
        self.tier = self._reply.record.tier = tier
        self.streams, self.choices = call.streams, call.choices

    def used(self, usage: Usage | None) -> None:
        """The engine has counted so many tokens, if it came so far."""
        self._usage = self._reply.record.usage = usage

    def refused(self, refusal: Refusal) -> None:
        """It ends with this error, which is still to be sent."""
        self._reply.record.refused(refusal)
        self._code, self._status = code_of(refusal), refusal.status
        self._first_token = self._reply.body_began  # before the error's own event begins a body

    def left(self) -> None:
        """Its caller has."""
        self._reply.record.left()
        self._code, self._status = CLIENT_LEFT, CLIENT_CLOSED_REQUEST
        self._first_token = self._reply.body_began
        self._metrics.left.labels(self.tier).inc()

    def tell(self) -> None:
        """It is over."""
        now, reply = time.monotonic(), self._reply
        meter = self._metrics.of(self.tier)
        code = self._code or ("" if reply.has_ended else INTERNAL_ERROR)
        left = CLIENT_CLOSED_REQUEST if code == CLIENT_LEFT else None
        meter.answered(str(left or reply.status or self._status or 500), code)
        if self._operation is None or self.tier == NO_TIER:
            return
        operation = meter.operation(self._operation)
        operation.ended(code, now - reply.request_began)
        if self._usage is not None:
            operation.used(self._usage)
        if self.streams and reply.status == 200:
            reply.record.first_token = first_token = self._first_token if code else reply.body_began
            self._tell_pace(operation, now, first_token, code)

    def _tell_pace(self, operation: OperationMeter, now: float, first_token: float | None, code: str) -> None:
        if first_token is None:
            return
        operation.first_token.observe(first_token - self._reply.request_began)
        if not code and self._usage is not None:
            after_first = self._usage.answer / self.choices - 1
            if after_first > 0:
                operation.per_token.observe((now - first_token) / after_first)
