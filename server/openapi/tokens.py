"""POST /tokenize and /detokenize, in the OpenAPI document."""

from typing import Any

from pydantic import Field

from server.openapi.chat import Message, Tool
from server.openapi.parts import Fields, Request, Token


class TokenizeText(Request):
    """A text to count."""

    prompt: str
    add_special_tokens: bool = Field(default=True, description="Put the model's special tokens before it.")
    return_token_strs: bool | None = Field(default=False, description="Each token's text as well.")


class TokenizeChat(Request):
    """A chat to count, as the chat template makes it."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = Field(default=True, description="Begin the assistant's message in the prompt.")
    continue_final_message: bool = Field(
        default=False, description="Leave the last message open; only without `add_generation_prompt`."
    )
    add_special_tokens: bool = Field(default=False, description="Put the model's special tokens before it.")
    return_token_strs: bool | None = Field(default=False, description="Each token's text as well.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="For the chat template.")
    tools: list[Tool] | None = Field(default=None, min_length=1)


class Tokens(Fields):
    """What a text is to the model."""

    count: int
    tokens: list[int]
    max_model_len: int = Field(description="The longest prompt and answer together, in tokens.")
    token_strs: list[str] | None = Field(default=None, description="Where `return_token_strs` asks for them.")


class DetokenizeRequest(Request):
    """Token ids to put into text."""

    tokens: list[Token]


class Detokenized(Fields):
    """The text that the tokens are."""

    prompt: str
