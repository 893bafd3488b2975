"""One HTTP answer of a gateway, held against what the upstream said."""

from dataclasses import dataclass, field

import msgspec

from tests.bench import upstream


class WrongAnswer(Exception):
    """A gateway answered something else than the upstream did, or not at all."""


@dataclass
class Answer:
    """One HTTP answer, as it comes."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    reads: int = 0
    first_s: float = 0.0
    seconds: float = 0.0


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    delta: _Message = msgspec.field(default_factory=_Message)


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Body(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


def check_whole(answer: Answer) -> None:
    """Hold an answer against what the upstream says.

    Raises:
        WrongAnswer: it is not that.
    """
    if answer.status != 200:
        raise WrongAnswer(f"status {answer.status}: {bytes(answer.body[:300])!r}")
    said = msgspec.json.decode(answer.body, type=_Body)
    if said.choices[0].message.content != "".join(upstream.tokens_of(upstream.TOKENS)):
        raise WrongAnswer(f"another text: {bytes(answer.body[:300])!r}")
    if said.usage is None or said.usage.completion_tokens != upstream.TOKENS:
        raise WrongAnswer(f"another usage: {bytes(answer.body[-300:])!r}")


def check_stream(answer: Answer, tokens: int) -> list[str]:
    """Hold a stream against what it has to be: events, the usage of as many tokens, the end. Its texts.

    Raises:
        WrongAnswer: it is not that.
    """
    if answer.status != 200:
        raise WrongAnswer(f"status {answer.status}: {bytes(answer.body[:300])!r}")
    *events, end = [event for event in bytes(answer.body).replace(b"\r\n", b"\n").split(b"\n\n") if event]
    if end != b"data: [DONE]":
        raise WrongAnswer(f"the stream ended with {end[-300:]!r}")
    data = [event.removeprefix(b"data: ") for event in events if not event.startswith(b":")]
    said = [msgspec.json.decode(each, type=_Body) for each in data]
    if [body.usage.completion_tokens for body in said if body.usage] != [tokens]:
        raise WrongAnswer(f"the usage is missing or another: {events[-2:]!r}")
    return [choice.delta.content for body in said for choice in body.choices if choice.delta.content]
