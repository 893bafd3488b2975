"""What callers ask and are answered, as attributes of a span; only where the config asks for it, and bounded."""

from collections.abc import Iterable
from typing import Any

import msgspec
from openinference.semconv.trace import MessageAttributes, OpenInferenceMimeTypeValues, SpanAttributes

MOST = 16_384
"""Characters of a text that a span keeps: some thousand spans wait in memory while nobody takes them."""
MOST_MESSAGES = 128

Attributes = dict[str, str]


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None

    @property
    def said(self) -> str:
        within = self.delta or self.message
        return (within.content if within else self.text) or ""


class _Part(msgspec.Struct):
    text: str | None = None


class _Item(msgspec.Struct):
    content: list[_Part] | None = None


class _Answer(msgspec.Struct):
    """A chunk of a stream of completions, one of a response, or either as a whole."""

    choices: list[_Choice] = []
    type: str = ""
    delta: str = ""
    output: list[_Item] = []


class Answer:
    """The text of one answer, gathered as it passes: the first of it, of each choice."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._room = MOST

    def take(self, body: bytes) -> None:
        """Some whole events of a stream, or a whole answer; what is neither is left out."""
        if body.startswith(b"{"):
            self._read(body)
            return
        for event in body.split(b"\n\n"):
            if self._room <= 0:
                return
            _, found, data = event.partition(b"data: ")
            if found and data.startswith(b"{"):
                self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            answer = msgspec.json.decode(data, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return  # an event of another kind, or an error's
        for choice in answer.choices:
            self._keep(choice.index, choice.said)
        if answer.type == "response.output_text.delta":
            self._keep(0, answer.delta)
        for item in answer.output:
            for part in item.content or ():
                self._keep(0, part.text or "")

    def _keep(self, index: int, text: str) -> None:
        if text and self._room > 0 and (index in self._texts or len(self._texts) < MOST_MESSAGES):
            self._texts.setdefault(index, []).append(text[: self._room])
            self._room -= len(text)

    @property
    def attributes(self) -> Attributes:
        """As OpenInference has it."""
        texts = ["".join(self._texts[index]) for index in sorted(self._texts)]
        if not texts:
            return {}
        messages = ((number, "assistant", text) for number, text in enumerate(texts))
        return {
            SpanAttributes.OUTPUT_VALUE: "\n\n".join(texts),
            SpanAttributes.OUTPUT_MIME_TYPE: OpenInferenceMimeTypeValues.TEXT.value,
        } | _messages(SpanAttributes.LLM_OUTPUT_MESSAGES, messages)


def question(body: bytes) -> Attributes:
    """What a body asks: all of it, and its messages one by one."""
    text = body.decode()
    mime = OpenInferenceMimeTypeValues.JSON if len(text) <= MOST else OpenInferenceMimeTypeValues.TEXT
    asked: Attributes = {
        SpanAttributes.INPUT_VALUE: text[:MOST],
        SpanAttributes.INPUT_MIME_TYPE: mime.value,
    }
    try:
        fields: dict[str, Any] = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return asked  # of what the gateway has no need to read, something cannot be
    messages = fields.get("messages", fields.get("input", fields.get("prompt")))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(instructions := fields.get("instructions"), str) and isinstance(messages, list):
        messages = [{"role": "system", "content": instructions}, *messages]
    if not isinstance(messages, list):
        return asked
    room, kept = MOST, []
    for number, message in enumerate(messages[:MOST_MESSAGES]):
        if isinstance(message, dict) and room > 0:
            said = _text_of(message.get("content"))[:room]
            room -= len(said)
            kept.append((number, str(message.get("role", ""))[:40], said))
    return asked | _messages(SpanAttributes.LLM_INPUT_MESSAGES, kept)


def _text_of(content: object) -> str:
    """A message's text, which may be in parts."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _messages(where: str, messages: Iterable[tuple[int, str, str]]) -> Attributes:
    attributes = {}
    for number, role, text in messages:
        attributes[f"{where}.{number}.{MessageAttributes.MESSAGE_ROLE}"] = role
        attributes[f"{where}.{number}.{MessageAttributes.MESSAGE_CONTENT}"] = text
    return attributes
