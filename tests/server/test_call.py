"""What the gateway reads of a body, refuses in it, and changes in it."""

import json
import time

import pytest

from server.call import FORBIDDEN, MOST_CHOICES, Call, read_call
from server.errors import BodyRefused, FieldNotAllowed, FieldRefused
from server.responses_call import ResponsesCall
from server.schema import check_depth
from server.text_call import ChatCall, CompletionCall


def chat(text: str) -> ChatCall:
    return read_call(text.encode(), ChatCall)


def test_a_body_without_anything_of_ours_keeps_its_bytes() -> None:
    body = b'{ "model":"m", "messages":[ ], "temperature":0.10, "unknown":1e-3}'
    assert read_call(body, ChatCall).for_engine(body, "ann", "req-1") is body


def test_the_usage_of_a_stream_is_always_asked_for() -> None:
    for options in ('"stream_options":null,', '"stream_options":{"include_usage":false,"x":1},', ""):
        body = f'{{"model":"m",{options}"stream":true,"other":18446744073709551615}}'.encode()
        sent = read_call(body, ChatCall).for_engine(body, "ann", "req-1")
        assert json.loads(sent)["stream_options"]["include_usage"] is True
        assert b"18446744073709551615" in sent
    assert b'"x":1' in read_call(b'{"model":"m","stream":true,"stream_options":{"x":1}}', ChatCall).for_engine(
        b'{"model":"m","stream":true,"stream_options":{"x":1}}', "", "req-1"
    )


def test_a_caller_who_asks_for_usage_has_nothing_changed() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
    call = read_call(body, ChatCall)
    assert call.asks_usage
    assert call.for_engine(body, "ann", "req-1") is body


def test_a_response_goes_by_the_requests_name_and_without_the_nulls_that_vllm_refuses() -> None:
    nulls = dict.fromkeys(("background", "truncation", "tools", "tool_choice", "service_tier"))
    body = json.dumps({"model": "m", "stream": True, "input": "x", **nulls}).encode()
    sent = json.loads(read_call(body, ResponsesCall).for_engine(body, "ann", "req-1"))
    assert sent == {"model": "m", "stream": True, "input": "x", "request_id": "resp_req-1"}


def test_a_cache_salt_is_its_callers_own() -> None:
    body = b'{"model":"m","cache_salt":"s"}'
    call = read_call(body, ChatCall)
    salts = {json.loads(call.for_engine(body, caller, "req-1"))["cache_salt"] for caller in ("ann", "bob")}
    assert len(salts) == 2
    assert "s" not in salts
    assert call.for_engine(body, "ann", "req-1") == call.for_engine(body, "ann", "req-1")


@pytest.mark.parametrize("field", FORBIDDEN)
@pytest.mark.parametrize("kind", [ChatCall, CompletionCall, ResponsesCall, Call])
def test_switches_of_the_engine_are_refused_by_name(field: str, kind: type[Call]) -> None:
    with pytest.raises(FieldNotAllowed) as refusal:
        read_call(json.dumps({"model": "m", field: 1}).encode(), kind).check()
    assert refusal.value.param == field
    read_call(json.dumps({"model": "m", field: None}).encode(), kind).check()


def test_a_switch_with_its_name_in_escapes_is_refused_too() -> None:
    with pytest.raises(FieldNotAllowed):
        chat('{"model":"m","prior\\u0069ty":1}').check()


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"model":3}', "model"),
        ('{"model":null}', "model"),
        ("{}", "model"),
        ('{"model":"m","stream":"yes"}', "stream"),
        ('{"model":"m","stream":1}', "stream"),
        ('{"model":"m","stream_options":{"include_usage":"a"}}', "stream_options"),
        ('{"model":"m","max_tokens":"7"}', "max_tokens"),
        ('{"model":"m","max_tokens":7.0}', "max_tokens"),
        ('{"model":"m","n":1.5}', "n"),
        ('{"model":"m","top_k":100000000000000000000000}', "top_k"),
        ('{"model":"m","structured_outputs":[]}', "structured_outputs"),
        ('{"model":"m","response_format":"json"}', "response_format"),
        ('{"model":"m","response_format":{"json_schema":{"schema":{"$ref":"#"}}}}', "response_format"),
        (
            '{"model":"m","structured_outputs":{"json":{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}}}',
            "structured_outputs",
        ),
        ('{"model":"m","structured_outputs":{"json":"{\\"$ref\\":\\"#\\"}"}}', "structured_outputs"),
        ('{"model":"m","structured_outputs":{"json":{"$ref":"#/a","minimum":1e999}}}', "structured_outputs"),
        ('{"model":"m","structured_outputs":{"json":{"$ref":"x\\nFAKE"}}}', "structured_outputs"),
        ('{"model":"m","response_format":{"a":"' + "x" * 70_000 + '"}}', "response_format"),
        ('{"model":"m","tools":[{}]}', "tools"),
        ('{"model":"m","tools":[{"type":"function","function":{}}]}', "tools"),
        ('{"model":"m","messages":[{"role":"system","content":[{"type":"x\\nFAKE"}]}]}', "messages"),
        (
            '{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":{"arguments":"'
            + "[" * 99
            + '"}}]}]}',
            "messages",
        ),
        ('{"model":"m","messages":[{}]}', "messages"),
        ('{"model":"m","max_tokens":0}', "max_tokens"),
        ('{"model":"m","logit_bias":{"a":1}}', "logit_bias"),
        ('{"model":"m","use_beam_search":true}', "use_beam_search"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(text: str, param: str) -> None:
    with pytest.raises((FieldRefused, FieldNotAllowed)) as refusal:
        chat(text).check()
    assert refusal.value.param == param
    assert str(refusal.value).startswith(f"{param}")
    assert len(str(refusal.value)) < 300


def test_a_schema_that_refers_to_its_parts_passes_and_one_that_grows_by_itself_too() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "up": {"$ref": "#"}}}
    schema = {"$defs": {"node": node, "short": {"$ref": "#/$defs/node"}}, "$ref": "#/$defs/short"}
    chat(json.dumps({"model": "m", "response_format": {"json_schema": {"name": "n", "schema": schema}}})).check()


def test_looking_for_depth_takes_no_longer_than_there_are_brackets() -> None:
    for brackets in ("]" * 300_000 + "[" * 30 + "]" * 30, "[}" * 150_000, "[]" * 150_000):
        began = time.process_time()
        check_depth("messages", brackets)
        assert time.process_time() - began < 0.3


def test_looking_through_a_schema_takes_no_longer_than_it_is_long() -> None:
    chain = {f"{number}": {"$ref": f"#/$defs/{number + 1}"} for number in range(1900)}
    wrapped: dict[str, object] = {"x": [{"$ref": "#/q"}] * 3500}
    for _ in range(50):
        wrapped = {"schema": wrapped}
    for schema in ({"$defs": chain, "$ref": "#/$defs/0"}, wrapped):
        call = chat(json.dumps({"model": "m", "structured_outputs": {"json": schema}}))
        began = time.process_time()
        call.check()
        assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": "x", "status": 5},
        {"role": "user", "content": "x", "unknown": 5},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": [{"type": "output_text"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "x", "annotations": [{}]}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/"}]},
        {"type": "item_reference", "id": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 99},
        {"type": "function_call", "call_id": "c", "name": "f"},
        5,
        None,
    ],
)
def test_an_item_that_vllm_would_not_understand_never_reaches_it(item: object) -> None:
    """Three thousand of them made vLLM 0.32 take 4.9 GB."""
    with pytest.raises(FieldRefused) as refusal:
        read_call(json.dumps({"model": "m", "input": [item] * 3000}).encode(), ResponsesCall).check()
    assert refusal.value.param == "input"
    assert "input[0]" in str(refusal.value) or "nested" in str(refusal.value)


def test_a_conversation_with_a_tool_is_taken() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {
            "type": "function_call",
            "call_id": "c",
            "name": "f",
            "arguments": "{}",
            "id": "fc",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Sun.", "annotations": [], "logprobs": None}],
        },
    ]
    read_call(json.dumps({"model": "m", "input": items}).encode(), ResponsesCall).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("background", True),
        ("previous_response_id", "resp_1"),
        ("conversation", {"id": "c"}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{}] * 3000),
        ("max_output_tokens", 0),
    ],
)
def test_what_this_server_does_not_keep_or_run_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FieldRefused) as refusal:
        read_call(json.dumps({"model": "m", "input": "x", field: value}).encode(), ResponsesCall).check()
    assert refusal.value.param == field


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'"x"', b'{"model":"m"}{}', b"[" * 5000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BodyRefused):
        read_call(body, ChatCall)


def test_choices_are_counted_over_all_prompts() -> None:
    def choices(**fields: object) -> int:
        return read_call(json.dumps({"model": "m", **fields}).encode(), CompletionCall).choices

    assert choices(prompt="one") == 1
    assert choices(prompt=[1, 2, 3]) == 1
    assert choices(prompt=["a", "b", "c"]) == 3
    assert choices(prompt=[[1, 2], [3]], n=2) == 4
    assert choices(prompt=[]) == 1
    assert choices(prompt=None, n=None) == 1


@pytest.mark.parametrize("n", [0, -1, MOST_CHOICES + 1, 10**30])
def test_choices_are_bounded(n: int) -> None:
    with pytest.raises(FieldRefused) as refusal:
        chat(f'{{"model":"m","n":{n}}}').check()
    assert refusal.value.param == "n"


def test_the_newer_name_of_the_limit_of_tokens_wins() -> None:
    assert chat('{"model":"m","max_tokens":5,"max_completion_tokens":9}').output_tokens == 9
    assert chat('{"model":"m","max_tokens":5}').output_tokens == 5
    assert chat('{"model":"m"}').output_tokens is None


def test_a_long_chain_of_references_is_followed_once() -> None:
    """Not once from each of its links: that took seconds."""
    parts = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1500)} | {"a1500": {"type": "string"}}
    schema = {"$defs": parts, "$ref": "#/$defs/a0"}
    body = json.dumps({"model": "m", "response_format": {"json_schema": {"name": "n", "schema": schema}}})
    began = time.perf_counter()
    chat(body).check()
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ResponsesCall, {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#"}}}}),
        (ChatCall, {"structured_outputs": {"json": '{"$ref":"#"}'}}),
        (ChatCall, {"response_format": {"structures": [{"schema": {"$ref": "#"}}]}}),
        (
            ChatCall,
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 600}}}] * 200},
        ),
        (ChatCall, {"documents": [1] * 9}),
        (ChatCall, {"messages": [{"role": "user", "name": 1}]}),
        (ResponsesCall, {"include": ["a"] * 1000}),
        (ResponsesCall, {"metadata": {str(i): "x" for i in range(1000)}}),
    ],
)
def test_what_would_cost_an_engine_much_or_all_never_reaches_it(
    kind: type[Call], fields: dict[str, object]
) -> None:
    with pytest.raises(FieldRefused):
        read_call(json.dumps({"model": "m"} | fields).encode(), kind).check()


def test_a_number_that_is_none_in_a_schema_is_refused_and_no_mistake_of_ours() -> None:
    with pytest.raises(FieldRefused):
        chat('{"model":"m","response_format":{"x":1e999,"y":"\\u0041"}}').check()


def test_a_message_repeats_little_of_what_was_sent() -> None:
    with pytest.raises(FieldRefused) as refusal:
        chat(json.dumps({"model": "m", "tools": [{"type": "x" * 100_000, "function": {"name": "f"}}]}))
    assert len(str(refusal.value)) < 1000


def test_who_does_not_say_how_long_a_completion_may_be_asks_for_nothing() -> None:
    assert read_call(b'{"model":"m"}', CompletionCall).output_tokens is None
    assert read_call(b'{"model":"m","max_tokens":7}', CompletionCall).output_tokens == 7
