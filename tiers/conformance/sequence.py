"""One sequence that an engine is walked along, and what it says of it: plain data between gateway and engine."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tiers.conformance.scores import Phase

Tokens = list[int]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reference(_Plain):
    """Where the reference's distributions of the answer are: paths on the engine's machine."""

    hidden: str
    """A safetensors file with the final hidden states, [A, H]."""
    name: str = "hidden"
    head: str
    """A safetensors file with the head, [V, H]."""
    head_name: str


class Sequence(_Plain):
    """A prompt and the reference's answer to it, as token ids."""

    prompt: Tokens = Field(min_length=1)
    answer: Tokens = Field(min_length=1)
    phase: Phase
    """prefill: the whole is one prompt; decode: the answer is generated token by token, each forced."""
    reference: Reference | None = None
    """None: nothing is compared, and only `save` is done."""
    save: str | None = None
    """Where to write this engine's own final hidden states of the answer, [A, H], as ``hidden``."""
    save_logits: bool = False
    """Whether to write, as ``logits``, what was compared too, [A, V]: for whoever recomputes it."""


class Scored(_Plain):
    """What came of it."""

    columns: dict[str, list[Any]] = Field(default_factory=dict)
    """Those of `tiers.conformance.scores.Scores` but for the prompt, which the engine does not know."""
