"""What the metrics say of requests, by OpenTelemetry's names where it has them."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from server import series
from server.engines.state import State
from server.metrics import EXPECTED, Metrics
from tests.server.conftest import Gateway, Handler, running_gateway

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b'{"model":"SmolLM2-135M-Instruct","messages":[{"role":"user","content":"Hi"}],"stream":true}'
DURATION = "gen_ai_server_request_duration_seconds_count"
FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds_count"
PER_TOKEN = "gen_ai_server_time_per_output_token_seconds"
SEMCONV = {
    series.DURATION: gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION + ".seconds",
    series.FIRST_TOKEN: gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN + ".seconds",
    series.PER_TOKEN: gen_ai_metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN + ".seconds",
    series.TOKENS: gen_ai_metrics.GEN_AI_CLIENT_TOKEN_USAGE,  # whose unit, {token}, is not said
}
ADVISED = {
    series.DURATION: (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    series.FIRST_TOKEN: (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    series.PER_TOKEN: (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    series.TOKENS: tuple(4**power for power in range(14)),
}
"""What the conventions advise (their gen-ai-metrics.md)."""


def usage_event(answer: int, prompt: int = 7) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": {"cached_tokens": 4}}
    return b"data: " + json.dumps({"choices": [], "usage": usage}, separators=(",", ":")).encode() + b"\n\n"


def stream(*parts: bytes | float) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                await response.write(part)
        return response

    return handler


def count(gateway: Gateway, status: str, code: str = "", tier: str | None = None) -> float | None:
    labels = {"tier": tier or gateway.replica.tier.name, "status": status, "code": code}
    return gateway.metrics.registry.get_sample_value("assay_requests_total", labels)


@pytest.mark.parametrize("spread", SEMCONV, ids=lambda spread: spread.name)
def test_opentelemetrys_metrics_have_its_names_labels_and_boundaries(spread: series.Spread) -> None:
    assert spread.name == SEMCONV[spread].replace(".", "_")
    assert set(ADVISED[spread]) <= set(spread.bounds)
    attributes = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    known = {each.replace(".", "_") for each in (*attributes, error_attributes.ERROR_TYPE)}
    assert set(spread.labels) <= known


def test_whatever_opentelemetry_names_is_called_so() -> None:
    assert {each.name for each in series.SERIES if each.name.startswith("gen_ai")} == {
        each.name for each in SEMCONV
    }
    operations = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
    assert {"chat", "text_completion"} <= operations


def test_everything_that_is_registered_is_in_the_table() -> None:
    metrics = Metrics()
    exposed = {family.name for family in metrics.registry.collect()}
    assert exposed == {each.name for each in series.SERIES}
    histograms = [each for each in vars(metrics).values() if isinstance(each, Histogram)]
    assert len(histograms) == sum(isinstance(each, series.Spread) for each in series.SERIES)


async def test_time_per_token_is_what_passed_after_the_first_over_the_tokens_after_it(gateway: Gateway) -> None:
    gateway.handler = stream(0.15, CHUNK, 0.1, CHUNK, CHUNK, usage_event(3), DONE)
    await gateway.post(STREAM)
    assert gateway.told(f"{PER_TOKEN}_count") == 1
    assert 0.05 <= gateway.told(f"{PER_TOKEN}_sum") < 0.12
    assert gateway.told(FIRST_TOKEN) == 1
    assert gateway.told(DURATION, error_type="") == 1
    assert gateway.metric("assay_cached_tokens_total") == 4


async def test_choices_that_are_written_together_take_the_time_of_one(gateway: Gateway) -> None:
    gateway.handler = stream(CHUNK, 0.1, CHUNK, usage_event(4), DONE)
    await gateway.post(STREAM[:-1] + b',"n":2}')
    assert 0.1 <= gateway.told(f"{PER_TOKEN}_sum") < 0.2, "two tokens each: one came after the first"


@pytest.mark.parametrize("answer", [0, 1])
async def test_an_answer_of_one_token_has_no_time_between_tokens(gateway: Gateway, answer: int) -> None:
    gateway.handler = stream(CHUNK, usage_event(answer), DONE)
    await gateway.post(STREAM)
    assert (gateway.told(f"{PER_TOKEN}_count"), gateway.told(FIRST_TOKEN)) == (0, 1)


async def test_an_answer_that_comes_at_once_has_no_first_token_and_no_time_between(gateway: Gateway) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5}

    async def whole(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [], "usage": usage})

    gateway.handler = whole
    await gateway.post(path="/v1/completions", body=b'{"model":"SmolLM2-135M-Instruct","prompt":"Hi"}')
    assert gateway.told(DURATION, "text_completion", error_type="") == 1
    assert (
        gateway.told(FIRST_TOKEN, "text_completion") == gateway.told(f"{PER_TOKEN}_count", "text_completion") == 0
    )
    assert gateway.told("gen_ai_client_token_usage_sum", "text_completion", gen_ai_token_type="output") == 5


async def test_a_stream_that_breaks_is_counted_with_its_error_and_without_a_pace(gateway: Gateway) -> None:
    gateway.handler = stream(CHUNK)
    await gateway.post(STREAM)
    assert gateway.told(DURATION, error_type="engine_failed") == 1
    assert (count(gateway, "200", "engine_failed"), count(gateway, "200")) == (1, 0)
    assert (gateway.told(FIRST_TOKEN), gateway.told(f"{PER_TOKEN}_count")) == (1, 0)


async def test_an_error_after_heartbeats_is_no_first_token(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, heartbeat_s=0.05, first_token_timeout_s=0.2) as gateway:
        gateway.handler = stream(2.0)
        answer = await gateway.post(STREAM)
        assert answer.body.startswith(b": still working")
        assert count(gateway, "200", "first_token_timeout") == 1
        assert gateway.told(FIRST_TOKEN) == 0


async def test_a_caller_who_leaves_is_an_error_type_of_its_own(gateway: Gateway) -> None:
    leave = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        leave.set()
        return await stream(1.0)(request)

    gateway.handler = slow
    await gateway.post(STREAM, leave_after=leave)
    assert gateway.told(DURATION, error_type="client_left") == 1
    assert count(gateway, "499", "client_left") == gateway.metric("assay_clients_left_total") == 1


async def test_texts_that_are_only_tokenized_are_requests_but_no_operation(gateway: Gateway) -> None:
    async def tokens(request: web.Request) -> web.StreamResponse:
        return web.json_response({"tokens": [1], "count": 1})

    gateway.handler = tokens
    await gateway.post(path="/tokenize", body=b'{"model":"SmolLM2-135M-Instruct","prompt":"Hi"}')
    assert count(gateway, "200") == 1
    assert b"gen_ai_server_request_duration_seconds_count{" not in gateway.metrics.exposition()


async def test_what_comes_to_no_tier_is_counted_without_a_word_of_the_caller(gateway: Gateway) -> None:
    await gateway.post(b'{"model":"secret-name"}')
    await gateway.post(b"not json")
    await gateway.post(method="GET")
    assert count(gateway, "405", "method_not_allowed", "none") == 1
    assert count(gateway, "404", "model_not_found", "none") == 1
    assert count(gateway, "400", "invalid_request_error", "none") == 1
    assert b"secret-name" not in gateway.metrics.exposition()


async def test_what_objectives_count_is_shown_before_it_happens(gateway: Gateway) -> None:
    for status, code in EXPECTED:
        assert count(gateway, status, code) == 0, "or the first of them would be no increase"


async def test_places_and_how_many_there_are_are_shown(gateway: Gateway) -> None:
    held = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await held.wait()
        return await stream(CHUNK, usage_event(1), DONE)(request)

    gateway.handler = hold
    assert (gateway.metric("assay_slots"), gateway.metric("assay_slots_taken")) == (2, 0)
    assert gateway.metric("assay_requests_waiting_limit") == 4
    posts = [asyncio.create_task(gateway.post(STREAM)) for _ in range(3)]
    async with asyncio.timeout(5):
        while len(gateway.seen) < 2:
            await asyncio.sleep(0.01)
    assert (gateway.metric("assay_slots_taken"), gateway.metric("assay_requests_waiting")) == (2, 1)
    held.set()
    await asyncio.gather(*posts)
    assert gateway.metric("assay_slots_taken") == 0


async def test_the_build_says_which_engine_runs_once_it_is_known(gateway: Gateway) -> None:
    def builds() -> list[str]:
        return re.findall(
            r'assay_build_info\{version="[\d.]+[^"]*",vllm="(.*)"\} 1.0', gateway.metrics.exposition().decode()
        )

    assert builds() == [""]
    gateway.replica.engine_version = "0.32.0"
    assert builds() == ["0.32.0"]


async def test_a_gate_that_refuses_a_tier_makes_the_server_not_ready(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, gate="enforce") as strict:
        assert strict.replica.state is State.READY
        answer = await strict.post(b"", path="/readyz", method="GET")
        name = strict.replica.tier.name
        assert (answer.status, json.loads(answer.body)) == (
            503,
            {"ready": False, "tiers": {name: "not certified"}},
        )
        assert (strict.metric("assay_tier_ready"), strict.metric("assay_replicas_ready")) == (0, 1)
        strict.replica.state = State.RESTARTING
        answer = await strict.post(b"", path="/readyz", method="GET")
        assert json.loads(answer.body)["tiers"] == {name: "restarting"}


async def test_the_exposition_is_prometheus_own_format(gateway: Gateway) -> None:
    gateway.handler = stream(CHUNK, usage_event(2), DONE)
    await gateway.post(STREAM)
    families = list(text_string_to_metric_families(gateway.metrics.exposition().decode()))
    assert {each.name for each in series.SERIES} <= {family.name for family in families}
