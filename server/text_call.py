"""What the gateway reads of a body of chat or text completions, or of /tokenize and /detokenize."""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from server.call import NULL, Call, Count, Generation, TokenId
from server.errors import FieldNotAllowed, FieldRefused
from server.schema import ChatTool, check_depth, check_schema, check_schemas


class StreamOptions(msgspec.Struct):
    """How a stream is to be."""

    include_usage: bool | None = None


class RepetitionDetection(msgspec.Struct):
    """How vLLM ends an answer that repeats itself."""

    max_pattern_size: Count | None = None
    min_pattern_size: Count | None = None
    min_count: Count | None = None


class TextGeneration(Generation):
    """What chat and text completions share."""

    stream_options: StreamOptions | None = None
    n: int | None = 1
    bad_words: Annotated[list[str], Meta(max_length=128)] | None = None
    min_tokens: Count | None = None
    allowed_token_ids: list[TokenId] | None = None
    logprob_token_ids: list[TokenId] | None = None
    stream_interval: Count | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: Raw = NULL
    use_beam_search: bool | None = False

    @property
    def asks_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def check(self) -> None:
        super().check()
        check_schema("response_format", self.response_format)
        if self.use_beam_search:
            # Each step of it is a round of requests of its own, which no queue here counts.
            raise FieldNotAllowed("use_beam_search")


class FunctionCall(msgspec.Struct):
    """A call of a tool that the model made before; its arguments are JSON."""

    name: str | UnsetType | None = UNSET
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """As chats keep it."""

    id: str | UnsetType | None = UNSET
    type: str | UnsetType | None = UNSET
    function: FunctionCall | None = None


class Part(msgspec.Struct):
    """A part of a message: its kind is checked, since vLLM would write it to its log as it is."""

    type: Annotated[str, Meta(pattern="^[a-z_]{1,40}$")] | UnsetType = UNSET
    text: str | UnsetType | None = UNSET


class Message(msgspec.Struct):
    """One message of a chat; what vLLM would find wrong in it, it would say a hundred times for each."""

    role: str
    content: str | list[str | Part] | None = None
    name: str | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    tool_call_id: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | None = None


def _texts(message: Message) -> Iterator[str]:
    content = message.content or ""
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            yield part
        elif isinstance(part.text, str):
            yield part.text


class ChatCall(TextGeneration):
    """POST /v1/chat/completions."""

    messages: list[Message] | None = None
    documents: list[dict[str, str]] | None = None
    tools: list[ChatTool] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    @property
    def beginning(self) -> Iterator[str]:
        # Tools stand before everything in Llama's format, and so does whatever the first user said after that.
        for tool in self.tools or ():
            yield tool.function.name
        for message in self.messages or ():
            yield message.role
            yield from _texts(message)
            if message.role == "user":
                return

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self) -> None:
        super().check()
        if self.output_tokens is not None and self.output_tokens < 1:
            raise FieldRefused(self.output_field, f"{self.output_field} must be at least 1")
        for message in self.messages or ():
            for call in message.tool_calls or ():
                if call.function:
                    check_depth("messages", call.function.arguments or "")
        check_schemas("tools", (tool.function.parameters for tool in self.tools or ()))


class CompletionCall(TextGeneration):
    """POST /v1/completions."""

    max_tokens: int | UnsetType | None = UNSET
    echo: bool | None = False
    prompt: str | list[str | TokenId | list[TokenId]] | None = None

    @property
    def choices(self) -> int:
        return super().choices * self.prompts

    @property
    def prompts(self) -> int:
        """A text or a list of token ids is one."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return len(self.prompt) if several and self.prompt else 1

    @property
    def beginning(self) -> Iterator[str]:
        first: str | list[int] | object = self.prompt
        if isinstance(first, list) and first and not isinstance(first[0], int):
            first = first[0]  # of several, which mostly begin alike
        if isinstance(first, str):
            yield first
        for token in first if isinstance(first, list) else ():
            yield str(token)

    @property
    def output_tokens(self) -> int | None:
        return None if self.max_tokens is UNSET else self.max_tokens

    def check(self) -> None:
        super().check()
        if isinstance(self.max_tokens, int) and self.max_tokens < (0 if self.echo else 1):
            raise FieldRefused("max_tokens", "max_tokens must be at least 1, or 0 with echo")


class TokenizeCall(Call):
    """POST /tokenize, of a text or of a chat."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ChatTool] | None = None


class DetokenizeCall(Call):
    """POST /detokenize."""

    tokens: list[TokenId] | None = None
