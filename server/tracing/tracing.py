"""Begins the trace of each request, and sends them all to a collector; one that is down costs nobody anything."""

import asyncio
import importlib.metadata
import logging
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.exchange import Headers, Scope
from server.tracing.otel import Traced, Unsampled, begun
from server.tracing.settings import TracingConfig
from server.tracing.trace import Trace

log = logging.getLogger("assay.tracing")

FLUSH_S = 5.0
"""How long what is left may take to be sent when the server stops."""
POLL_S = 0.02
TALKATIVE = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
"""Loggers that would say at each batch, and at each span, what is said here once."""


class Deliveries(SpanExporter):
    """Says once that spans cannot be delivered, and once that they are again."""

    def __init__(self, exporter: SpanExporter, where: str) -> None:
        self._exporter = exporter
        self._where = where
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them, or let them be lost."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                log.warning("traces cannot be delivered to %s, and are lost until they can be", self._where)
            self._lost += len(spans)
        elif self._lost:
            log.warning("traces are delivered to %s again; at least %d spans were lost", self._where, self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._exporter.shutdown()


class Tracing:
    """The traces of one gateway. Spans wait in memory, at most 2048, and are sent in batches by a thread."""

    def __init__(self, settings: TracingConfig) -> None:
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._prompts = settings.prompts
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample)),
            resource=_resource(),
            shutdown_on_exit=False,  # which waits for as long as a collector does not answer
        )
        exporter = Deliveries(OTLPSpanExporter(endpoint=settings.traces_url), settings.traces_url)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("assay", importlib.metadata.version("assay"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope) -> Trace:
        """The trace of a request to one of our paths: its caller's, if there is one, and as that has decided."""
        path: str = scope["path"]
        span = self._tracer.start_span(
            f"POST {path}",
            context=self._propagator.extract(_carried(scope["headers"])),
            kind=SpanKind.SERVER,
            attributes=begun(scope["method"], path),
        )
        if not isinstance(span, Span) or not span.is_recording():
            return Unsampled(span.get_span_context())
        return Traced(self._tracer, span, path, prompts=self._prompts)

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        # A daemon, and no executor's: nothing waits for it at the end of the process.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        until = asyncio.get_running_loop().time() + FLUSH_S
        while ending.is_alive() and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(POLL_S)


def _carried(headers: Headers) -> dict[str, str]:
    """A caller's trace context; two of them are none, as W3C has it."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return {}
    states = [value for name, value in headers if name == b"tracestate"]
    carried = {"traceparent": parents[0].decode("latin-1")}
    return carried | {"tracestate": b",".join(states).decode("latin-1")} if states else carried


def _resource() -> Resource:
    """Who sends the spans; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    ours = Resource.create(
        {
            "service.name": "assay-gateway",
            "service.version": importlib.metadata.version("assay"),
        }
    )
    return ours.merge(OTELResourceDetector().detect())
