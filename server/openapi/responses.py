"""POST /v1/responses, in the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import Field

from server.openapi.chat import TokenLogprob
from server.openapi.parts import MOST_LOGPROBS, Fields, OnlyFields, Sampling


class TextFormat(Fields):
    """The form that the answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, description="Needed for `json_schema`.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="Needed for `json_schema`.")
    strict: bool | None = None


class TextConfig(Fields):
    """What the answer's text is to be."""

    format: TextFormat | None = None


class InputText(OnlyFields):
    """A piece of a message: what somebody said, or the model."""

    type: Literal["input_text", "output_text", "summary_text", "reasoning_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[dict[str, Any]] | None = None


class InputRefusal(OnlyFields):
    """What the model said instead."""

    type: Literal["refusal"]
    refusal: str


Status = Literal["in_progress", "completed", "incomplete"]
Parts = Annotated[list[InputText | InputRefusal], Field(min_length=1)]


class InputMessage(OnlyFields):
    """One message of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: str | Parts
    id: str | None = None
    status: Status | None = None


class InputFunctionCall(OnlyFields):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object, as text.")
    id: str | None = None
    status: Status | None = None


class InputFunctionOutput(OnlyFields):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts
    id: str | None = None
    status: Status | None = None


class InputReasoning(OnlyFields):
    """What the model thought earlier."""

    type: Literal["reasoning"]
    id: str
    summary: list[InputText]
    content: list[InputText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class ResponseTool(OnlyFields):
    """A function that the model may call; no other tools run here."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of its arguments.")
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema.")


class NamedResponseTool(Fields):
    """The one tool that the model has to use."""

    type: Literal["function"]
    name: str


class ResponseRequest(Sampling):
    """What a response is asked for. Nothing of it is kept: each request carries the whole conversation."""

    input: str | list[InputMessage | InputFunctionCall | InputFunctionOutput | InputReasoning]
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        default=None, ge=1, description="Without it, what the context and the tier allow."
    )
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = "auto"
    parallel_tool_calls: bool | None = True
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        default=None, description="What the answer says beside its text."
    )
    top_logprobs: int | None = Field(
        default=0, ge=0, le=MOST_LOGPROBS, description="Alternatives to each token, where `include` asks for them."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default="disabled", description="`auto` cuts what is too long from the beginning of the prompt."
    )
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        default="auto", description="Comes back with the answer; there is but one."
    )
    metadata: dict[str, str] | None = Field(default=None, description="Comes back with the answer.")
    user: str | None = Field(default=None, description="Comes back with the answer.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="For the chat template.")


class OutputLogprob(TokenLogprob):
    """How likely one token of the answer was, and what else could have come."""

    top_logprobs: list[TokenLogprob]


class OutputText(Fields):
    """A piece of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[OutputLogprob] | None = Field(default=None, description="Where `include` asks for them.")


class OutputMessage(Fields):
    """What the model said."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class OutputFunctionCall(Fields):
    """A call that the model makes."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class OutputReasoning(Fields):
    """What a model that reasons thought before."""

    type: Literal["reasoning"]
    id: str


class InputDetails(Fields):
    """Of the prompt."""

    cached_tokens: int = Field(description="Those that were in the cache.")


class OutputDetails(Fields):
    """Of the answer."""

    reasoning_tokens: int


class ResponseUsage(Fields):
    """What a request took, in tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Fields):
    """Why an answer is not whole."""

    reason: str = Field(examples=["max_output_tokens"])


class Response(Fields):
    """The answer, and what it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix time.")
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[OutputMessage | OutputFunctionCall | OutputReasoning]
    error: dict[str, Any] | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None = Field(default=None, description="In the last event of a stream only.")
    metadata: dict[str, str]
    instructions: str | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    truncation: str | None


class ResponseEvent(Fields):
    """One event of a stream; its `type` is the event's name too, and says what else is in it."""

    type: str = Field(examples=["response.output_text.delta", "response.completed"])
    sequence_number: int
    response: Response | None = Field(default=None, description="In the first events, and whole in the last.")
    delta: str | None = None
    item_id: str | None = None
    output_index: int | None = None
