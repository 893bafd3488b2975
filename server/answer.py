"""The engine's answers as OpenAI gives them: what vLLM adds or leaves null is taken away, what it took is read.

Knows both formats; knows nothing of connections. A chunk of text passes as it is, since only the last of a stream
has to be read.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec

from server.engines.refused import EngineRefused
from server.errors import Refusal, envelope, error_event

Fields = dict[str, Any]


class EngineBroke(Exception):
    """The engine's answer ended, or said itself that it failed, before it was whole."""


_Count = Annotated[int, msgspec.Meta(ge=0)] | None


class _Details(msgspec.Struct):
    cached_tokens: _Count = None


class _Account(msgspec.Struct):
    prompt_tokens: _Count = None
    input_tokens: _Count = None
    completion_tokens: _Count = None
    output_tokens: _Count = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever an engine says that is not as it should be is its failure, and none of the gateway's."""
    try:
        yield
    except (msgspec.DecodeError, RecursionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise EngineBroke(f"{what} is not understood ({type(error).__name__})") from error


class AnswerGivenUp(EngineBroke):
    """The engine gave this answer up, and is well: no token fitted the form that was asked for."""

    _SAYING = "Internal server error"
    """vLLM 0.32, of an answer that its scheduler ended; of all else that breaks it says something else."""

    @classmethod
    def or_broke(cls, said: EngineRefused, what: str) -> EngineBroke:
        """Which of the two it is."""
        return cls(what) if str(said) == cls._SAYING else EngineBroke(what)


@dataclass(frozen=True)
class Usage:
    """What a request took, in tokens."""

    prompt: int = 0
    answer: int = 0
    cached: int = 0
    """Of the prompt, those that were in the cache."""

    @classmethod
    def read(cls, usage: Any) -> "Usage | None":
        """From the engine's account in either of OpenAI's spellings; None without one.

        Raises:
            msgspec.ValidationError: it is no such account.
        """
        if usage is None:
            return None
        told = msgspec.convert(usage, _Account)
        details = told.prompt_tokens_details or told.input_tokens_details
        return cls(
            prompt=told.prompt_tokens or told.input_tokens or 0,
            answer=told.completion_tokens or told.output_tokens or 0,
            cached=details.cached_tokens or 0 if details else 0,
        )


class Events(Protocol):
    """A stream of one format: fed whole events, it says what of them the caller gets."""

    usage: Usage | None
    ended: bool
    """Whether the last event has come."""
    failure: Exception | None
    """What one of them said went wrong: `EngineBroke`, or `EngineRefused` with the request."""
    seen: int
    """Events given on so far: most are a token."""

    def take(self, events: bytes) -> bytes:
        """What the caller gets of these; nothing from a failure on."""

    def error(self, refusal: Refusal) -> bytes:
        """The event that ends a stream which cannot go on."""


class TextEvents:
    """Streams of chat and text completions, which end with [DONE]."""

    _ERROR = b'data: {"error"'
    """How vLLM begins one. Quotes inside a chunk's text are escaped, so text never matches."""
    _USAGE = b'"choices":[]'
    _END = b"data: [DONE]\n\n"

    def __init__(self, *, show_usage: bool) -> None:
        self._show_usage = show_usage
        self.usage: Usage | None = None
        self.ended = False
        self.failure: Exception | None = None
        self.seen = 0

    def take(self, events: bytes) -> bytes:
        self.seen += events.count(b"\n\n")
        if self._ERROR in events:
            events, self.failure = _split_at_failure(events, self._ERROR)
        if self._USAGE in events:
            with _reading("an event"):
                events = self._without_usage(events)
        self.ended = self.ended or events.endswith(self._END)
        return events

    def error(self, refusal: Refusal) -> bytes:
        return error_event(refusal)

    def _without_usage(self, events: bytes) -> bytes:
        begin, end = _event_around(events, events.find(self._USAGE))
        chunk: Fields = msgspec.json.decode(events[begin:end].removeprefix(b"data: "))
        self.usage = Usage.read(chunk.get("usage"))
        if not self._show_usage:
            return events[:begin] + events[end:]
        _drop_outer_nulls(chunk)
        return events[:begin] + b"data: " + msgspec.json.encode(chunk) + b"\n\n" + events[end:]


class ResponseEvents:
    """Streams of /v1/responses, whose last event carries the whole response.

    The first say only that there is one, and vLLM sends them before it has looked at all that is asked for. They
    are held back until another follows, so that what it refuses only then can still be answered with the refusal.
    """

    _ERROR = b"event: error\n"
    _WHOLE = re.compile(
        rb"^event: response\.(created|queued|in_progress|completed|incomplete|failed)$", re.MULTILINE
    )
    """Events with the whole response in them; all others pass as they are."""
    _OPENING = re.compile(rb"(?:event: response\.(?:created|queued|in_progress)\ndata: [^\n]*\n\n)*")

    def __init__(self) -> None:
        self._held = b""
        self.usage: Usage | None = None
        self.ended = False
        self.failure: Exception | None = None
        self.seen = 0

    def take(self, events: bytes) -> bytes:
        if self._ERROR in events:
            events, self.failure = _split_at_failure(events, self._ERROR)
        if self._WHOLE.search(events):
            with _reading("an event"):
                each = (self._cleaned(event) for event in events.split(b"\n\n") if event)
                events = b"".join(event + b"\n\n" for event in each)
        if not self.seen:
            self._held += events
            if self._OPENING.fullmatch(self._held):
                return b""
            events = self._held
        self.seen += events.count(b"\n\n")
        return events

    def error(self, refusal: Refusal) -> bytes:
        # OpenAI's error event, and the envelope in it, which the official clients raise.
        fields = {"type": "error", "sequence_number": self.seen, "message": str(refusal)}
        fields |= {"code": refusal.code, "param": refusal.param} | msgspec.json.decode(envelope(refusal))
        return b"event: error\ndata: " + msgspec.json.encode(fields) + b"\n\n"

    def _cleaned(self, event: bytes) -> bytes:
        if not self._WHOLE.match(event):
            return event
        head, _, data = event.partition(b"\ndata: ")
        fields: Fields = msgspec.json.decode(data)
        response: Fields = fields["response"]
        clean_response(response)
        if response.get("status") in ("completed", "incomplete", "failed"):
            self.usage = Usage.read(response.get("usage"))
            self.ended = True
            # vLLM calls a response completed that the limit of tokens cut.
            head = b"event: response." + response["status"].encode()
            fields["type"] = f"response.{response['status']}"
        return head + b"\ndata: " + msgspec.json.encode(fields)


def whole_answer(body: bytes, clean: Callable[[Fields], None]) -> tuple[bytes, Usage | None]:
    """A complete answer as OpenAI would give it, and what it took.

    Raises:
        EngineBroke: it is no such answer.
    """
    with _reading("its answer"):
        answer: Fields = msgspec.json.decode(body)
        usage = Usage.read(answer.get("usage"))
        clean(answer)
        return msgspec.json.encode(answer), usage


class _Rendered(msgspec.Struct):
    token_ids: list[int]


def rendered_tokens(body: bytes) -> int:
    """How many tokens vLLM's render routes say that there are, in the longest of the prompts.

    Raises:
        EngineBroke: it is not understood.
    """
    with _reading("what it made of the prompt"):
        rendered = msgspec.json.decode(body, type=_Rendered | list[_Rendered])
    prompts = rendered if isinstance(rendered, list) else [rendered]
    return max((len(prompt.token_ids) for prompt in prompts), default=0)


def clean_completion(answer: Fields) -> None:
    """Of a chat or text completion: what vLLM says null where OpenAI says nothing."""
    _drop_outer_nulls(answer)
    for choice in answer.get("choices", ()):
        _drop_nulls(choice, keep=("logprobs", "finish_reason"))
        if message := choice.get("message"):
            _drop_nulls(message, keep=("content", "refusal"))


def clean_response(response: Fields) -> None:
    """Of a response: fields of vLLM's own, while they are null."""
    for name in ("kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages"):
        if response.get(name) is None:
            response.pop(name, None)
    response.setdefault("error", None)
    if response.get("metadata") is None:
        response["metadata"] = {}
    for item in [*response.get("output", ()), *response.get("tools", ())]:
        _drop_nulls(item)
        for part in item.get("content") or ():
            _drop_nulls(part)


def clean_nothing(answer: Fields) -> None:
    """Of an answer that is as it should be."""


def _drop_outer_nulls(answer: Fields) -> None:
    _drop_nulls(answer)
    if usage := answer.get("usage"):
        _drop_nulls(usage)


def _drop_nulls(fields: Fields, keep: tuple[str, ...] = ()) -> None:
    for name in [name for name, value in fields.items() if value is None and name not in keep]:
        del fields[name]


def _event_around(events: bytes, position: int) -> tuple[int, int]:
    begin = events.rfind(b"\n\n", 0, position)
    return 0 if begin < 0 else begin + 2, events.find(b"\n\n", position) + 2


def _split_at_failure(events: bytes, mark: bytes) -> tuple[bytes, Exception]:
    """What came before an error event, and what that says: of the request, or of the engine."""
    begin, end = _event_around(events, events.find(mark))
    refused = EngineRefused.read(None, events[begin:end].partition(b"data: ")[2])
    if refused.status in EngineRefused.STATUSES:
        return events[:begin], refused
    return events[:begin], AnswerGivenUp.or_broke(refused, "it says so itself")
