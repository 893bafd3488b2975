"""POST /v1/completions, in the OpenAPI document."""

from typing import Annotated, Literal

from pydantic import Field

from server.openapi.parts import (
    MOST_LOGPROBS,
    Fields,
    PromptLogprobs,
    StopReason,
    Text,
    TextRequest,
    Token,
    Usage,
)


class CompletionRequest(TextRequest):
    """A text, and how it is to be continued."""

    prompt: Text | list[Text] | Annotated[list[Token], Field(min_length=1)] | list[list[Token]] = Field(
        description="A text or its token ids, or several of either."
    )
    max_tokens: int | None = Field(default=16, ge=0, description="Of each answer; 0 only with `echo`.")
    echo: bool | None = Field(default=False, description="Begin each answer with its prompt.")
    add_special_tokens: bool = Field(default=True, description="Put the model's special tokens before the prompt.")
    logprobs: int | None = Field(
        default=None, ge=0, le=MOST_LOGPROBS, description="How likely each token was, with so many alternatives."
    )


class CompletionLogprobs(Fields):
    """Token by token; with `echo` those of the prompt come first, and nothing is known of the very first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Fields):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None = Field(examples=["stop", "length"])
    stop_reason: StopReason | None = Field(default=None, description="The token or text that ended it.")
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")
    token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")


class Completion(Fields):
    """The answers to a text, or to several."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Unix time.")
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None = None


class CompletionChunk(Fields):
    """One event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice] = Field(description="Empty in the last one, which has `usage`.")
    usage: Usage | None = None
    system_fingerprint: str | None = None
