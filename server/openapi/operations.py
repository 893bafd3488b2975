"""The paths of `server.openai`, told: what each takes and gives, with examples that work."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from server.openapi import chat, completions, responses, tokens

Json = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """One path of `server.openai`, told."""

    path: str
    id: str
    summary: str
    requests: tuple[type[BaseModel], ...]
    answer: type[BaseModel]
    examples: dict[str, Json]
    """Bodies by their title, without ``model``; each works."""
    event: type[BaseModel] | None = None
    """What a stream is made of, where there is one."""
    last_event: str | None = None
    """What says that it has ended, where that is no JSON."""
    refused: tuple[str, ...] = ()
    """Fields of OpenAI's or vLLM's that this path does not take."""
    tag: str = "inference"


_ASK = [{"role": "user", "content": "Why is the sky blue?"}]
_CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "create_chat_completion",
        "Answer a chat",
        (chat.ChatCompletionRequest,),
        chat.ChatCompletion,
        {
            "A question": {"messages": _ASK, "max_completion_tokens": 20},
            "A stream, with what it took": {
                "messages": _ASK,
                "max_completion_tokens": 20,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "How likely each token was": {
                "messages": _ASK,
                "max_completion_tokens": 5,
                "logprobs": True,
                "top_logprobs": 2,
            },
            "An answer by a JSON schema": {
                "messages": [{"role": "user", "content": "Name a city."}],
                "max_completion_tokens": 60,
                "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY}},
            },
        },
        event=chat.ChatCompletionChunk,
        last_event="[DONE]",
        refused=("use_beam_search",),
    ),
    Operation(
        "/v1/completions",
        "create_completion",
        "Continue a text",
        (completions.CompletionRequest,),
        completions.Completion,
        {
            "A text": {"prompt": "The sky is", "max_tokens": 10},
            "How likely a text is": {"prompt": "The sky is blue.", "max_tokens": 0, "echo": True, "logprobs": 1},
            "Two texts, twice each": {"prompt": ["One, two,", "Do, re,"], "n": 2, "max_tokens": 3},
            "A stream": {"prompt": "The sky is", "max_tokens": 10, "stream": True},
        },
        event=completions.CompletionChunk,
        last_event="[DONE]",
        refused=("use_beam_search",),
    ),
    Operation(
        "/v1/responses",
        "create_response",
        "Answer, in OpenAI's newer format; nothing is kept",
        (responses.ResponseRequest,),
        responses.Response,
        {
            "A question": {"input": "Why is the sky blue?", "max_output_tokens": 20},
            "A conversation": {
                "instructions": "Be brief.",
                "input": [
                    {"role": "user", "content": "Hello."},
                    {"role": "assistant", "content": "Hello, what is it?"},
                    {"role": "user", "content": "Why is the sky blue?"},
                ],
                "max_output_tokens": 20,
            },
            "A stream": {"input": "Why is the sky blue?", "max_output_tokens": 20, "stream": True},
        },
        event=responses.ResponseEvent,
        refused=("background", "conversation", "previous_response_id", "prompt"),
    ),
    Operation(
        "/tokenize",
        "tokenize",
        "Text to tokens",
        (tokens.TokenizeText, tokens.TokenizeChat),
        tokens.Tokens,
        {"A text": {"prompt": "The sky is blue."}, "A chat": {"messages": _ASK}},
        tag="tokens",
    ),
    Operation(
        "/detokenize",
        "detokenize",
        "Tokens to text",
        (tokens.DetokenizeRequest,),
        tokens.Detokenized,
        {"Two tokens": {"tokens": [504, 6376]}},
        tag="tokens",
    ),
)
