"""What the gateway reads of a body of /v1/responses.

More than of the other paths: vLLM 0.32 holds every item that it does not understand against each of its two
hundred kinds, and 12 kB of them take gigabytes. So no item passes that is not one of these.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from server.call import NULL, Generation, edited
from server.errors import FieldRefused
from server.schema import check_depth, check_schema, check_schemas

_STATELESS = "this server keeps no responses: send the whole conversation as `input`"
_NULLS = ("background", "truncation", "tools", "tool_choice", "service_tier")
"""Fields that OpenAI takes as null and vLLM refuses, for some only after it has generated the answer."""

Status = Literal["in_progress", "completed", "incomplete"] | None


class TopLogprob(msgspec.Struct, forbid_unknown_fields=True):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class Logprob(TopLogprob, forbid_unknown_fields=True):
    """The log-probability of a token of an earlier answer."""

    top_logprobs: list[TopLogprob] = []


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Literal["input_text", "output_text", "refusal", "summary_text", "reasoning_text"]
    text: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    annotations: Annotated[list[Raw], Meta(max_length=0)] | UnsetType = UNSET
    logprobs: list[Logprob] | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if (self.refusal if self.type == "refusal" else self.text) is UNSET:
            raise ValueError(f"a part of type {self.type} needs its text")


_Content = Annotated[list[Part], Meta(min_length=1)]


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """What somebody said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | _Content
    type: Literal["message"] = "message"
    id: str | UnsetType = UNSET
    status: Status | UnsetType = UNSET
    phase: str | UnsetType | None = UNSET


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """A tool that the model called."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | UnsetType | None = UNSET
    status: Status | UnsetType = UNSET


class FunctionCallOutput(msgspec.Struct, forbid_unknown_fields=True):
    """What the tool said."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | _Content
    id: str | UnsetType | None = UNSET
    status: Status | UnsetType = UNSET


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """What the model thought before."""

    type: Literal["reasoning"]
    id: str
    summary: list[Part]
    content: list[Part] | UnsetType | None = UNSET
    encrypted_content: str | UnsetType | None = UNSET
    status: Status | UnsetType = UNSET


_ITEMS: dict[str, type[Message] | type[FunctionCall] | type[FunctionCallOutput] | type[Reasoning]] = {
    "message": Message,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": Reasoning,
}


class _Kind(msgspec.Struct):
    type: str = "message"
    role: str = ""


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    parameters: Raw = NULL
    strict: bool | None = None
    description: str | None = None


class ResponsesCall(Generation):
    """POST /v1/responses."""

    input: str | list[Raw] | None = None
    instructions: str | UnsetType | None = UNSET
    tools: list[Raw] | None = None
    text: Raw = NULL
    include: Annotated[list[str], Meta(max_length=16)] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=64)] | None = None
    max_output_tokens: int | None = None
    background: bool | None = None
    previous_response_id: Raw = NULL
    conversation: Raw = NULL
    prompt: Raw = NULL
    truncation: Raw | UnsetType = UNSET
    tool_choice: Raw | UnsetType = UNSET
    service_tier: Raw | UnsetType = UNSET

    @property
    def beginning(self) -> Iterator[str]:
        if isinstance(self.instructions, str):
            yield self.instructions
        for item in [self.input] if isinstance(self.input, str) else self.input or ():
            yield item if isinstance(item, str) else bytes(item).decode()
            if isinstance(item, Raw) and msgspec.json.decode(item, type=_Kind).role == "user":
                return

    @property
    def output_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def output_field(self) -> str:
        return "max_output_tokens"

    def check(self) -> None:
        super().check()
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise FieldRefused("max_output_tokens", "max_output_tokens must be at least 1")
        for name in ("previous_response_id", "conversation", "prompt"):
            if bytes(getattr(self, name)) != b"null":
                raise FieldRefused(name, f"{name}: {_STATELESS}")
        if self.background:
            raise FieldRefused("background", f"background: {_STATELESS}, and wait for the answer")
        check_schema("text", self.text)
        for number, item in enumerate(self.input if isinstance(self.input, list) else ()):
            _check_item(number, item)
        check_schemas("tools", [_tool(number, tool).parameters for number, tool in enumerate(self.tools or ())])

    def briefly(self, body: bytes) -> bytes | None:
        return edited(body, {"stream": False, "max_output_tokens": 1})

    def changes(self, caller: str, request_id: str) -> dict[str, object]:
        changed = super().changes(caller, request_id)
        # vLLM takes the name of this path's requests from here, and on the others from the header.
        changed["request_id"] = f"resp_{request_id}"
        for name in _NULLS:
            value = getattr(self, name)
            if value is None or (isinstance(value, Raw) and bytes(value) == b"null"):
                changed[name] = UNSET
        return changed


def _check_item(number: int, item: Raw) -> None:
    where = f"input[{number}]"
    try:
        kind = msgspec.json.decode(item, type=_Kind).type
        if kind not in _ITEMS:
            raise FieldRefused(
                "input", f"{where}: items of type {kind[:40]!r} are not taken, only {', '.join(_ITEMS)}"
            )
        read = msgspec.json.decode(item, type=_ITEMS[kind])
    except msgspec.ValidationError as error:
        raise FieldRefused("input", f"{where}: {error}") from None
    if isinstance(read, FunctionCall):
        check_depth("input", read.arguments)


def _tool(number: int, tool: Raw) -> FunctionTool:
    try:
        return msgspec.json.decode(tool, type=FunctionTool)
    except msgspec.ValidationError as error:
        only = "only functions are taken, since no other tools run here"
        raise FieldRefused("tools", f"tools[{number}]: {error}; {only}") from None
