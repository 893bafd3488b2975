"""A collector of traces: a real OTLP/HTTP receiver, in a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Span:
    """One span as it arrived."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent: str
    attributes: dict[str, Any]
    events: dict[str, float]
    """Seconds after the span's start, by name."""
    failed: bool
    seconds: float
    resource: dict[str, Any]


@dataclass
class Collector:
    """What has arrived."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    status: int = 200
    """What it answers."""

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def only(self, name: str) -> Span:
        found = self.named(name)
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    def children(self, span: Span, name: str = "") -> list[Span]:
        return [each for each in self.spans if each.parent == span.span_id and name in ("", each.name)]

    def wait_for(self, wanted: Callable[[Span], bool], seconds: float = 30) -> Span:
        """The first such span, once it has come."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for span in tuple(self.spans):
                if wanted(span):
                    return span
            time.sleep(0.05)
        raise AssertionError(f"no such span within {seconds} s among {[span.name for span in self.spans]}")

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return web.Response(status=self.status)
        assert request.path == "/v1/traces"
        assert request.content_type == "application/x-protobuf"
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _read(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_span(span, resource) for span in scope.spans]
        return web.Response()


def _span(span: Sent, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        kind=Sent.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes=_read(span.attributes),
        events={each.name: (each.time_unix_nano - span.start_time_unix_nano) / 1e9 for each in span.events},
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        resource=resource,
    )


def _read(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector on loopback, for the block."""
    collector, loop, is_up = Collector(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/{path:.*}", collector._take)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        is_up.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert is_up.wait(10)
    try:
        yield collector
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
