"""Traces of requests, as a real OTLP/HTTP receiver gets them from a gateway in front of a fake engine."""

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.config import Config
from server.config_file import load_config
from server.keys import KeyFile
from server.tracing import tracing
from server.tracing.words import MOST
from tests.collector import Collector, collecting
from tests.conftest import ROOT
from tests.server.conftest import Answer, Gateway, fake_replica, running_gateway
from tests.server.test_forward import CHUNK, DONE, streams
from tests.server.test_metrics import stream
from tiers.errors import ConfigError

MODEL = "SmolLM2-135M-Instruct"
TIER = f"{MODEL}-Reference"
SPAN = f"chat {TIER}"
TRACE_ID, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
USAGE = {"prompt_tokens": 11, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
LAST = f'data: {{"choices":[],"usage":{json.dumps(USAGE)}}}\n\n'.encode()
CUT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def parent(*, sampled: bool) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE_ID}-{PARENT}-0{int(sampled)}"}


async def whole(request: web.Request) -> web.StreamResponse:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
    return web.json_response({"id": "x", "choices": [choice], "usage": USAGE})


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@asynccontextmanager
async def traced(folder: Path, collector: Collector, **fields: Any) -> AsyncIterator[Gateway]:
    """A gateway that traces; what it has to send is there after the block."""
    config = {"endpoint": collector.url} | fields.pop("tracing", {})
    async with running_gateway(folder, tracing=config, **fields) as gateway:
        gateway.handler = whole
        yield gateway
        await gateway.app.close()


async def ask(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return await gateway.post(json.dumps(CUT | fields).encode(), headers=headers)


def sent_to_engine(gateway: Gateway) -> tuple[str, str, bool]:
    """The trace and the span that the engine was told, and whether they are kept."""
    version, trace_id, span_id, flags = gateway.seen[0].headers["traceparent"].split("-")
    assert version == "00"
    return trace_id, span_id, bool(int(flags, 16) & 1)


async def test_a_whole_answer_is_a_span_by_the_names_of_gen_ai_and_of_http(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector) as gateway:
        answer = await ask(gateway, {"x-request-id": "mine"}, temperature=0.5, max_tokens=9)
    span = collector.only(SPAN)
    assert (span.kind, span.parent, span.failed) == ("SERVER", "", False)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "assay",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": TIER,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "assay.request_id": "mine",
        "assay.replica": TIER,
        "openinference.span.kind": "LLM",
        "llm.model_name": TIER,
        "llm.token_count.prompt": 11,
        "llm.token_count.completion": 4,
        "llm.token_count.total": 15,
    }
    assert {name: span.attributes.get(name) for name in expected} == expected
    for name in ("tier", "precision", "checkpoint", "certificate"):
        assert span.attributes[f"assay.{name}"] == answer.headers[f"x-assay-{name}"]
    assert json.loads(span.attributes["llm.invocation_parameters"]) == {"temperature": 0.5, "max_tokens": 9}
    assert "error.type" not in span.attributes
    assert span.resource["service.name"] == "assay-gateway"


async def test_the_engine_continues_the_span_of_the_try_it_was_asked_in(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector) as gateway:
        await ask(gateway)
    span = collector.only(SPAN)
    (attempt,) = collector.children(span, "POST")
    assert sent_to_engine(gateway) == (span.trace_id, attempt.span_id, True)
    assert (attempt.name, attempt.kind, attempt.failed) == ("POST", "CLIENT", False)
    url = gateway.replica.url
    assert (attempt.attributes["server.address"], attempt.attributes["server.port"]) == (
        "127.0.0.1",
        int(url.rpartition(":")[2]),
    )
    assert attempt.attributes["url.full"] == f"{url}/v1/chat/completions"


async def test_a_stream_says_when_its_first_token_came(tmp_path: Path, collector: Collector) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.1)
        handler: Any = streams(CHUNK, CHUNK, LAST + DONE)
        answer: web.StreamResponse = await handler(request)
        return answer

    async with traced(tmp_path, collector) as gateway:
        gateway.handler = slow
        await ask(gateway, stream=True)
    span = collector.only(SPAN)
    assert 0.1 <= span.events["first_token"] < span.seconds
    assert span.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(span.events["first_token"])
    assert (span.attributes["gen_ai.request.stream"], span.attributes["gen_ai.usage.output_tokens"]) == (True, 4)


async def test_a_stream_of_heartbeats_alone_has_no_first_token(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector, heartbeat_s=0.05, first_token_timeout_s=0.15) as gateway:
        gateway.handler = stream(2.0)
        await ask(gateway, stream=True)
    span = collector.only(SPAN)
    assert (span.failed, span.attributes["error.type"]) == (True, "first_token_timeout")
    assert "first_token" not in span.events
    assert "gen_ai.response.time_to_first_chunk" not in span.attributes


async def test_a_caller_who_leaves_is_nobodys_error(tmp_path: Path, collector: Collector) -> None:
    leaves = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        leaves.set()
        return await stream(2.0)(request)

    async with traced(tmp_path, collector) as gateway:
        gateway.handler = slow
        await gateway.post(json.dumps(CUT).encode(), leave_after=leaves)
    span = collector.only(SPAN)
    (attempt,) = collector.children(span, "POST")
    assert (span.failed, attempt.failed) == (False, False)
    assert span.attributes["assay.error"] == "client_left"
    assert "error.type" not in span.attributes.keys() | attempt.attributes.keys()


async def test_a_request_that_is_refused_is_a_span_with_its_error_and_no_fault_of_ours(
    tmp_path: Path, collector: Collector
) -> None:
    async def refuses(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no", "code": 422}}, status=422)

    async with traced(tmp_path, collector) as gateway:
        await gateway.post(b'{"model":"unheard-of"}')
        await ask(gateway, n=0)
        await gateway.post(method="BREW")
        gateway.handler = refuses
        await ask(gateway)
    found = [
        (span.name, span.attributes["assay.error"], span.attributes["http.response.status_code"], span.failed)
        for span in collector.spans
        if span.kind == "SERVER"
    ]
    nameless = "POST /v1/chat/completions"
    assert found == [
        (nameless, "model_not_found", 404, False),
        (nameless, "invalid_value", 400, False),
        (nameless, "method_not_allowed", 405, False),
        (SPAN, "invalid_request_error", 422, False),
    ]
    assert not any("error.type" in span.attributes for span in collector.spans if span.kind == "SERVER")
    assert collector.spans[2].attributes["http.request.method"] == "_OTHER"


async def test_a_span_names_whose_key_it_was_and_one_without_a_key_is_a_span_too(
    tmp_path: Path, collector: Collector
) -> None:
    secret = KeyFile(tmp_path / "keys.json").add("alice")
    async with traced(tmp_path, collector) as gateway:
        await ask(gateway, {"authorization": f"Bearer {secret}"})
        await ask(gateway)
    assert collector.only(SPAN).attributes["assay.key"] == "alice"
    assert collector.only("POST /v1/chat/completions").attributes["http.response.status_code"] == 401
    assert secret.encode() not in b"".join(collector.bodies)


async def test_a_stream_that_breaks_off_has_failed(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as gateway:
        gateway.handler = streams(CHUNK, CHUNK[:9], then_cut=True)  # type: ignore[assignment]
        await ask(gateway, stream=True)
    span = collector.only(SPAN)
    (attempt,) = collector.children(span, "POST")
    assert (span.failed, span.attributes["error.type"]) == (True, "engine_failed")
    assert span.attributes["http.response.status_code"] == 200, "which was sent before"
    assert (attempt.failed, attempt.attributes["error.type"]) == (True, "UpstreamBroke")


async def test_each_try_at_a_replica_is_a_span_of_its_own(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as gateway:
        assert gateway.pool is not None
        second = fake_replica(Config(home=tmp_path), gateway.metrics, 2, 2)
        second.connect(gateway.replica.url)
        gateway.replica.connect("http://127.0.0.1:1")
        gateway.pool.add(second)
        assert (await ask(gateway)).status == 200
        await second.stop()
    span = collector.only(SPAN)
    first, again = sorted(collector.children(span, "POST"), key=lambda each: each.failed, reverse=True)
    assert (first.failed, again.failed, span.failed) == (True, False, False)
    assert "http.request.resend_count" not in first.attributes
    assert again.attributes["http.request.resend_count"] == 1
    assert span.attributes["assay.replica"] == again.attributes["assay.replica"] == f"{TIER} (2 of 2)"
    assert sent_to_engine(gateway)[1] == again.span_id


async def test_the_wait_for_a_place_is_a_span(tmp_path: Path, collector: Collector) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.1)
        return await whole(request)

    async with traced(tmp_path, collector) as gateway:
        gateway.handler = slow
        await asyncio.gather(*(ask(gateway) for _ in range(3)))  # its engine takes two at once
    (wait,) = (span for span in collector.named("queue") if span.seconds >= 0.05)
    assert wait.parent in {span.span_id for span in collector.named(SPAN)}


async def test_a_caller_who_leaves_the_queue_leaves_a_span_of_both(tmp_path: Path, collector: Collector) -> None:
    leaves, goes_on = asyncio.Event(), asyncio.Event()

    async def held(request: web.Request) -> web.StreamResponse:
        await goes_on.wait()
        return await whole(request)

    async with traced(tmp_path, collector) as gateway:
        gateway.handler = held
        busy = [asyncio.create_task(ask(gateway)) for _ in range(2)]
        while len(gateway.seen) < 2:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(gateway.post(json.dumps(CUT).encode(), leave_after=leaves))
        while not gateway.metric("assay_requests_waiting"):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        leaves.set()
        await waiting
        goes_on.set()
        await asyncio.gather(*busy)
    (left,) = (span for span in collector.named(SPAN) if "assay.error" in span.attributes)
    assert (left.attributes["assay.error"], left.parent) == ("client_left", "")
    assert len(collector.children(left, "queue")) == len(collector.children(left)) == 1


async def test_a_callers_trace_is_continued(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as gateway:
        await ask(gateway, parent(sampled=True) | {"tracestate": "rojo=00f067aa0ba902b7"})
    span = collector.only(SPAN)
    assert (span.trace_id, span.parent) == (TRACE_ID, PARENT)
    assert sent_to_engine(gateway)[0] == TRACE_ID
    assert gateway.seen[0].headers["tracestate"] == "rojo=00f067aa0ba902b7"


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("sampled", [False, True])
async def test_a_caller_decides_whether_its_trace_is_kept(
    tmp_path: Path, collector: Collector, sample: int, sampled: bool
) -> None:
    async with traced(tmp_path, collector, tracing={"sample": sample}) as gateway:
        await ask(gateway, parent(sampled=sampled))
    assert bool(collector.spans) is sampled
    trace_id, span_id, is_kept = sent_to_engine(gateway)
    assert (trace_id, is_kept) == (TRACE_ID, sampled), "so that the engine decides alike"
    assert span_id != PARENT


@pytest.mark.parametrize("sent", ["nonsense", "00-0-0-00", f"ff-{TRACE_ID}-{PARENT}-01", "00-\xe4"])
async def test_a_traceparent_that_is_none_begins_a_new_trace(
    tmp_path: Path, collector: Collector, sent: str
) -> None:
    async with traced(tmp_path, collector) as gateway:
        assert (await ask(gateway, {"traceparent": sent})).status == 200
    assert collector.only(SPAN).parent == ""
    assert collector.only(SPAN).trace_id != TRACE_ID


async def test_of_what_no_caller_has_decided_a_share_is_kept(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector, tracing={"sample": 0}) as gateway:
        await ask(gateway)
    assert collector.spans == []
    assert not sent_to_engine(gateway)[2]


MARK = "mark-3f9a"
MARKED: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": f"{MARK} system"},
        {"role": "user", "content": [{"type": "text", "text": f"{MARK} user"}], "name": MARK},
    ],
    "stop": [f"{MARK} stop"],
    "user": MARK,
    "metadata": {MARK: MARK},
    "tools": [{"type": "function", "function": {"name": MARK, "description": MARK, "parameters": {}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": MARK, "schema": {"const": MARK}}},
    "temperature": MARK,
    MARK: MARK,
}
SAYS = f'data: {{"choices":[{{"index":0,"delta":{{"content":"{MARK} says"}}}}]}}\n\n'.encode()


async def say_all(gateway: Gateway) -> None:
    """What a caller can say, and an engine, wherever it can be said."""
    headers = {"user-agent": MARK, "cookie": MARK, "openai-organization": MARK, "baggage": f"a={MARK}"}

    async def echoes(request: web.Request) -> web.StreamResponse:
        message = {"role": "assistant", "content": f"{MARK} says"}
        return web.json_response({"id": MARK, "choices": [{"index": 0, "message": message}], "usage": USAGE})

    async def refuses(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": MARK, "param": MARK, "code": 400}}, status=400)

    async def fails(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": MARK, "param": MARK, "code": 500}}, status=500)

    cut = streams(SAYS, SAYS[:20], then_cut=True)
    for handler in (echoes, refuses, fails, cut, streams(SAYS, LAST + DONE)):
        gateway.handler = handler  # type: ignore[assignment]
        await ask(gateway, headers, **MARKED, stream=handler not in (echoes, refuses, fails))
        await ask(gateway, headers, **(MARKED | {"temperature": 1}))
    gateway.handler = echoes
    for path, body in {
        "/v1/completions": {"prompt": MARK, "suffix": MARK},
        "/v1/responses": {"input": MARK, "instructions": MARK},
        "/tokenize": {"prompt": MARK},
    }.items():
        await gateway.post(json.dumps({"model": MODEL} | body).encode(), path=path, headers=headers)
    await gateway.post(json.dumps({"model": MARK}).encode(), headers=headers)
    await gateway.post(f'{{"model":"{MODEL}", {MARK}'.encode(), headers=headers)
    await gateway.post(headers={"authorization": f"Bearer sk-{MARK}"} | headers)
    await gateway.post(method=MARK, headers=headers)
    await gateway.post(path=f"/{MARK}", method="GET", headers=headers)


async def test_no_word_of_a_callers_or_of_an_answers_is_in_a_trace(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as gateway:
        await say_all(gateway)
    assert len(collector.named(SPAN)) >= 10
    assert MARK.encode() not in b"".join(collector.bodies)


async def test_with_prompts_a_trace_has_what_was_asked_and_answered(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector, tracing={"prompts": True}) as gateway:
        await say_all(gateway)
    first, *_, stream = collector.named(SPAN)
    assert first.attributes["llm.input_messages.0.message.role"] == "system"
    assert first.attributes["llm.input_messages.0.message.content"] == f"{MARK} system"
    assert first.attributes["llm.input_messages.1.message.content"] == f"{MARK} user"
    assert json.loads(first.attributes["input.value"])["stop"] == [f"{MARK} stop"]
    for span in (first, stream):
        assert span.attributes["output.value"] == f"{MARK} says"
        assert span.attributes["llm.output_messages.0.message.content"] == f"{MARK} says"


async def test_a_stream_of_a_response_is_gathered_too(tmp_path: Path, collector: Collector) -> None:
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"ab"}\n\n'
    end = b'event: response.completed\ndata: {"response":{"status":"completed","output":[]}}\n\n'
    async with traced(tmp_path, collector, tracing={"prompts": True}) as gateway:
        gateway.handler = streams(delta, delta, end)  # type: ignore[assignment]
        asked = {"model": MODEL, "input": "Why?", "instructions": "Be short.", "stream": True}
        await gateway.post(json.dumps(asked).encode(), path="/v1/responses")
    attributes = collector.only(SPAN).attributes
    assert attributes["output.value"] == "abab"
    messages = [attributes[f"llm.input_messages.{number}.message.content"] for number in (0, 1)]
    assert messages == ["Be short.", "Why?"]


async def test_what_a_span_keeps_of_words_is_bounded(tmp_path: Path, collector: Collector) -> None:
    says = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"a" * 5000 + b'"}}]}\n\n'
    async with traced(tmp_path, collector, tracing={"prompts": True}) as gateway:
        gateway.handler = streams(*[says] * 5, LAST + DONE)  # type: ignore[assignment]
        many = [{"role": "user", "content": "b" * 3000}] * 300
        answer = await ask(gateway, messages=many, stream=True)
    assert answer.body.count(b"a" * 5000) == 5
    attributes = collector.only(SPAN).attributes
    assert len(attributes["output.value"]) == len(attributes["input.value"]) == MOST
    kept = [value for name, value in attributes.items() if name.startswith("llm.input_messages")]
    assert sum(len(value) for value in kept) < MOST + 100


@pytest.mark.parametrize("odd", ['"seed":' + "9" * 40, '"max_tokens":1e400', '"x":"\\ud800"', '"n":"two"'])
async def test_what_cannot_be_written_down_takes_no_other_span_with_it(
    tmp_path: Path, collector: Collector, odd: str
) -> None:
    async with traced(tmp_path, collector, tracing={"prompts": True}) as gateway:
        await gateway.post(f'{{"model":"{MODEL}", {odd}}}'.encode())
        await ask(gateway)
    assert len(collector.named(SPAN)) >= 1
    assert len([span for span in collector.spans if span.kind == "SERVER"]) == 2


async def test_what_orchestrators_ask_is_not_traced(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as gateway:
        for path in ("/healthz", "/metrics", "/v1/models", "/nowhere"):
            await gateway.post(method="GET", path=path)
    assert collector.spans == []


async def test_opentelemetrys_own_variables_mean_what_they_mean(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llama-eu")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=seven")
    async with traced(tmp_path, collector) as gateway:
        await ask(gateway)
    resource = collector.only(SPAN).resource
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("llama-eu", "test")
    assert collector.headers[0]["x-tenant"] == "seven"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        line.message for line in caplog.records if line.name != "assay.gate" and line.levelno >= logging.WARNING
    ]


async def test_a_collector_that_is_down_breaks_nothing_and_is_said_once(
    tmp_path: Path, collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector.status = 400
    async with traced(tmp_path, collector) as gateway:
        for _ in range(3):
            assert (await ask(gateway)).status == 200
            await asyncio.sleep(0.06)
        assert len(collector.bodies) >= 2, "batches, each refused"
        (said,) = warnings_of(caplog)
        assert said == f"traces cannot be delivered to {collector.url}/v1/traces, and are lost until they can be"
        collector.status = 200
        await ask(gateway)
    assert warnings_of(caplog)[1].endswith("spans were lost")
    assert collector.spans


async def test_a_stop_does_not_wait_for_a_collector_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.2)
    async with running_gateway(tmp_path, tracing={"endpoint": "http://127.0.0.1:1"}) as gateway:
        gateway.handler = whole
        assert (await ask(gateway)).status == 200
        began = time.monotonic()
        await gateway.app.close()
        assert time.monotonic() - began < 4, "and not the ten seconds that a batch may take"


@pytest.mark.program
def test_without_tracing_opentelemetrys_sdk_is_not_even_imported() -> None:
    program = (
        "import sys, server.serve, server.cli;"
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter', 'openinference', 'server.tracing.otel');"
        "print([name for name in sys.modules if name.startswith(parts)])"  # its interface FastAPI may import
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


async def test_without_tracing_the_engine_is_told_nothing(gateway: Gateway) -> None:
    gateway.handler = whole
    await ask(gateway, parent(sampled=True))
    assert "traceparent" not in gateway.seen[0].headers


@pytest.mark.parametrize(
    ("endpoint", "sentence"),
    [
        ("collector:4317", "must be an http or https address"),
        ("http://collector:4318?a=b", "must be an http or https address"),
        ("https://user:secret@collector", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(tmp_path: Path, endpoint: str, sentence: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"tracing: {{endpoint: '{endpoint}'}}")
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(file)
    assert "secret" not in str(refused.value)


def test_an_endpoint_is_the_base_of_its_path(tmp_path: Path) -> None:
    for endpoint in ("http://collector:4318", "http://collector:4318/", "http://collector:4318/v1/traces"):
        file = tmp_path / "config.yaml"
        file.write_text(f"tracing: {{endpoint: '{endpoint}'}}")
        configured = load_config(file).tracing
        assert configured is not None
        assert configured.traces_url == "http://collector:4318/v1/traces"
