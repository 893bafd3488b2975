"""The whole OpenAI surface, through the official client, on real engines."""

import base64
import json
import urllib.error
import urllib.request
from typing import Any

import httpx
import jiter
import openai
import pytest

from tests.engines.conftest import LLAMA, MODEL, Server
from tiers.probe.reading import FAULT_ROUTE, READING_ROUTE

pytestmark = pytest.mark.timeout(1200)
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


def post(assay: Server, path: str, body: Any, headers: dict[bytes, bytes] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{assay.url}{path}", content=content, headers=headers, timeout=120)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def test_a_text_completion_echoes_its_prompt_with_log_probabilities(assay: Server) -> None:
    answer = assay.client().completions.create(
        model=MODEL, prompt="The capital of France is", echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The capital of France is")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert answer.usage is not None
    assert len(choice.logprobs.token_logprobs) == answer.usage.total_tokens


def test_the_engine_scores_a_prompt(assay: Server) -> None:
    answer = post(
        assay,
        "/v1/completions",
        {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "prompt_logprobs": 1},
    )
    scores = answer.json()["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    assert all(min(token["logprob"] for token in position.values()) <= 0 for position in scores[1:])


def test_several_prompts_get_an_answer_each(assay: Server) -> None:
    answer = assay.client().completions.create(model=MODEL, prompt=["One", "Two", "Three"], max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_a_response_is_answered_and_streamed(assay: Server) -> None:
    client = assay.client()
    whole = client.responses.create(model=MODEL, input="Name a color.", max_output_tokens=12, temperature=0)
    assert whole.output_text
    assert whole.error is None
    assert whole.usage is not None
    assert whole.usage.output_tokens <= 12
    stream = client.responses.create(
        model=MODEL, input="Name a color.", max_output_tokens=12, temperature=0, stream=True
    )
    events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.type == f"response.{last.response.status}"
    assert text == last.response.output_text


def test_a_text_is_tokenized_and_back(assay: Server) -> None:
    text = "Assay tests three grades: äöü ✓"
    for tier in ("Reference", "Lite"):
        tokens = post(assay, "/tokenize", {"model": f"{MODEL}-{tier}", "prompt": text}).json()
        assert tokens["count"] == len(tokens["tokens"]) > 5
        back = post(assay, "/detokenize", {"model": f"{MODEL}-{tier}", "tokens": tokens["tokens"]})
        assert back.json()["prompt"].endswith(text)
        assert back.headers["x-assay-tier"] == tier


def test_a_chat_is_tokenized_as_it_is_counted(assay: Server) -> None:
    counted = post(assay, "/tokenize", {"model": MODEL, "messages": QUESTION}).json()["count"]
    usage = assay.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens == counted


def test_each_model_is_found_by_its_name(assay: Server) -> None:
    client = assay.client()
    for model in client.models.list():
        assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("gpt-4o")
    assert refusal.value.code == "model_not_found"


def test_an_answer_keeps_to_a_json_schema(assay: Server) -> None:
    answer = assay.client().chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=60,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "strict": True, "schema": SCHEMA},
        },
    )
    place = json.loads(answer.choices[0].message.content or "")
    assert place.keys() == {"city", "country"}
    assert place["country"] in ("France", "Italy")


def test_an_answer_is_json_when_it_is_asked_to_be(assay: Server) -> None:
    answer = assay.client().chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me a JSON object with one short field."}],
        max_tokens=48,
        temperature=0,
        response_format={"type": "json_object"},
    )
    content = answer.choices[0].message.content or ""
    assert isinstance(jiter.from_json(content.encode(), partial_mode="trailing-strings"), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_llama_calls_the_tool_it_has_to(assay: Server, choice: Any, stream: bool) -> None:
    """Random weights: what they call comes from the grammar, which lets them write many blanks between."""
    answer: Any = assay.client().chat.completions.create(
        model=LLAMA,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=600,
        temperature=0,
        stream=stream,
    )
    if stream:
        deltas = [call for chunk in answer for c in chunk.choices for call in c.delta.tool_calls or ()]
        name = next(call.function.name for call in deltas if call.function.name)
        arguments = "".join(call.function.arguments or "" for call in deltas)
    else:
        call = answer.choices[0].message.tool_calls[0]
        name, arguments = call.function.name, call.function.arguments
    assert name == "get_weather"
    assert json.loads(arguments)["unit"] in ("celsius", "fahrenheit")


def test_a_llama_may_choose_a_tool_and_a_model_without_tools_says_so(assay: Server) -> None:
    client = assay.client()
    message: Any = [{"role": "user", "content": "Weather?"}]
    assert client.chat.completions.create(model=LLAMA, messages=message, tools=[WEATHER], max_tokens=4).choices
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(model=MODEL, messages=message, tools=[WEATHER], tool_choice="auto")


def test_the_fields_of_openais_chat_are_obeyed(assay: Server) -> None:
    create = assay.client().chat.completions.create
    several = create(model=MODEL, messages=QUESTION, n=3, max_completion_tokens=4, user="u", metadata={"a": "b"})
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None
    assert several.usage.completion_tokens <= 12
    seeded = [
        create(model=MODEL, messages=QUESTION, seed=7, max_tokens=8, temperature=1).choices for _ in range(2)
    ]
    assert seeded[0][0].message.content == seeded[1][0].message.content
    stopped = create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30, stop=["Paris"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert "Paris" not in (stopped.message.content or "")
    token = post(assay, "/tokenize", {"model": MODEL, "prompt": "zebra", "add_special_tokens": False}).json()
    biased = create(
        model=MODEL, messages=QUESTION, max_tokens=1, temperature=0, logit_bias={str(token["tokens"][0]): 100}
    )
    back = post(assay, "/detokenize", {"model": MODEL, "tokens": token["tokens"][:1]}).json()["prompt"]
    assert biased.choices[0].message.content == back


@pytest.mark.parametrize("path", ["chat", "text"])
def test_only_who_asks_is_told_the_usage_of_a_stream(assay: Server, path: str) -> None:
    def stream(**fields: Any) -> list[Any]:
        if path == "chat":
            chunks = assay.client().chat.completions.create(
                model=MODEL, messages=QUESTION, max_tokens=4, stream=True, **fields
            )
        else:
            chunks = assay.client().completions.create(
                model=MODEL, prompt="A", max_tokens=4, stream=True, **fields
            )
        return list(chunks)

    counted = assay.told("gen_ai_client_token_usage_sum", "Reference")
    plain = stream()
    assert all(chunk.choices and chunk.usage is None for chunk in plain)
    assert assay.told("gen_ai_client_token_usage_sum", "Reference") > counted
    assert all(chunk.usage is None for chunk in stream(stream_options={"include_usage": False}))
    asked = stream(stream_options={"include_usage": True})
    assert asked[-1].choices == []
    assert asked[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in asked[:-1])


def test_a_stream_is_events_and_ends_with_done(assay: Server) -> None:
    answer = post(
        assay, "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 4, "stream": True}
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_no_answer_has_a_null_that_openai_leaves_out(assay: Server) -> None:
    answer = post(
        assay, "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 2, "logprobs": True}
    ).json()
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert answer["choices"][0].keys() == {"index", "message", "logprobs", "finish_reason"}
    assert answer["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert answer["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    response = post(assay, "/v1/responses", {"model": MODEL, "input": "Hi", "max_output_tokens": 2}).json()
    assert not {"kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages"} & response.keys()
    assert response["error"] is None


def test_every_answer_says_how_long_it_took_and_what_it_is_called(assay: Server) -> None:
    for path, body in (
        ("/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 1}),
        ("/v1/chat/completions", {"model": "nobody"}),
        ("/tokenize", {"model": MODEL, "prompt": "x"}),
    ):
        answer = post(assay, path, body)
        assert answer.headers["x-request-id"].startswith("req-")
        assert 0 <= int(answer.headers["openai-processing-ms"]) < 60_000
        named = post(assay, path, body, {b"x-request-id": "callerä <7>;".encode() + b"x" * 200})
        assert named.headers["x-request-id"] == "caller7" + "x" * 121


def test_the_official_client_raises_its_own_exception_for_each_refusal(assay: Server) -> None:
    client = assay.client()
    long: Any = [{"role": "user", "content": "word " * 4000}]
    cases: list[tuple[type[openai.APIStatusError], str | None, dict[str, Any]]] = [
        (openai.BadRequestError, "context_length_exceeded", {"messages": long}),
        (openai.BadRequestError, "context_length_exceeded", {"messages": QUESTION, "max_tokens": 100_000}),
        (openai.BadRequestError, "unsupported_parameter", {"extra_body": {"priority": -1}}),
        (openai.BadRequestError, "unsupported_parameter", {"extra_body": {"vllm_xargs": {"a": 1}}}),
        (openai.BadRequestError, "unsupported_parameter", {"extra_body": {"kv_transfer_params": {}}}),
        (openai.BadRequestError, "invalid_value", {"n": 1000}),
        (openai.BadRequestError, "invalid_value", {"extra_body": {"stream": "yes"}}),
        (openai.BadRequestError, None, {"temperature": -3}),
        (openai.NotFoundError, "model_not_found", {"model": "gpt-4o"}),
    ]
    for stream in (False, True):
        for kind, code, fields in cases:
            asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 2, "stream": stream} | fields
            with pytest.raises(kind) as refusal:
                client.chat.completions.create(**asked)
            assert type(refusal.value) is kind, fields
            assert refusal.value.code == code, (fields, refusal.value)
            assert isinstance(refusal.value.body, dict)
            assert refusal.value.body.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_too_long_a_prompt_has_its_code_on_every_path(assay: Server, path: str) -> None:
    text = "word " * 4000
    for stream in (False, True):
        field = "input" if path == "/v1/responses" else "prompt"
        answer = post(assay, path, {"model": MODEL, field: text, "stream": stream})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/docs", 404),
        ("POST", "/collective_rpc", 404),
        ("GET", "/v1/chat/completions/render", 404),
    ],
)
def test_what_does_not_exist_is_said_in_the_envelope(assay: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{assay.url}{path}", timeout=30)
    assert answer.status_code == status
    error_of(answer)
    assert answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"model":"\xc3("}', b"[" * 100_000, b'"' + b"a" * 1000]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_what_is_not_json_is_said_in_the_envelope(assay: Server, path: str, body: bytes) -> None:
    answer = post(assay, path, body)
    assert answer.status_code == 400
    error_of(answer)


def test_an_oversized_body_is_refused_before_it_is_sent(assay: Server) -> None:
    with httpx.stream(
        "POST",
        f"{assay.url}/v1/chat/completions",
        content=(b" " * (1 << 20) for _ in range(1000)),
        timeout=30,
    ) as answer:
        answer.read()
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


def test_a_picture_is_refused_and_its_address_not_fetched(assay: Server) -> None:
    pixel = base64.b64encode(b"GIF89a").decode()
    for url in ("http://127.0.0.1:9/x.png", "file:///etc/hostname", f"data:image/gif;base64,{pixel}"):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        answer = post(
            assay, "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        )
        assert answer.status_code == 400, answer.text
        error_of(answer)


def test_requests_of_the_same_id_at_once_get_their_own_answers(assay: Server) -> None:
    request = {"model": MODEL, "prompt": "A", "max_tokens": 32, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client:
        streams = [
            client.stream(
                "POST", f"{assay.url}/v1/completions", json=request, headers={"x-request-id": "the-same"}
            )
            for _ in range(4)
        ]
        opened = [stream.__enter__() for stream in streams]
        texts = ["".join(answer.iter_text()) for answer in opened]
        for stream in streams:
            stream.__exit__(None, None, None)
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    assert all(text.count("data: ") >= 10 for text in texts)


def test_nothing_but_the_gateways_own_paths_reaches_an_engine(assay: Server) -> None:
    for path in ("/v1/../metrics", "/v1/chat/completions/..", "//v1/models", "/v1/chat%2fcompletions"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{assay.url}{path}", timeout=10)
        assert refusal.value.code in (404, 405), path


def test_a_serving_engine_has_no_way_to_be_broken(assay: Server) -> None:
    key = assay.engine("Turbo")[0].environ()["VLLM_API_KEY"]
    address, headers = f"http://127.0.0.1:{assay.engine_port('Turbo')}", {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=address, headers=headers, timeout=60) as engine:
        assert engine.post(FAULT_ROUTE, json={"fault": "layer-dropped"}).status_code == 404
        assert [worker["takes_faults"] for worker in engine.get(READING_ROUTE).json()] == [False]
