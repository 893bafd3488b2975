"""One request to one engine and back, when the engine, the caller or the network misbehave."""

import asyncio
import json

import pytest
from aiohttp import web

from server.engines.state import State
from tests.server.conftest import Answer, Gateway, Handler
from tiers.errors import CheckpointError
from tiers.manifest import describe_files

CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b'{"model":"SmolLM2-135M-Instruct","stream":true}'


def streams(*parts: bytes, then_cut: bool = False) -> object:
    """An engine that streams these parts, each in a packet of its own."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if then_cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler


async def test_the_body_reaches_the_engine_byte_for_byte(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"id": "x"})

    gateway.handler = handler
    body = b'{"model" : "SmolLM2-135M-Instruct",\n "messages":[], "temperature":0.10, "x":"\xc3\xa4"}'
    answer = await gateway.post(body, headers={"x-request-id": "abc"}, parts=3)
    assert answer.status == 200
    assert json.loads(answer.body) == {"id": "x"}
    assert gateway.bodies == [body]
    assert gateway.seen[0].headers["x-request-id"] == "abc"
    assert answer.headers["x-assay-tier"] == "Reference"


async def test_events_come_whole_however_they_are_cut(gateway: Gateway) -> None:
    text = CHUNK * 3 + DONE
    gateway.handler = streams(*(text[i : i + 7] for i in range(0, len(text), 7)))  # type: ignore[assignment]
    answer = await gateway.post(STREAM)
    assert answer.body == text
    assert answer.ended
    for message in answer.messages[1:-1]:
        assert message["body"].endswith(b"\n\n")


async def test_a_stream_cut_by_a_dead_engine_ends_with_an_error_event(gateway: Gateway) -> None:
    gateway.handler = streams(CHUNK, CHUNK[:11], then_cut=True)  # type: ignore[assignment]
    answer = await gateway.post(STREAM)
    events = answer.body.split(b"\n\n")
    assert events[0] + b"\n\n" == CHUNK
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert answer.ended
    assert gateway.metric("assay_streams_broken_total") == 1
    assert gateway.metric("assay_requests_running") == 0


async def test_the_time_to_the_first_token_is_that_of_the_first_event(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.1)
        await response.write(CHUNK + DONE)
        return response

    gateway.handler = handler
    await gateway.post(STREAM)
    assert gateway.told("gen_ai_server_time_to_first_token_seconds_sum") >= 0.1


async def test_a_stream_that_ends_without_done_is_an_error(gateway: Gateway) -> None:
    gateway.handler = streams(CHUNK)  # type: ignore[assignment]
    assert b"engine_failed" in (await gateway.post(STREAM)).body


async def test_the_engines_own_error_event_becomes_ours(gateway: Gateway) -> None:
    raw = b'data: {"error": {"message": "see stack trace", "code": 500}}\n\n'
    gateway.handler = streams(CHUNK + raw + DONE)  # type: ignore[assignment]
    answer = await gateway.post(STREAM)
    assert answer.body.startswith(CHUNK)
    assert b"stack trace" not in answer.body
    assert json.loads(answer.body.split(b"data: ")[-1])["error"]["code"] == "engine_failed"


async def test_text_that_looks_like_an_error_event_passes(gateway: Gateway) -> None:
    text = json.dumps({"choices": [{"delta": {"content": 'data: {"error": 1}\n\ndata: [DONE]\n\n'}}]})
    event = f"data: {text}\n\n".encode()
    gateway.handler = streams(event, DONE)  # type: ignore[assignment]
    assert (await gateway.post(STREAM)).body == event + DONE


async def test_a_500_of_a_living_engine_is_a_500(gateway: Gateway) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="oops")

    gateway.handler = handler
    answer = await gateway.post()
    assert answer.status == 500
    assert answer.error["code"] == "engine_failed"
    assert gateway.replica.state is State.READY


@pytest.mark.parametrize("status", [204, 302, 401, 413, 429, 501, 503])
async def test_what_is_neither_an_answer_nor_a_refusal_is_the_engines_failure(
    gateway: Gateway, status: int
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"location": "http://127.0.0.1:1/"})

    gateway.handler = handler
    answer = await gateway.post()
    assert (answer.status, answer.error["code"]) == (500, "engine_failed")
    assert len(gateway.seen) == 2, "asked once, and then whether it is alive"


OPENING = b'event: response.created\ndata: {"response":{"status":"in_progress"}}\n\n'
DELTA = b'event: response.output_text.delta\ndata: {"delta":"a"}\n\n'
RESPONSE = {"model": "SmolLM2-135M-Instruct", "input": "Hi", "stream": True, "max_output_tokens": 500, "top_k": 1}


async def ask_for_a_response(gateway: Gateway, *said: bytes, then: web.Response) -> Answer:
    """A streamed one, of an engine that says this and cuts the connection; ``then`` is its next answer."""
    cut: Handler = streams(*said, then_cut=True)  # type: ignore[assignment]

    async def handler(request: web.Request) -> web.StreamResponse:
        return await cut(request) if len(gateway.seen) == 1 else then

    gateway.handler = handler
    return await gateway.post(json.dumps(RESPONSE).encode(), path="/v1/responses")


REFUSED = b'{"error":{"message":"top_k is odd","type":"BadRequestError","param":"top_k","code":400}}'


async def test_a_response_that_the_engine_refuses_by_cutting_its_stream_is_refused(gateway: Gateway) -> None:
    answer = await ask_for_a_response(gateway, OPENING, then=web.Response(status=400, body=REFUSED))
    assert (answer.status, answer.error["message"]) == (400, "top_k is odd")
    streamed, brief = (json.loads(body) for body in gateway.bodies)
    assert brief == streamed | {"stream": False, "max_output_tokens": 1}
    assert gateway.metric("assay_streams_broken_total") == 0


async def test_a_response_that_is_cut_without_being_refused_has_failed(gateway: Gateway) -> None:
    answer = await ask_for_a_response(gateway, OPENING, then=web.json_response({"status": "completed"}))
    assert (answer.status, answer.error["code"]) == (500, "engine_failed")


async def test_a_chat_that_is_cut_is_not_asked_for_again(gateway: Gateway) -> None:
    gateway.handler = streams(CHUNK[:11], then_cut=True)  # type: ignore[assignment]
    answer = await gateway.post(STREAM)
    assert (answer.status, answer.error["code"]) == (500, "engine_failed")
    assert len(gateway.seen) == 2, "asked once, and then whether it is alive"


async def test_a_response_that_is_cut_once_it_says_something_is_not_asked_for_again(gateway: Gateway) -> None:
    answer = await ask_for_a_response(gateway, OPENING, DELTA, then=web.Response(status=400, body=REFUSED))
    assert answer.status == 200
    assert answer.body.startswith(b"event: response.created\n")
    assert b"engine_failed" in answer.body
    assert len(gateway.seen) == 2, "asked once, and then whether it is alive"


GIVEN_UP = b'{"error":{"message":"Internal server error","type":"InternalServerError","param":null,"code":500}}'


@pytest.mark.parametrize("stream", [False, True])
async def test_a_form_that_no_answer_can_have_is_the_callers_mistake(gateway: Gateway, stream: bool) -> None:
    if stream:
        gateway.handler = streams(b"data: " + GIVEN_UP + b"\n\n", DONE)  # type: ignore[assignment]
    else:

        async def handler(request: web.Request) -> web.StreamResponse:
            return web.Response(status=500, body=GIVEN_UP)

        gateway.handler = handler
    form = {"model": "SmolLM2-135M-Instruct", "stream": stream, "response_format": {"type": "json_object"}}
    for _ in range(10):
        answer = await gateway.post(json.dumps(form).encode())
        assert (answer.status, answer.error["param"]) == (400, "response_format")
    assert gateway.replica.state is State.READY, "nobody takes an engine from others by asking for what cannot be"
    answer = await gateway.post(STREAM if stream else b'{"model":"SmolLM2-135M-Instruct"}')
    assert (answer.status, answer.error["code"]) == (500, "engine_failed")


async def test_an_engine_that_is_gone_is_a_503_with_retry_after_and_taken_out(gateway: Gateway) -> None:
    gateway.replica.connect("http://127.0.0.1:1")
    answer = await gateway.post()
    assert answer.status == 503
    assert answer.error["code"] == "tier_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert gateway.replica.state is State.RESTARTING
    assert gateway.metric("assay_tier_ready") == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"too long","type":"BadRequestError","param":"max_tokens","code":400}}', "too long"),
        (b'{"detail":"no"}', "no"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'["odd"]', "The engine refused the request (422)."),
        (b"<html>", "The engine refused the request (422)."),
    ],
)
async def test_every_shape_of_an_engines_refusal_becomes_one(gateway: Gateway, body: bytes, message: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=422, body=body)

    gateway.handler = handler
    answer = await gateway.post()
    assert answer.status == 422
    assert answer.error["message"] == message
    assert answer.headers["x-assay-tier"] == "Reference"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b'{"model":"SmolLM2-135M-Instruct","prompt":"\xff"}',
        b'{"model":"SmolLM2-135M-Instruct","prompt":"\\ud800"}',
        b'{"model":"SmolLM2-135M-Instruct","temperature":NaN}',
        b'{"model":"SmolLM2-135M-Instruct"} and more',
    ],
)
async def test_a_body_that_is_no_json_object_is_400(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.post(body)
    assert answer.status == 400
    assert "The request body" in str(answer.error["message"])
    assert gateway.seen == []


async def test_an_oversized_body_is_413_before_its_end(gateway: Gateway) -> None:
    answer = await gateway.post(b"x" * (1 << 20) + b"xx")
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"


async def test_an_unknown_model_is_404_and_never_reaches_an_engine(gateway: Gateway) -> None:
    answer = await gateway.post(b'{"model":"SmolLM2-135M-Instruct-Turbo"}')
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert "x-assay-tier" not in answer.headers
    assert gateway.seen == []


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
async def test_routes_that_do_not_exist_answer_in_the_envelope(
    gateway: Gateway, method: str, path: str, status: int
) -> None:
    answer = await gateway.post(method=method, path=path)
    assert answer.status == status
    assert path in str(answer.error["message"])


async def test_a_client_that_leaves_stops_the_engine(gateway: Gateway) -> None:
    stopped, leave = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        leave.set()
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        stopped.set()
        return web.Response()

    gateway.handler = handler
    answer = await gateway.post(leave_after=leave)
    await asyncio.wait_for(stopped.wait(), 2)
    assert answer.messages == []
    assert gateway.metric("assay_clients_left_total") == 1
    assert gateway.metric("assay_requests_running") == 0


@pytest.mark.parametrize("given", ["", "a b\n\x00<c>", "x" * 5000, "\u00e4\u00f6", "Bearer sk-assay-secret"])
async def test_request_ids_are_cleaned_and_bounded(gateway: Gateway, given: str) -> None:
    answer = await gateway.post(b"{", headers={"x-request-id": given})
    request_id = answer.headers["x-request-id"]
    assert 0 < len(request_id) <= 128
    assert request_id.replace("-", "").isalnum()
    assert "secret" not in request_id, "ids are logged"


async def test_a_stream_that_is_broken_off_at_the_stop_gets_an_error_event(gateway: Gateway) -> None:
    begun = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(CHUNK)
        begun.set()
        await asyncio.sleep(60)
        return response

    gateway.handler = handler
    asking = asyncio.create_task(gateway.post(STREAM))
    await begun.wait()
    await asyncio.sleep(0.05)
    await gateway.replica.stop()
    answer = await asyncio.wait_for(asking, 5)
    assert answer.body.startswith(CHUNK)
    assert b"engine_failed" in answer.body
    assert answer.ended


async def test_a_mistake_of_the_gateway_is_a_500_that_can_be_found_in_the_log(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("server.openai.Endpoint._hold_to_tier", mistake)
    answer = await gateway.post(headers={"x-request-id": "find-me"})
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "find-me"
    assert answer.error["code"] == "internal_error"
    assert "find-me" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_mistake_in_a_route_of_the_framework_is_the_same_500(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(gateway.metrics), "exposition", None)
    answer = await gateway.post(b"", path="/metrics", method="GET", headers={"x-request-id": "find-me"})
    assert answer.status == 500
    assert answer.error["code"] == "internal_error"
    assert "find-me" in caplog.text


async def test_an_engine_is_not_started_again_on_other_weights(gateway: Gateway) -> None:
    gateway.replica.connect("http://127.0.0.1:1")
    await gateway.post()
    folder = gateway.replica.tier.checkpoint
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"others")
    files = describe_files(folder)
    gateway.replica.manifest.model_copy(update={"files": files}).write(folder)
    with pytest.raises(CheckpointError, match="was rebuilt while the server ran"):
        await gateway.replica.start()


async def test_not_ready_is_503_and_says_so_in_readyz(gateway: Gateway) -> None:
    await gateway.replica.stop()
    assert (await gateway.post()).status == 503
    ready = await gateway.post(method="GET", path="/readyz")
    assert ready.status == 503
    assert json.loads(ready.body)["ready"] is False
    assert (await gateway.post(method="GET", path="/healthz")).status == 200
