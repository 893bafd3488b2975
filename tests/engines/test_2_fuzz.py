"""Whatever callers send to real engines: no 5xx, no hang, answers as documented, and nothing of it in a log."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.openapi.operations import OPERATIONS
from tests.engines.conftest import MODEL, Server

pytestmark = pytest.mark.timeout(600)
HANG_S = 60
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CHAT, TEXT, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
LONGEST = {CHAT: "max_completion_tokens", TEXT: "max_tokens", RESPONSES: "max_output_tokens"}
"""By path, the field that bounds what is generated."""
CASES = 8
"""For each operation with a body, and as many that are not as documented."""
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2},
    TEXT: {"prompt": "Hello.", "max_tokens": 2},
    RESPONSES: {"input": "Hello.", "max_output_tokens": 2},
    TOKENIZE: {"prompt": "Hello."},
    "/detokenize": {"tokens": [1]},
}


def post(assay: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": MODEL} | ASK[path] | body).encode()
    return client().post(f"{assay.url}{path}", content=content, headers=headers)


@cache
def client() -> httpx.Client:
    """One for all: each would read the machine's certificates anew."""
    return httpx.Client(timeout=HANG_S)


def is_alive(assay: Server) -> bool:
    return post(assay, CHAT, {}).status_code == 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_the_documents_examples_work(assay: Server, operation: Any) -> None:
    told = assay.get("/openapi.json")["paths"][operation.path]["post"]["requestBody"]
    examples = told["content"]["application/json"]["examples"]
    assert len(examples) == len(operation.examples)
    for example in examples.values():
        answer = client().post(f"{assay.url}{operation.path}", json=example["value"])
        assert answer.status_code == 200, (example, answer.text)
        assert '"error":{' not in answer.text


def as_documented(assay: Server, mode: GenerationMode) -> None:
    """Ask every operation for what its description allows, or for what it does not, and hold the answers to it."""
    schema = schemathesis.openapi.from_url(f"{assay.url}/openapi.json")

    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            if mode is GenerationMode.POSITIVE:
                case.body["model"] = MODEL
            longest = LONGEST.get(case.operation.path)
            for name, most in ((longest, 4), ("n", 2)):
                value = case.body.get(name, most) if name else None
                if name and (value is None or isinstance(value, int)):
                    case.body[name] = most if value is None else min(value, most)
        if case.path_parameters and mode is GenerationMode.POSITIVE:
            case.path_parameters["model"] = MODEL
        case.validate_response(case.call(timeout=HANG_S), checks=CHECKS)

    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        has_body = operation.method == "post"
        if mode is GenerationMode.NEGATIVE and not has_body:
            continue  # nothing to do wrong
        settings(
            max_examples=CASES if has_body else 1,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy(generation_mode=mode))(check))()


def test_what_the_document_allows_is_answered_as_it_says(assay: Server) -> None:
    as_documented(assay, GenerationMode.POSITIVE)


def test_what_the_document_does_not_allow_is_refused_as_it_says(assay: Server) -> None:
    as_documented(assay, GenerationMode.NEGATIVE)
    assert is_alive(assay)


_SURROGATE = "\ud800"
_HUGE = 10**30
_DEEP = "[" * 5000 + "]" * 5000
_CYCLE = {"anyOf": [{"$ref": "#"}]}
_CALL = {"name": "f", "arguments": _DEEP}


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


NASTY: list[tuple[str, dict[str, Any]]] = [
    *((path, {"kv_transfer_params": {"a": 1}}) for path in LONGEST),
    *((path, {"vllm_xargs": {"kv_transfer_params": "x"}}) for path in LONGEST),
    *((path, {"priority": _HUGE}) for path in LONGEST),
    *((path, {"request_id": "a\nb"}) for path in LONGEST),
    *((path, {"top_k": _HUGE}) for path in LONGEST),
    *((path, {"stop": [_SURROGATE]}) for path in LONGEST),
    *((path, {"user": _SURROGATE, "stream": True}) for path in LONGEST),
    *((path, {"structured_outputs": []}) for path in LONGEST),
    *((path, {"structured_outputs": {"json": _CYCLE}}) for path in LONGEST),
    *((path, {"structured_outputs": {"json": json.dumps(_CYCLE)}}) for path in LONGEST),
    *((path, {"structured_outputs": {"choice": ["x" * 1_000_000]}}) for path in LONGEST),
    *((path, {"stream_interval": _HUGE}) for path in (CHAT, TEXT)),
    *((path, {"repetition_detection": {"max_pattern_size": _HUGE, "min_count": 2}}) for path in (CHAT, TEXT)),
    *((path, {"bad_words": [_SURROGATE]}) for path in (CHAT, TEXT)),
    *((path, {"use_beam_search": True, "length_penalty": -5000}) for path in (CHAT, TEXT)),
    *((path, {"n": 16384}) for path in (CHAT, TEXT)),
    *((path, _schema(schema)) for path in (CHAT, TEXT) for schema in ({"$ref": "#"}, _CYCLE)),
    (CHAT, {"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    (CHAT, {"tools": [{"function": {}}], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": _CALL}]}]}),
    (CHAT, {"messages": [{}] * 10_000}),
    (TEXT, {"prompt": ["a"] * 1024, "n": 16}),
    (TEXT, {"logit_bias": {f"bad{number}": 1 for number in range(100_000)}}),
    (RESPONSES, {"input": [{"type": "function_call", "call_id": "1"} | _CALL]}),
    (RESPONSES, {"input": [{"type": "message", "role": "assistant", "content": []}]}),
    (RESPONSES, {"input": [{}] * 3000}),
    (RESPONSES, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}] * 3000}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "s", "schema": _CYCLE}}}),
    (RESPONSES, {"background": True}),
    (TOKENIZE, {"prompt": "x" * 2_000_000}),
    ("/detokenize", {"tokens": [-1] * 100_000}),
]
"""Bodies that plain vLLM 0.32 answers with a 500 or not for minutes, or of which it or its machine dies."""


def test_what_breaks_a_plain_engine_is_refused_here(assay: Server) -> None:
    for path, body in NASTY:
        answer = post(assay, path, body)
        assert 400 <= answer.status_code < 500, (path, str(body)[:200], answer.text[:500])
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.elapsed.total_seconds() < 5, (path, str(body)[:200])
        assert len(answer.content) < 2000
    assert is_alive(assay)
    assert assay.metric("assay_engine_ejections_total", "Reference") == 0


LATE: list[dict[str, Any]] = [
    {"logit_bias": {"4000000000": 1}},
    {"stop_token_ids": [4_000_000_000]},
    {"structured_outputs": {"regex": "(["}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "string", "pattern": "(["}}}},
    {"top_logprobs": 50, "include": ["message.output_text.logprobs"]},
]
"""What vLLM 0.32 refuses only after it has begun to stream the response, whose connection it then cuts."""


@pytest.mark.parametrize("body", LATE, ids=lambda body: next(iter(body)))
def test_what_the_engine_refuses_late_is_refused_alike_whether_streamed_or_not(
    assay: Server, body: dict[str, Any]
) -> None:
    broken = assay.metric("assay_streams_broken_total", "Reference")
    whole, streamed = (post(assay, RESPONSES, body | {"stream": stream}) for stream in (False, True))
    assert (whole.status_code, streamed.status_code) == (400, 400), streamed.text
    assert streamed.json()["error"].keys() == {"message", "type", "param", "code"}
    assert streamed.json()["error"]["param"] == whole.json()["error"]["param"]
    with pytest.raises(openai.BadRequestError):
        assay.client().responses.create(model=MODEL, input="Hello.", stream=True, extra_body=body)
    assert assay.metric("assay_engine_ejections_total", "Reference") == 0
    assert assay.metric("assay_streams_broken_total", "Reference") == broken


SECRET = "pr0mpt-mark"
"""What no log may hold."""
FORGED = f"{SECRET}\r\n\x1b[31m2026-01-01 ERROR {SECRET}\x07\x85\u2028"
KEY = f"sk-assay-{'f' * 12}-{SECRET}"


@pytest.fixture
def logged(assay: Server) -> Callable[[], dict[Path, str]]:
    """What every log says from now on, by file."""
    sizes = {path: path.stat().st_size for path in log_files(assay)}
    return lambda: {path: path.read_bytes()[sizes.get(path, 0) :].decode() for path in log_files(assay)}


def log_files(assay: Server) -> list[Path]:
    return [assay.log, *(assay.log.parent / "logs").glob("*.log")]


def forgeries() -> Iterator[tuple[str, dict[str, Any]]]:
    """A text that is no log's business, in every place where a caller can say something."""
    schema = {"type": "object", "properties": {FORGED: {"enum": [FORGED], "description": FORGED}}}
    schemas = [
        schema,
        {"type": FORGED},
        {"$ref": FORGED},
        {"$ref": f"#/{FORGED}"},
        {"type": "string", "format": FORGED},
        {"type": "string", "pattern": FORGED},
        {"type": "string", "pattern": f"(?={FORGED})"},
        {"oneOf": [{"const": FORGED}, {"const": FORGED}]},
        {"type": "object", "patternProperties": {FORGED: {}}, "propertyNames": {"pattern": FORGED}},
        {FORGED: FORGED},
    ]
    for path in ASK:
        for name in (FORGED, "model", "precision", "user", "cache_salt", "request_id", "priority"):
            yield path, {name: FORGED}
    for role in ("user", "system", "assistant", "tool", FORGED):
        yield CHAT, {"messages": [{"role": role, "content": FORGED, "name": FORGED, FORGED: FORGED}]}
        for part in ({"type": "text", "text": FORGED}, {"type": FORGED, FORGED: FORGED}, {FORGED: FORGED}):
            yield CHAT, {"messages": [{"role": role, "content": [part]}]}
    yield TOKENIZE, {"messages": [{"role": "system", "content": [{"type": FORGED}]}]}
    for path in (TEXT, TOKENIZE):
        yield path, {"prompt": FORGED}
    for path in LONGEST:
        for name, value in (
            ("stop", [FORGED]),
            ("metadata", {FORGED: FORGED}),
            ("structured_outputs", {"regex": FORGED}),
            ("structured_outputs", {"choice": [FORGED]}),
            ("structured_outputs", {"grammar": FORGED}),
            ("structured_outputs", {"structural_tag": FORGED}),
            ("structured_outputs", {"json": FORGED}),
            ("structured_outputs", {FORGED: FORGED}),
            ("response_format", {"type": FORGED}),
            ("tool_choice", FORGED),
            ("logit_bias", {FORGED: 1}),
            ("seed", FORGED),
            ("stream_options", {FORGED: FORGED}),
            ("truncation_side", FORGED),
            ("chat_template", FORGED),
            ("chat_template_kwargs", {FORGED: FORGED, "chat_template": FORGED}),
            ("reasoning_effort", FORGED),
        ):
            yield path, {name: value}
    for path in (CHAT, TEXT):
        yield path, {"bad_words": [FORGED], "stream": True, "allowed_token_ids": [1 << 31]}
    yield CHAT, {"documents": [{FORGED: FORGED}]}
    yield RESPONSES, {"instructions": FORGED, "input": [{"role": "user", "content": FORGED}]}
    yield RESPONSES, {"input": [{"type": FORGED}]}
    yield RESPONSES, {"include": [FORGED]}
    yield RESPONSES, {"service_tier": FORGED}
    for each in schemas:
        function = {"name": FORGED, "description": FORGED, "parameters": each, "strict": True}
        yield CHAT, _schema(each)
        yield CHAT, {"tools": [{"type": "function", "function": function}]}
        yield TEXT, {"structured_outputs": {"json": each}, "stream": True}
        yield RESPONSES, {"text": {"format": {"type": "json_schema", "name": FORGED, "schema": each}}}
        yield RESPONSES, {"structured_outputs": {"json": each}, "stream": True}
        yield RESPONSES, {"tools": [{"type": "function"} | function]}


def test_nothing_that_callers_say_is_in_a_log(assay: Server, logged: Callable[[], dict[Path, str]]) -> None:
    def ask(path: str, body: dict[str, Any]) -> None:
        answer = post(assay, path, body, headers={"x-request-id": "find-me"})
        assert answer.status_code < 500, (path, body, answer.text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, *zip(*forgeries(), strict=True)))
    for name in ("authorization", "user-agent", "traceparent", "x-vllm-priority", "content-type"):
        headers = {name.encode(): SECRET.encode() + b"\x1b[31m\x85\xff"}
        client().post(f"{assay.url}{CHAT}", content=b"{}", headers=headers)
    for value in (b"Bearer " + KEY.encode(), b"\x1b[31mid\x85\xff"):
        headers = {b"x-request-id": value, b"authorization": value}
        client().post(f"{assay.url}{CHAT}", content=b"{}", headers=headers)
    for path in ("/", "/v1/models/", "/v1/tiers/", "/v1/chat/", "/metrics/"):
        forged = f"{assay.url}{path}{quote(FORGED, safe='')}?{quote(FORGED)}"
        for method in ("GET", "POST", SECRET.upper()):
            client().request(method, forged)
    logs = logged()
    assert any("find-me" in text for text in logs.values()), "requests can be found by their id"
    assert not any("Logging error" in path.read_text(errors="replace") for path in logs)
    # vLLM ends the lines of a traceback so.
    lines = [(path.name, line.removesuffix("\r")) for path, text in logs.items() for line in text.split("\n")]
    assert [told for told in lines if SECRET in told[1].lower() or not told[1].isprintable()] == []
