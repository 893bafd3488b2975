"""A fake vLLM 0.32 server that costs next to nothing: what a gateway adds is then all that is measured.

usage: python -m tests.bench.upstream --port PORT

Its bytes are those of a real engine but for their text: the same headers, the same fields, the same events to a
write. A streamed answer is ``max_tokens`` events, `INTERVAL_S` apart.
"""

import argparse
import asyncio
import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any, cast

import httptools
import uvloop

MODEL = "SmolLM2-135M-Instruct"
"""What it is called, in front of every gateway too."""
INTERVAL_S = 0.01
TOKENS = 40
"""Of an answer that is not streamed."""
TEXT = (
    "The sky is blue because air scatters short waves of light more than long ones , which is called Rayleigh "
    "scattering ; in the evening the light has come a longer way and what is left of it is red ."
)

_ID = "chatcmpl-9186102cc6bc774b"
_CREATED = 1795268498
_FINGERPRINT = "vllm-0.32.0-e248af44"
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')
_STREAMED = re.compile(rb'"stream": ?true')
_USAGE_WANTED = re.compile(rb'"include_usage": ?true')
_DATE = b"date: Sat, 21 Nov 2026 13:41:37 GMT\r\nserver: uvicorn\r\n"


def tokens_of(count: int) -> list[str]:
    """The answer of ``count`` tokens, token by token."""
    return [f" {word}" for word in islice(cycle(TEXT.split()), count)]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _reply(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\ncontent-type: application/json\r\nvary: Origin\r\n\r\n"
    return head % (_DATE, len(body)) + body


def whole() -> bytes:
    """The answer that is not streamed."""
    message = {
        "role": "assistant",
        "content": "".join(tokens_of(TOKENS)),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
    }
    usage = {
        "prompt_tokens": 36,
        "total_tokens": 36 + TOKENS,
        "completion_tokens": TOKENS,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    answer = {
        "id": _ID,
        "object": "chat.completion",
        "created": _CREATED,
        "model": MODEL,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": _FINGERPRINT,
        "usage": usage,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    return _reply(_json(answer))


_BEGIN = (
    b"HTTP/1.1 200 OK\r\n" + _DATE + b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _part(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def _chunk(choices: Sequence[dict[str, Any]], **further: Any) -> bytes:
    head = {"id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": MODEL, "choices": choices}
    return _part(_json(head | further))


def _event(token: str, **ended: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": token}, "logprobs": None, "finish_reason": None}
    return _chunk([choice | ended | {"token_ids": None}])


@cache
def stream(count: int, usage: bool) -> tuple[bytes, ...]:
    """What is written at each interval. As vLLM does, the first and the last token's event do not come alone."""
    tokens = tokens_of(count)
    writes = [_event(token) for token in tokens]
    writes[-1] = _event(tokens[-1], finish_reason="length", stop_reason=None)
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    writes[0] = _BEGIN + _chunk([role], prompt_token_ids=None, prompt_text=None) + writes[0]
    if usage:
        counted = {"prompt_tokens": 36, "total_tokens": 36 + count, "completion_tokens": count}
        writes[-1] += _chunk([], usage=counted, system_fingerprint=_FINGERPRINT)
    writes[-1] += _part(b"[DONE]") + b"0\r\n\r\n"
    return tuple(writes)


_MODELS = {
    "object": "list",
    "data": [{"id": MODEL, "object": "model", "created": _CREATED, "owned_by": "vllm", "max_model_len": 2048}],
}
_ROUTES = {
    b"/health": b"HTTP/1.1 200 OK\r\n" + _DATE + b"content-length: 0\r\nvary: Origin\r\n\r\n",
    b"/version": _reply(_json({"version": "0.32.0"})),
    b"/v1/models": _reply(_json(_MODELS)),
    b"/v1/chat/completions": whole(),
}
_MISSING = b"HTTP/1.1 404 Not Found\r\n" + _DATE + b"content-length: 0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection; a request at a time, as HTTP/1.1 clients send them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A gateway is there."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""

    def data_received(self, data: bytes) -> None:
        """A part of a request, or of several."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Called by the parser, like all that follow."""
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        """The path."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer, at once or in time."""
        if self._url == b"/v1/chat/completions" and _STREAMED.search(self._body):
            asked = _MAX_TOKENS.search(self._body)
            writes = stream(int(asked[1]) if asked else TOKENS, bool(_USAGE_WANTED.search(self._body)))
            self._write(writes, 0, asyncio.get_running_loop().time())
        else:
            self._transport.write(_ROUTES.get(self._url, _MISSING))

    def _write(self, writes: Sequence[bytes], position: int, began: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(writes[position])
        position += 1
        if position < len(writes):
            # By the clock and not after the last one: what is late does not make the rest late.
            loop = asyncio.get_running_loop()
            loop.call_at(began + position * INTERVAL_S, self._write, writes, position, began)


async def main() -> None:
    """Serve on loopback until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", options.port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
