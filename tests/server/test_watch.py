"""A request whose time is over, or whose engine is silent, at a gateway in front of a fake engine."""

import asyncio
import gc
import json
from pathlib import Path

import pytest
from aiohttp import web

from server.watch import Watch
from tests.server.conftest import Answer, Handler, running_gateway

CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b'{"model":"SmolLM2-135M-Instruct","stream":true,"stream_options":{"include_usage":true}}'


def pausing(*parts: bytes | float) -> Handler:
    """An engine that streams these, and rests where there is a number of seconds instead."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            if isinstance(part, bytes):
                await response.write(part)
            else:
                await asyncio.sleep(part)
        return response

    return handler


def code_of(answer: Answer) -> str:
    """Of an error as the answer, or as its last event."""
    return str(json.loads(answer.body.strip().split(b"data: ")[-1])["error"]["code"])


async def test_a_first_token_that_does_not_come_is_its_own_error(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, first_token_timeout_s=0.1) as gateway:
        gateway.handler = pausing(5.0)
        answer = await gateway.post(STREAM)
    assert answer.status == 504
    assert code_of(answer) == "first_token_timeout"
    assert gateway.metric("assay_requests_running") == 0


async def test_what_opens_a_response_is_not_its_first_token(tmp_path: Path) -> None:
    opening = b'event: response.created\ndata: {"response":{"status":"in_progress"}}\n\n'
    async with running_gateway(tmp_path, first_token_timeout_s=0.1) as gateway:
        gateway.handler = pausing(opening, 5.0)
        body = b'{"model":"SmolLM2-135M-Instruct","input":"Hi","stream":true}'
        answer = await gateway.post(body, path="/v1/responses")
    assert (answer.status, code_of(answer)) == (504, "first_token_timeout")


async def test_a_stream_that_stands_still_ends_with_its_own_error_event(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, token_timeout_s=0.15, first_token_timeout_s=0.1) as gateway:
        gateway.handler = pausing(CHUNK, 0.1, CHUNK, 0.1, CHUNK, 5.0, CHUNK)
        answer = await gateway.post(STREAM)
    assert answer.status == 200
    assert answer.body.startswith(CHUNK * 3)
    assert code_of(answer) == "token_timeout"
    assert answer.ended


async def test_an_answer_that_is_not_whole_in_time_is_its_own_error(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, request_timeout_s=0.1) as gateway:
        gateway.handler = pausing(5.0)
        answer = await gateway.post()
        assert answer.status == 504
        assert code_of(answer) == "request_timeout"
        gateway.handler = pausing(*(CHUNK, 0.02) * 20)
        answer = await gateway.post(STREAM)
        assert answer.status == 200
        assert code_of(answer) == "request_timeout"


async def test_waiting_in_the_queue_counts(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, request_timeout_s=0.1, tier={"max_num_seqs": 1}) as gateway:
        gateway.handler = pausing(5.0)
        answers = await asyncio.gather(*(gateway.post() for _ in range(3)))
        assert [code_of(answer) for answer in answers] == ["request_timeout"] * 3
        assert len(gateway.seen) <= 2


async def test_silence_is_filled_with_comments_that_clients_skip(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, heartbeat_s=0.02) as gateway:
        gateway.handler = pausing(0.1, CHUNK, 0.1, CHUNK, DONE)
        answer = await gateway.post(STREAM)
    events = answer.body.split(b"\n\n")
    assert sum(event.startswith(b": ") for event in events) >= 4
    assert [event for event in events if event and not event.startswith(b":")] == [
        CHUNK.strip(),
        CHUNK.strip(),
        DONE.strip(),
    ]


async def test_a_stream_that_flows_gets_no_comment(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, heartbeat_s=0.1) as gateway:
        gateway.handler = pausing(*(CHUNK, 0.03) * 8, DONE)
        answer = await gateway.post(STREAM)
    assert answer.body == CHUNK * 8 + DONE


async def test_an_error_after_a_comment_is_an_event(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, heartbeat_s=0.05) as gateway:

        async def refuse(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.15)
            return web.json_response({"error": {"message": "no", "code": 400}}, status=400)

        gateway.handler = refuse
        answer = await gateway.post(STREAM)
    assert answer.status == 200
    assert json.loads(answer.body.split(b"data: ")[-1])["error"]["message"] == "no"


async def test_a_caller_who_reads_slowly_is_not_the_engines_fault(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, token_timeout_s=0.1) as gateway:
        gateway.handler = pausing(CHUNK, CHUNK, DONE)
        answer = await gateway.post(STREAM, read_slowly_s=0.15)
    assert answer.body == CHUNK * 2 + DONE


@pytest.mark.parametrize("ends", ["the caller leaves", "its time is over"])
async def test_an_interrupted_request_is_forgotten_at_once(tmp_path: Path, ends: str) -> None:
    """Its exception knows the frames it went through, and they know its body: eight megabytes it may be."""
    leave = asyncio.Event()
    limit = 0.1 if ends == "its time is over" else 60
    async with running_gateway(tmp_path, request_timeout_s=limit) as gateway:

        async def never(request: web.Request) -> web.StreamResponse:
            leave.set()
            await asyncio.sleep(5)
            return web.Response()

        gateway.handler = never
        gc.collect()
        gc.disable()
        try:
            await gateway.post(leave_after=leave if ends == "the caller leaves" else None)
            # By type(): isinstance would ask each object for its __class__, and proxies load what they stand for.
            assert not [each for each in gc.get_objects() if type(each) is Watch]
        finally:
            gc.enable()


async def test_a_client_that_leaves_the_queue_gives_its_turn_up(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, tier={"max_num_seqs": 1}) as gateway:
        go_on, leave = asyncio.Event(), asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            await go_on.wait()
            return await pausing(CHUNK, DONE)(request)

        async def so_many_wait(number: int) -> None:
            async with asyncio.timeout(5):
                while gateway.metric("assay_requests_waiting") != number:
                    await asyncio.sleep(0.005)

        gateway.handler = handler
        first = asyncio.create_task(gateway.post(STREAM))
        second = asyncio.create_task(gateway.post(STREAM, leave_after=leave))
        await so_many_wait(1)
        third = asyncio.create_task(gateway.post(STREAM))
        await so_many_wait(2)
        leave.set()
        assert (await second).messages == []
        assert gateway.metric("assay_requests_waiting") == 1
        go_on.set()
        assert (await first).status == (await third).status == 200
        assert len(gateway.seen) == 2


async def test_a_caller_who_does_not_read_is_let_go(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, token_timeout_s=0.1, heartbeat_s=0.05) as gateway:
        gateway.handler = pausing(CHUNK, CHUNK, DONE)
        await gateway.post(STREAM, read_slowly_s=1)
        assert gateway.metric("assay_clients_left_total") == 1
        assert gateway.metric("assay_requests_running") == 0
