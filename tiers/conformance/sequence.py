"""One sequence that an engine is walked along, and what it says of it: plain data between gateway and engine."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tiers.conformance.scores import Phase

TOP = 20
"""The likeliest tokens of a position that are kept: as many as vLLM tells of by default."""

Tokens = list[int]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Plain):
    """Where a head is: a path on the engine's machine."""

    file: str
    """A safetensors file that has it, [V, H]."""
    name: str


class Reference(_Plain):
    """Where the reference's distributions of the answer are: paths on the engine's machine."""

    hidden: str
    """A safetensors file with the final hidden states, [A, H], as ``hidden``."""
    head: Head


class Keep(_Plain):
    """What of this engine's own distributions of the answer is written into a safetensors file."""

    file: str
    """It gets the final hidden states, [A, H], as ``hidden``."""
    head: Head | None = None
    """With a head the likeliest tokens that it makes of them too: ``top`` and ``ln_top``, [A, TOP], and
    ``ln_rest``, [A], the remaining mass, and ``ln_given``, [A], of the answer's own tokens."""
    logits: bool = False
    """Whether what was compared is written as ``logits``, [A, V]: for whoever recomputes it."""


class Sequence(_Plain):
    """A prompt and the reference's answer to it, as token ids."""

    prompt: Tokens = Field(min_length=1)
    answer: Tokens = Field(min_length=1)
    phase: Phase
    """prefill: the whole is one prompt; decode: the answer is generated token by token, each forced."""
    reference: Reference | None = None
    """None: nothing is compared, and only `keep` is done."""
    keep: Keep | None = None
    cached: bool = False
    """Whether the prompt is put into the prefix cache first, and read from there; else nothing is read from it."""


class Scored(_Plain):
    """What came of it."""

    columns: dict[str, list[Any]] = Field(default_factory=dict)
    """Those of `tiers.conformance.scores.Scores` but for the prompt, which the engine does not know."""
