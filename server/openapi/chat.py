"""POST /v1/chat/completions, in the OpenAPI document."""

from typing import Any, Literal

from pydantic import Field

from server.openapi.parts import MOST_LOGPROBS, Fields, PromptLogprobs, StopReason, TextRequest, Usage


class TextPart(Fields):
    """A piece of a message; the models here read text."""

    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    """Which function, and with what."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Fields):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Fields):
    """One message of a chat."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(default=None, description="Null where the model called tools.")
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, description="Of an assistant's message.")
    tool_call_id: str | None = Field(default=None, description="Of a tool's message: the call that it answers.")


class Function(Fields):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema.")


class Tool(Fields):
    """What the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """A function by its name."""

    name: str


class NamedTool(Fields):
    """The one tool that the model has to use."""

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(TextRequest):
    """A chat, and how it is to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Of each answer; without it, what the context and the tier allow."
    )
    max_tokens: int | None = Field(default=None, ge=1, deprecated=True, description="OpenAI's older name for it.")
    logprobs: bool | None = Field(default=False, description="Say how likely each token was.")
    top_logprobs: int | None = Field(
        default=0, ge=0, le=MOST_LOGPROBS, description="And so many alternatives; only with `logprobs`."
    )
    tools: list[Tool] | None = Field(default=None, min_length=1, description="For models trained to call them.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="`auto` where there are tools."
    )
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="For the chat template, if that knows it."
    )
    echo: bool = Field(default=False, description="Begin the answer with the last message, if it is of its role.")
    add_generation_prompt: bool = Field(default=True, description="Begin the assistant's message in the prompt.")
    continue_final_message: bool = Field(
        default=False, description="Go on with the last message; only without `add_generation_prompt`."
    )
    add_special_tokens: bool = Field(
        default=False, description="Put the model's special tokens before what the template made."
    )
    documents: list[dict[str, str]] | None = Field(default=None, description="For the chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="For the chat template.")
    return_prompt_text: bool | None = Field(default=None, description="The prompt that the template made.")


class TokenLogprob(Fields):
    """How likely one token was."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(
        default=None, description="Its text as UTF-8, which may be part of a character."
    )


class ContentLogprob(TokenLogprob):
    """How likely one token of the answer was, and what else could have come."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Fields):
    """Token by token."""

    content: list[ContentLogprob] | None


class ChatMessage(Fields):
    """What the model said."""

    role: str = Field(examples=["assistant"])
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None


class ChatChoice(Fields):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None = Field(examples=["stop", "length", "tool_calls"])
    stop_reason: StopReason | None = Field(default=None, description="The token or text that ended it.")
    token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")


class ChatCompletion(Fields):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Unix time.")
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")
    prompt_text: str | None = Field(default=None, description="Where `return_prompt_text` asks for it.")


class CalledFunctionDelta(Fields):
    """A piece of a call: the name at once, the arguments by and by."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Fields):
    """A piece of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta | None = None


class ChatDelta(Fields):
    """What was said since the last chunk."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None


class ChatChunkChoice(Fields):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: StopReason | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Fields):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(description="Empty in the last one, which has `usage`.")
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
