"""Keys, their limits and the tier's queue, at a gateway in front of a fake engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.keys import KeyFile
from tests.server.conftest import Answer, Gateway, Handler, running_gateway

MODEL = "SmolLM2-135M-Instruct"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}).encode()
USAGE = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}


async def quick(request: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": [], "usage": USAGE})


def quick_after(go: asyncio.Event) -> Handler:
    async def slow(request: web.Request) -> web.StreamResponse:
        await go.wait()
        return await quick(request)

    return slow


def code_of(answer: Answer) -> object:
    return json.loads(answer.body)["error"]["code"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def key_in(folder: Path, name: str = "ann", **limits: Any) -> dict[str, str]:
    """The headers of a caller with a key of these limits."""
    return bearer(KeyFile(folder / "keys.json").add(name, **limits))


async def test_without_keys_anybody_may_call(gateway: Gateway) -> None:
    gateway.handler = quick
    assert (await gateway.post(BODY)).status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/tiers", "/tokenize", "/nothing"])
async def test_with_keys_nobody_passes_without_one(tmp_path: Path, path: str) -> None:
    good = key_in(tmp_path)
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick
        method = "GET" if path in ("/v1/models", "/v1/tiers") else "POST"
        missing = await gateway.post(BODY, path=path, method=method)
        wrong = await gateway.post(
            BODY, path=path, method=method, headers=bearer("sk-assay-000000000000-" + "a" * 43)
        )
        assert (missing.status, code_of(missing)) == (401, "missing_api_key")
        assert (wrong.status, code_of(wrong)) == (401, "invalid_api_key")
        assert gateway.seen == []
        assert (await gateway.post(BODY, path=path, method=method, headers=good)).status in (200, 404)


async def test_an_orchestrator_needs_no_key(tmp_path: Path) -> None:
    key_in(tmp_path)
    async with running_gateway(tmp_path) as gateway:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await gateway.post(path=path, method="GET")).status == 200


async def test_a_key_for_other_tiers_is_refused_and_not_shown_this_one(tmp_path: Path) -> None:
    turbo, reference = key_in(tmp_path, "t", tiers=["Turbo"]), key_in(tmp_path, "r", tiers=[f"{MODEL}-Reference"])
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick
        refused = await gateway.post(BODY, headers=turbo)
        assert (refused.status, code_of(refused)) == (403, "tier_not_allowed")
        assert gateway.seen == []
        assert (await gateway.post(BODY, headers=reference)).status == 200
        names = [
            [model["id"] for model in json.loads(answer.body)["data"]]
            for answer in [
                await gateway.post(path="/v1/models", method="GET", headers=key) for key in (turbo, reference)
            ]
        ]
        assert names == [[], [MODEL, f"{MODEL}-Reference"]]


async def test_a_keys_requests_a_minute_are_counted_and_told(tmp_path: Path) -> None:
    headers = key_in(tmp_path, requests_per_minute=2)
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick
        answers = [await gateway.post(BODY, headers=headers) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:2]] == ["1", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
    assert code_of(answers[2]) == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    assert answers[2].headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_keys_tokens_a_minute_are_those_that_the_engine_counted(tmp_path: Path) -> None:
    headers = key_in(tmp_path, tokens_per_minute=100)
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick
        answers = [await gateway.post(BODY, headers=headers) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 429, 429]
    guess = len(BODY) // 4 + 10
    left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers[:2]]
    assert left == [100 - guess, 100 - 40 - guess]


async def test_a_request_that_the_engine_refuses_costs_no_tokens(tmp_path: Path) -> None:
    headers = key_in(tmp_path, tokens_per_minute=100)

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no", "code": 400}}, status=400)

    async with running_gateway(tmp_path) as gateway:
        gateway.handler = refuse
        answers = [await gateway.post(BODY, headers=headers) for _ in range(9)]
    assert {answer.status for answer in answers} == {400}


async def test_a_keys_requests_at_once_are_bounded(tmp_path: Path) -> None:
    headers, other = key_in(tmp_path, concurrent_requests=1), key_in(tmp_path, "bob")
    go = asyncio.Event()

    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick_after(go)
        first = asyncio.create_task(gateway.post(BODY, headers=headers))
        others = asyncio.create_task(gateway.post(BODY, headers=other))
        await asyncio.sleep(0.05)
        second = await gateway.post(BODY, headers=headers)
        assert (second.status, code_of(second)) == (429, "concurrency_limit_exceeded")
        assert "retry-after" in second.headers
        go.set()
        assert (await first).status == (await others).status == 200
        assert (await gateway.post(BODY, headers=headers)).status == 200


async def test_beyond_the_queue_it_is_429_at_once_with_retry_after(tmp_path: Path) -> None:
    go = asyncio.Event()

    async with running_gateway(tmp_path, max_waiting=2, tier={"max_num_seqs": 1}) as gateway:
        gateway.handler = quick_after(go)
        held = [asyncio.create_task(gateway.post(BODY)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert gateway.metric("assay_requests_waiting") == 2
        refused = await gateway.post(BODY)
        assert (refused.status, code_of(refused)) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        go.set()
        assert [(await each).status for each in held] == [200] * 3


async def test_a_longer_answer_than_the_tier_gives_is_refused_by_the_fields_name(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, tier={"max_output_tokens": 9}) as gateway:
        gateway.handler = quick
        answer = await gateway.post(BODY)
        assert (answer.status, code_of(answer)) == (400, "max_tokens_exceeded")
        assert json.loads(answer.body)["error"]["param"] == "max_tokens"
        newer = BODY.replace(b"max_tokens", b"max_completion_tokens")
        assert json.loads((await gateway.post(newer)).body)["error"]["param"] == "max_completion_tokens"
        assert (await gateway.post(BODY.replace(b"10}", b"9}"))).status == 200


async def test_a_longer_prompt_than_the_tier_takes_is_refused_as_the_engine_counts_it(tmp_path: Path) -> None:
    async def counting(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/chat/completions/render":
            return web.json_response({"token_ids": list(range((await request.read()).count(b"word")))})
        return await quick(request)

    async with running_gateway(tmp_path, tier={"max_prompt_tokens": 700}) as gateway:
        gateway.handler = counting
        assert (await gateway.post(BODY)).status == 200
        assert len(gateway.seen) == 1, "a short body cannot have that many tokens and is not counted"
        assert (await gateway.post(BODY.replace(b"Hi", b"word" * 700))).status == 200
        answer = await gateway.post(BODY.replace(b"Hi", b"word" * 701))
        assert (answer.status, code_of(answer)) == (400, "prompt_too_long")
        assert "701" in json.loads(answer.body)["error"]["message"]


async def test_tokens_are_counted_for_metrics_without_being_asked_for(gateway: Gateway) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        assert json.loads(await request.read())["stream_options"]["include_usage"] is True
        usage = json.dumps({"choices": [], "usage": USAGE}, separators=(",", ":"))
        body = f'data: {{"choices":[{{"delta":{{}}}}]}}\n\ndata: {usage}\n\ndata: [DONE]\n\n'
        return web.Response(body=body.encode(), content_type="text/event-stream")

    gateway.handler = stream
    answer = await gateway.post(BODY[:-1] + b',"stream":true}')
    assert b"usage" not in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert gateway.told("gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 30
    assert gateway.told("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 10


async def test_a_caller_who_leaves_with_the_last_event_has_paid(tmp_path: Path) -> None:
    headers = key_in(tmp_path, tokens_per_minute=1000)
    leave = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        usage = json.dumps({"choices": [], "usage": USAGE | {"completion_tokens": 600}}, separators=(",", ":"))
        await response.write(f'data: {{"choices":[{{}}]}}\n\ndata: {usage}\n\ndata: [DONE]\n\n'.encode())
        await asyncio.sleep(0.1)
        leave.set()
        await asyncio.sleep(5)  # the end of the answer does not come before the caller leaves
        return response

    async with running_gateway(tmp_path) as gateway:
        gateway.handler = stream
        await gateway.post(BODY[:-1] + b',"stream":true}', headers=headers, leave_after=leave)
        gateway.handler = quick
        left = int((await gateway.post(BODY, headers=headers)).headers["x-ratelimit-remaining-tokens"])
    assert left == 1000 - 630 - len(BODY) // 4 - 10


async def test_a_key_is_held_to_its_requests_before_their_bodies_are_read(tmp_path: Path) -> None:
    headers = key_in(tmp_path, requests_per_minute=1)
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = quick
        assert (await gateway.post(b"{", headers=headers)).status == 400
        assert (await gateway.post(b"{", headers=headers)).status == 429


async def test_a_slow_reader_of_a_whole_answer_holds_no_place(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, tier={"max_num_seqs": 1}) as gateway:
        gateway.handler = quick
        slow = asyncio.create_task(gateway.post(BODY, read_slowly_s=0.2))
        await asyncio.sleep(0.05)
        assert (await gateway.post(BODY)).status == 200
        assert not slow.done()
        assert (await slow).status == 200


async def test_a_tier_that_is_not_a_keys_is_not_shown_by_name_either(tmp_path: Path) -> None:
    headers = key_in(tmp_path, tiers=["Turbo"])
    async with running_gateway(tmp_path) as gateway:
        answer = await gateway.post(path=f"/v1/models/{MODEL}", method="GET", headers=headers)
    assert (answer.status, code_of(answer)) == (403, "tier_not_allowed")
    assert int(answer.headers["openai-processing-ms"]) >= 0
