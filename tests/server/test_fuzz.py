"""Whatever a caller sends and an engine answers: an answer in the envelope, in time, and nothing of it in a log.

With HYPOTHESIS_PROFILE=long it looks for longer, and elsewhere each time.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from server.call import FORBIDDEN
from server.engines.patience import Patience
from server.keys import KeyFile
from server.openapi.operations import OPERATIONS
from tests.server.conftest import Answer, Gateway, running_gateway
from tiers.source import EMBEDDED_MODEL

HANG_S = 10.0
MARK = "qZ7mark"
"""What no log may repeat."""
SENT_TO_ENGINES = {"x-request-id", "authorization", "content-type", "content-length", "host"}
_calm = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
settings.register_profile("short", _calm, max_examples=60, derandomize=True)
settings.register_profile("long", _calm, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

PATHS = [operation.path for operation in OPERATIONS]
MODEL: dict[str, Any] = {"model": EMBEDDED_MODEL}
BODIES = {o.path: [MODEL | body for body in o.examples.values()] for o in OPERATIONS}
_SCHEMA = {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#"}, "const": 1, "enum": ["x"]}}}
_CALL = {"name": "f", "arguments": '{"a":[1]}'}
_TOOL_CALL = {"id": "1", "type": "function", "function": _CALL}
BODIES["/v1/chat/completions"].append(
    MODEL
    | {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [_TOOL_CALL],
            },
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}},
        "structured_outputs": {"json": _SCHEMA},
        "repetition_detection": {"max_pattern_size": 2, "min_count": 2},
        "logit_bias": {"7": 1.5},
        "stream": True,
        "stream_options": {"include_usage": False},
    }
)
BODIES["/v1/responses"].append(
    MODEL
    | {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "1", **_CALL},
            {"type": "function_call_output", "call_id": "1", "output": "b"},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "c"}]},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a", "logprobs": [{"token": "a", "logprob": -1.5}]}],
            },
        ],
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA, "strict": True}],
        "text": {"format": {"type": "json_schema", "name": "s", "schema": _SCHEMA}},
        "metadata": {"a": "b"},
        "truncation": None,
    }
)
DOCUMENTED = {name for o in OPERATIONS for model in o.requests for name in model.model_fields}
NAMES = sorted({*FORBIDDEN, *DOCUMENTED, "use_beam_search", "conversation", "background", "__proto__", ""})

# What JSON can say: halves of surrogate pairs and NUL among its texts, and numbers that no machine word holds.
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["", "\ud800", "a\udfff", "\x00", MARK, f"\x1b[31m{MARK}\r\n", "{{7*7}}"]),
    st.just(100_000).map("x".__mul__),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, -(2**63), 2**63, 2**64, 10**30, -1, 0, 1e308, float("inf")]),
    st.just(400).map(lambda digits: 10**digits),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.sampled_from(NAMES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(texts, st.sampled_from(NAMES)), inner, max_size=4)
    ),
    max_leaves=8,
)


references = st.one_of(st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/a/0", "http://x/y#/a", "#%"]), texts)
schemas = st.recursive(
    st.one_of(values, st.fixed_dictionaries({"$ref": references})),
    lambda inner: st.dictionaries(
        st.sampled_from(["$ref", "$defs", "properties", "items", "anyOf", "enum", "pattern", "minimum", "a", "b"]),
        st.one_of(inner, references, st.lists(inner, max_size=3)),
        max_size=3,
    ),
    max_leaves=6,
)
SCHEMAS: dict[str, Callable[[Any], Any]] = {
    "response_format": lambda schema: {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    "structured_outputs": lambda schema: {"json": schema},
    "text": lambda schema: {"format": {"type": "json_schema", "name": "s", "schema": schema}},
    "tools": lambda schema: [{"type": "function", "name": "f", "function": {"name": "f", "parameters": schema}}],
}
deep = st.sampled_from([5, 90, 250, 900, 100_000]).flatmap(
    lambda depth: st.sampled_from([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
)


@st.composite
def somewhat_wrong(draw: st.DrawFn, value: Any) -> Any:
    """The value, with something else in one place, or nothing."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    places = [place for place, _ in inside]
    if not places or draw(st.integers(0, 3)) == 0:
        return draw(values)
    place = draw(st.sampled_from(places))
    changed = value.copy()
    if draw(st.integers(0, 3)) == 0:
        del changed[place]
    else:
        changed[place] = draw(somewhat_wrong(value[place]))
    return changed


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A body that was good, with some of it changed."""
    fields = draw(st.sampled_from(BODIES[path]))
    how = draw(
        st.sampled_from(
            ["inside", "inside", "field", "field", "schema", "twice", "deep", "cut", "inserted", "escaped"]
        )
    )
    if how == "inside":
        fields = draw(somewhat_wrong(fields))
    elif how == "schema":
        place = draw(st.sampled_from(sorted(SCHEMAS)))
        fields = fields | {place: SCHEMAS[place](draw(schemas))}
    elif how == "field":
        fields = fields | draw(st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=3))
    body = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    body = body.replace(b"Infinity", b"1e999")
    name = draw(st.sampled_from(NAMES)).encode()
    at = draw(st.integers(0, len(body)))
    if how == "twice":
        body = b'{"%s":%s,%s' % (name, json.dumps(draw(values)).encode(), body[1:])
    elif how == "deep":
        body = body[:-1] + b',"%s":%s}' % (name, draw(deep))
    elif how == "cut":
        body = body[:at]
    elif how == "inserted":
        body = body[:at] + draw(st.binary(max_size=4)) + body[at:]
    elif how == "escaped":
        name = draw(st.sampled_from(FORBIDDEN)).encode()
        body = body[:-1] + b',"\\u%04x%s":%s}' % (name[0], name[1:], json.dumps(draw(values)).encode())
    return body


_token = st.text("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~", min_size=1, max_size=20).map(str.encode)
_value = st.one_of(
    st.binary(max_size=60).map(lambda value: re.sub(rb"[\r\n\0]", b"", value).strip()),
    st.integers().map(lambda number: b"%d" % number),
    st.sampled_from([b"Bearer sk-assay-" + MARK.encode(), b"", b"9" * 5000, b"\xff", b"identity", b"0x10", b"+5"]),
)
headers = st.lists(
    st.tuples(
        st.one_of(
            _token,
            st.sampled_from([b"x-request-id", b"authorization", b"content-length", b"content-type", b"expect"]),
            st.sampled_from([b"content-encoding", b"transfer-encoding", b"x-vllm-priority", b"traceparent"]),
        ),
        _value,
    ),
    max_size=5,
)


class Log(logging.Handler):
    """What the gateway logged, as it would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "aiohttp.server":  # the fake engine's
            self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def log() -> Iterator[Log]:
    handler = Log()
    logger = logging.getLogger()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """In front of an engine that takes whatever is JSON and asks for nothing forbidden."""
    async with running_gateway(tmp_path_factory.mktemp("gateway")) as made:

        async def answers(request: web.Request) -> web.Response:
            fields = json.loads(made.bodies.pop().decode())
            made.seen.clear()
            own = {"request_id"} if request.path == "/v1/responses" else set()
            assert all(fields.get(name) is None for name in {*FORBIDDEN, "precision"} - own)
            assert {name.lower() for name in request.headers} <= SENT_TO_ENGINES
            return web.Response(body=b'{"id":"x","choices":[]}', content_type="application/json")

        made.handler = answers
        yield made


@pytest.fixture(scope="module")
async def locked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One that asks for a key."""
    folder = tmp_path_factory.mktemp("locked")
    KeyFile(folder / "keys.json").add("alice")
    async with running_gateway(folder) as made:
        yield made


async def ask(gateway: Gateway, log: Log, body: bytes, **how: Any) -> tuple[Answer, str | None]:
    """One request, what holds of every answer to one, and the code of its error."""
    log.lines.clear()
    async with asyncio.timeout(HANG_S):
        answer = await gateway.post(body, **how)
    assert answer.ended
    check_headers(answer.messages[0]["headers"])
    code = check_error(answer.body) if answer.status >= 400 else None
    for line in log.lines:
        assert MARK not in line
        assert line.isprintable(), repr(line)
    event(f"{answer.status} {code}")
    return answer, code


def check_headers(headers: list[tuple[bytes, bytes]]) -> None:
    for name, value in headers:
        assert re.fullmatch(rb"[a-z0-9-]+", name), name
        assert re.fullmatch(rb"[\x20-\x7e]*", value), value
    names = [name for name, _ in headers]
    assert len(set(names)) == len(names)
    assert re.fullmatch(rb"[\w.:@-]{1,128}", dict(headers)[b"x-request-id"])


def check_error(body: bytes) -> str | None:
    told = json.loads(body)
    assert told.keys() == {"error"}
    error: dict[str, Any] = told["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    for name in ("param", "code"):
        assert error[name] is None or isinstance(error[name], str)
    assert error["code"] != "internal_error"
    code: str | None = error["code"]
    return code


@given(data=st.data())
async def test_whatever_the_body_the_worst_is_a_refusal(gateway: Gateway, log: Log, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(PATHS))
    body, parts = data.draw(bodies(path)), data.draw(st.integers(1, 3))
    answer, _ = await ask(gateway, log, body, path=path, parts=parts)
    assert answer.status in (200, 400, 404, 413), answer.body


@given(raw_headers=headers, path=st.sampled_from(["/v1/models", "/metrics", *PATHS]))
async def test_whatever_the_headers_the_worst_is_a_refusal(
    gateway: Gateway, log: Log, raw_headers: list[tuple[bytes, bytes]], path: str
) -> None:
    method = "POST" if path in BODIES else "GET"
    body = json.dumps(BODIES[path][0]).encode() if path in BODIES else b""
    answer, _ = await ask(gateway, log, body, path=path, method=method, raw_headers=raw_headers)
    assert answer.status in (200, 413), answer.body


@given(raw_headers=headers)
async def test_no_header_is_taken_for_a_key(
    locked: Gateway, log: Log, raw_headers: list[tuple[bytes, bytes]]
) -> None:
    answer, code = await ask(locked, log, b"{}", raw_headers=raw_headers)
    assert answer.status == 401
    assert code in ("missing_api_key", "invalid_api_key")


@given(
    method=st.one_of(
        st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE"]), _token.map(bytes.decode)
    ),
    path=st.one_of(
        st.text(max_size=50).map("/".__add__),
        st.tuples(st.sampled_from(["/v1/models/", "/v1/tiers/", *PATHS]), st.text(max_size=10)).map("".join),
    ),
)
async def test_whatever_the_path_the_worst_is_a_refusal(
    gateway: Gateway, log: Log, method: str, path: str
) -> None:
    answer, code = await ask(gateway, log, b"", method=method, path=path)
    assert answer.status in (200, 400, 404, 405), answer.body
    assert answer.status < 400 or code is not None or path in PATHS


@dataclass
class BrokenEngine:
    """Answers on a socket, in bytes that may be no HTTP; its health is good."""

    says: bytes = b""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /health "):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        else:
            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            writer.write(self.says)
        writer.close()


@pytest.fixture(scope="module")
async def broken(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Gateway, BrokenEngine]]:
    engine = BrokenEngine()
    server = await asyncio.start_server(engine.answer, "127.0.0.1", 0)
    async with running_gateway(tmp_path_factory.mktemp("broken")) as made:
        await made.replica.stop()
        made.replica.lose_patience(Patience(eject_after_errors=1 << 60))  # or none of its answers would be read
        made.replica.connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield made, engine
    server.close()


_USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "prompt_tokens_details": None}
_ITEM = {"type": "message", "content": [{"type": "output_text", "text": "a", "logprobs": None}]}
_RESPONSE = {"status": "completed", "output": [_ITEM], "tools": [], "usage": {"input_tokens": 1}, "metadata": None}
_ERROR = {"error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}}
_DELTA = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
WHOLE: list[Any] = [
    {"id": "x", "choices": [{"index": 0, "message": {"content": "a", "audio": None}}], "usage": _USAGE},
    {"id": "x", "choices": [{"index": 0, "text": "a", "logprobs": None}], "usage": _USAGE},
    _RESPONSE,
    _ERROR,
    {"detail": "Not Found"},
    {"error": "no"},
]
EVENTS: list[list[tuple[str, Any]]] = [
    [("", _DELTA), ("", {"choices": [], "usage": _USAGE}), ("", "[DONE]")],
    [("", _DELTA), ("", _ERROR), ("", "[DONE]")],
    [
        ("event: response.created\n", {"response": _RESPONSE, "sequence_number": 0}),
        ("event: response.output_text.delta\n", {"delta": "a", "sequence_number": 1}),
        ("event: response.completed\n", {"response": _RESPONSE, "sequence_number": 2}),
    ],
    [("event: error\n", {"type": "error"})],
]


def dumped(value: Any) -> bytes:
    return b"[DONE]" if value == "[DONE]" else json.dumps(value, separators=(",", ":")).encode()


@st.composite
def answers(draw: st.DrawFn, *, streams: bool) -> bytes:
    """What an engine says: once a good answer, with some of it changed."""
    if streams != (draw(st.integers(0, 9)) == 0):
        status, kind = 200, b"text/event-stream"
        events = list(draw(st.sampled_from(EVENTS)))
        at = draw(st.integers(0, len(events) - 1))
        events[at] = (events[at][0], draw(somewhat_wrong(events[at][1])))
        body = b"".join(name.encode() + b"data: " + dumped(told) + b"\n\n" for name, told in events)
    else:
        status = draw(st.one_of(st.just(200), st.sampled_from([400, 404, 422, 500, 503]), st.integers(200, 999)))
        kind, body = b"application/json", dumped(draw(somewhat_wrong(draw(st.sampled_from(WHOLE)))))
    how = draw(
        st.sampled_from(["well", "well", "well", "cut", "inserted", "short", "long", "odd", "broken", "bare"])
    )
    at = draw(st.integers(0, len(body)))
    if how == "cut":
        body = body[:at]
    elif how == "inserted":
        body = body[:at] + draw(st.binary(max_size=5)) + body[at:]
    elif how == "odd":
        kind = draw(st.sampled_from([b"text/event-stream; charset=\xff", b"\xff", b""]))
    length = len(body) + {"short": -1, "long": 5}.get(how, 0)
    whole = b"HTTP/1.1 %d x\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (status, kind, length, body)
    return {"broken": whole[: draw(st.integers(0, len(whole)))], "bare": body}.get(how, whole)


@given(data=st.data())
async def test_whatever_the_engine_answers_the_worst_is_that_it_failed(
    broken: tuple[Gateway, BrokenEngine], log: Log, data: st.DataObject
) -> None:
    gateway, engine = broken
    path = data.draw(st.sampled_from(PATHS))
    body = data.draw(st.sampled_from(BODIES[path]))
    engine.says = data.draw(answers(streams=bool(body.get("stream"))))
    answer, code = await ask(gateway, log, json.dumps(body).encode(), path=path)
    assert code in (None, "engine_failed", "context_length_exceeded"), answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.body.endswith(b"\n\n")
    else:
        json.loads(answer.body)
