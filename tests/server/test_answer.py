"""The engine's answers as OpenAI gives them, from bytes that vLLM 0.32 sent."""

import json
from typing import Any

import pytest

from server.answer import (
    EngineBroke,
    ResponseEvents,
    TextEvents,
    Usage,
    clean_completion,
    clean_response,
    rendered_tokens,
    whole_answer,
)
from server.engines.refused import EngineRefused
from server.errors import EngineFailed

CHAT: dict[str, Any] = {
    "id": "chatcmpl-a9",
    "object": "chat.completion",
    "created": 1795268186,
    "model": "SmolLM2-135M-Instruct",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }
    ],
    "service_tier": None,
    "system_fingerprint": "vllm-0.32.0-7e5a26d7",
    "usage": {
        "prompt_tokens": 33,
        "total_tokens": 35,
        "completion_tokens": 2,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    },
    "prompt_logprobs": None,
    "prompt_token_ids": None,
    "prompt_text": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": None,
}
RESPONSE: dict[str, Any] = {
    "id": "resp_ba",
    "created_at": 1795268208,
    "incomplete_details": None,
    "instructions": None,
    "metadata": None,
    "model": "SmolLM2-135M-Instruct",
    "object": "response",
    "output": [
        {
            "id": "msg_b2",
            "content": [{"annotations": [], "text": "Hi", "type": "output_text", "logprobs": None}],
            "role": "assistant",
            "status": "completed",
            "type": "message",
            "phase": None,
        }
    ],
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "none",
    "tools": [{"name": "f", "parameters": {"type": "object"}, "strict": False, "type": "function", "async": None}],
    "top_p": 1.0,
    "status": "incomplete",
    "usage": {
        "input_tokens": 33,
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 41,
    },
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "input_messages": None,
    "output_messages": None,
}
CHUNK = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
USAGE = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":'
    b'{"prompt_tokens":33,"total_tokens":36,"completion_tokens":3,"prompt_tokens_details":null}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def test_a_chat_completion_has_no_null_that_openai_leaves_out() -> None:
    from openai.types.chat import ChatCompletion

    body, usage = whole_answer(json.dumps(CHAT).encode(), clean_completion)
    answer = json.loads(body)
    assert answer.keys() == {"id", "object", "created", "model", "choices", "system_fingerprint", "usage"}
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": None, "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"].keys() == {"prompt_tokens", "total_tokens", "completion_tokens"}
    assert usage == Usage(prompt=33, answer=2)
    ChatCompletion.model_validate(answer, strict=True)


def test_what_a_caller_asked_the_engine_for_stays() -> None:
    asked = CHAT | {"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"1": {"logprob": -0.1}}]}
    answer = json.loads(whole_answer(json.dumps(asked).encode(), clean_completion)[0])
    assert answer["prompt_token_ids"] == [1, 2]
    assert answer["prompt_logprobs"] == [None, {"1": {"logprob": -0.1}}]


def test_log_probabilities_keep_every_digit() -> None:
    text = json.dumps(CHAT | {"x": 0}).replace('"x": 0', '"x": -12.397448539733887')
    assert b"-12.397448539733887" in whole_answer(text.encode(), clean_completion)[0]


def test_a_response_has_no_field_of_the_engines_own_and_has_its_error() -> None:
    from openai.types.responses import Response

    body, usage = whole_answer(json.dumps(RESPONSE).encode(), clean_response)
    answer = json.loads(body)
    assert not {"kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages"} & answer.keys()
    assert answer["error"] is None
    assert answer["metadata"] == {}
    assert "phase" not in answer["output"][0]
    assert "logprobs" not in answer["output"][0]["content"][0]
    assert usage == Usage(prompt=33, answer=8, cached=16)
    Response.model_validate(answer)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff"])
def test_an_answer_that_is_no_object_is_the_engines_failure(body: bytes) -> None:
    with pytest.raises(EngineBroke):
        whole_answer(body, clean_completion)


@pytest.mark.parametrize("together", [True, False])
def test_usage_is_read_and_hidden_from_who_did_not_ask(together: bool) -> None:
    stream = TextEvents(show_usage=False)
    parts = [CHUNK + USAGE + DONE] if together else [CHUNK, USAGE, DONE]
    assert b"".join(stream.take(part) for part in parts) == CHUNK + DONE
    assert stream.usage == Usage(prompt=33, answer=3)
    assert stream.ended


def test_who_asked_for_usage_gets_it_last_without_nulls() -> None:
    from openai.types.chat import ChatCompletionChunk

    stream = TextEvents(show_usage=True)
    events = stream.take(CHUNK + USAGE + DONE).split(b"\n\n")
    assert events[0] + b"\n\n" == CHUNK
    chunk = json.loads(events[1].removeprefix(b"data: "))
    assert chunk["choices"] == []
    assert chunk["usage"] == {"prompt_tokens": 33, "total_tokens": 36, "completion_tokens": 3}
    assert events[2] == b"data: [DONE]"
    ChatCompletionChunk.model_validate(chunk)


def test_text_that_looks_like_usage_or_an_error_passes() -> None:
    text = json.dumps({"choices": [{"delta": {"content": '"choices":[] data: {"error" \n\ndata: [DONE]\n\n'}}]})
    event = f"data: {text}\n\n".encode()
    stream = TextEvents(show_usage=False)
    assert stream.take(event) == event
    assert not stream.ended
    assert stream.usage is None
    assert stream.failure is None


def test_an_error_of_the_engine_is_not_told_and_one_of_the_request_is() -> None:
    broken = TextEvents(show_usage=True)
    assert broken.take(CHUNK + b'data: {"error": {"message": "see stack trace", "code": 500}}\n\n' + DONE) == CHUNK
    assert isinstance(broken.failure, EngineBroke)
    refused = TextEvents(show_usage=True)
    said = b'data: {"error": {"message": "logprobs 99 is too many", "code": 400, "param": "logprobs"}}\n\n'
    assert refused.take(said + DONE) == b""
    assert isinstance(refused.failure, EngineRefused)
    assert str(refused.failure) == "logprobs 99 is too many"
    assert refused.failure.param == "logprobs"


def _event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def test_a_response_that_the_limit_cut_ends_as_incomplete() -> None:
    stream = ResponseEvents()
    delta = _event("response.output_text.delta", sequence_number=1, delta='"response":{"x')
    assert stream.take(delta) == delta
    assert not stream.ended
    last = stream.take(_event("response.completed", response=RESPONSE, sequence_number=2))
    assert last.startswith(b"event: response.incomplete\n")
    assert json.loads(last.partition(b"data: ")[2])["type"] == "response.incomplete"
    assert stream.ended
    assert stream.usage == Usage(prompt=33, answer=8, cached=16)


@pytest.mark.parametrize("together", [True, False])
def test_what_opens_a_response_waits_for_what_follows(together: bool) -> None:
    stream = ResponseEvents()
    begun = RESPONSE | {"status": "in_progress", "usage": None}
    opening = [_event("response.created", response=begun), _event("response.in_progress", response=begun)]
    assert [stream.take(part) for part in ([b"".join(opening)] if together else opening)][-1] == b""
    assert (stream.seen, stream.ended) == (0, False)
    delta = _event("response.output_text.delta", sequence_number=2, delta="a")
    events = stream.take(delta)
    assert events.startswith(b"event: response.created\n")
    assert b"event: response.in_progress\n" in events
    assert b"kv_transfer_params" not in events
    assert events.endswith(delta)
    assert (stream.seen, stream.ended) == (3, False)
    assert stream.take(delta) == delta


def test_of_a_response_that_fails_before_it_says_anything_nothing_is_given_on() -> None:
    stream = ResponseEvents()
    assert stream.take(_event("response.created", response=RESPONSE | {"status": "in_progress"})) == b""
    assert stream.take(_event("error", error={"message": "no", "code": 400})) == b""
    assert isinstance(stream.failure, EngineRefused)


def test_an_error_in_a_response_is_openais_event_with_the_envelope() -> None:
    stream = ResponseEvents()
    stream.take(_event("response.output_text.delta", sequence_number=0, delta="a"))
    head, _, data = stream.error(EngineFailed("It broke.")).partition(b"\ndata: ")
    fields = json.loads(data)
    assert head == b"event: error"
    assert fields["type"] == "error"
    assert fields["sequence_number"] == 1
    assert fields["error"].keys() == {"message", "type", "param", "code"}


def test_the_longest_of_rendered_prompts_is_counted() -> None:
    assert rendered_tokens(b'{"token_ids":[1,2,3],"x":1}') == 3
    assert rendered_tokens(b'[{"token_ids":[1]},{"token_ids":[2,3]}]') == 2
    with pytest.raises(EngineBroke):
        rendered_tokens(b'{"detail":"Not Found"}')
