"""What several paths have in common, in the OpenAPI document.

These models, and those of each path beside them, are read by people and by generators of clients. A request is
judged by `server.call` and then by the engine; nothing here runs when one comes. A field more is a line more, and
a test holds every one against vLLM's own models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.call import MOST_CHOICES

MOST_LOGPROBS = 20
MOST_INTEGER = (1 << 31) - 1

Int64 = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Text = Annotated[str, Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Token = Annotated[int, Field(ge=0, le=MOST_INTEGER)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Fields(BaseModel):
    """An object that may hold more than is documented."""

    model_config = ConfigDict(extra="allow")


class OnlyFields(BaseModel):
    """One that may not."""

    model_config = ConfigDict(extra="forbid")


class Request(Fields):
    """What every path takes."""

    model: str = Field(description="One of the names that `GET /v1/models` lists.")
    precision: str | None = Field(
        default=None,
        description=(
            "Assay's own: the precision that the caller insists on, such as `bf16`. A tier that has another "
            "refuses, and nothing else answers in its place."
        ),
    )


class StructuredOutputs(Fields):
    """One constraint that the answer is held to, in vLLM's own form."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: str | None = Field(default=None, description="A regular expression.")
    choice: list[Text] | None = Field(default=None, min_length=1, description="One of these texts.")
    grammar: str | None = Field(default=None, description="A grammar in EBNF.")


class Sampling(Request):
    """How tokens are chosen, on every path that generates."""

    stream: bool | None = Field(default=False, description="Send the answer as server-sent events.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 takes the likeliest token each time."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Only the likeliest tokens, up to this probability together."
    )
    top_k: int | None = Field(
        default=None, ge=-1, le=MOST_INTEGER, description="Only so many of the likeliest tokens; 0 or -1 for all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="No token less likely than this fraction of the likeliest."
    )
    presence_penalty: Penalty | None = Field(
        default=None, description="Against tokens that were generated before."
    )
    frequency_penalty: Penalty | None = Field(default=None, description="The same, each time they were.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Against tokens of prompt and answer; 1 for none."
    )
    logit_bias: dict[TokenKey, Bias] | None = Field(
        default=None, description="By token id, what is added to its logit."
    )
    seed: Int64 | None = Field(default=None, description="Makes sampling repeatable, as far as kernels are.")
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = Field(
        default=None, description="Texts that end the answer, and are left out of it."
    )
    stop_token_ids: list[Token] | None = Field(default=None, description="Tokens that end the answer.")
    include_stop_str_in_output: bool = Field(
        default=False, description="Leave the text that ended it in the answer."
    )
    ignore_eos: bool = Field(default=False, description="Go on to the last token allowed.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        description="Requests with another salt, or of another key, never share this one's prefix cache.",
    )


class StreamOptions(Fields):
    """How a stream is to be; only together with `stream`."""

    include_usage: bool | None = Field(
        default=None, description="One chunk more at the end, without choices, that says what the request took."
    )


class JsonSchema(Fields):
    """A named JSON schema."""

    name: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="The JSON schema.")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form that the answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, description="Needed for `json_schema`.")


class RepetitionDetection(Fields):
    """When an answer that repeats itself is ended."""

    max_pattern_size: int | None = Field(default=None, ge=0, le=MOST_INTEGER, description="In tokens.")
    min_pattern_size: int | None = Field(default=None, ge=0, le=MOST_INTEGER, description="In tokens.")
    min_count: int | None = Field(default=None, ge=0, le=MOST_INTEGER, description="How often it has to come.")


class TextRequest(Sampling):
    """What chat and text completions share."""

    n: int | None = Field(
        default=1, ge=1, le=MOST_CHOICES, description="Answers to each prompt; each takes a place in the engine."
    )
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, description="Taken for OpenAI's clients, and not used.")
    min_tokens: int = Field(default=0, ge=0, description="The answer does not end before.")
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="Keep only so many tokens of the prompt; -1 for as many as fit."
    )
    truncation_side: Literal["left", "right"] | None = Field(default=None, description="What is cut off then.")
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MOST_LOGPROBS,
        description="How likely each token of the prompt was, with so many alternatives; not in a stream.",
    )
    logprob_token_ids: list[Token] | None = Field(
        default=None, max_length=128, description="How likely just these tokens were; only with `logprobs`."
    )
    allowed_token_ids: list[Token] | None = Field(
        default=None, min_length=1, description="No others are generated."
    )
    bad_words: list[Text] = Field(
        default_factory=list, max_length=128, description="Texts that are never generated."
    )
    repetition_detection: RepetitionDetection | None = None
    return_token_ids: bool | None = Field(default=None, description="Token ids beside the text, prompt included.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="In log-probabilities name tokens `token_id:…`."
    )
    stream_interval: int | None = Field(
        default=None, ge=1, le=MOST_INTEGER, description="Send so many tokens in one chunk."
    )


class PromptDetails(Fields):
    """Of the prompt."""

    cached_tokens: int | None = Field(default=None, description="Those that were in the cache.")


class Usage(Fields):
    """What a request took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class PromptLogprob(Fields):
    """How likely one token was at one place of the prompt."""

    logprob: float
    rank: int | None = Field(default=None, description="1 for the likeliest.")
    decoded_token: str | None = None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, by token id; null for the first, which nothing comes before."""
StopReason = int | str
"""The token or text that ended an answer."""
