"""What a config says of how long an engine may be silent, and how often it may err. Knows no engines."""

from pydantic import BaseModel, ConfigDict, Field

LONGEST_REST_S = 120.0


class Patience(BaseModel):
    """How long an engine may be silent, and how often it may err."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe_every_s: float = Field(
        default=10, gt=0, description="An engine of which nothing was heard for so long is asked for one token."
    )
    probe_timeout_s: float = Field(
        default=30,
        gt=0,
        description="One that neither answers that within this time nor gets on with other requests hangs, and is "
        "replaced. Longer than its longest step takes, which is max-num-batched-tokens of prompts.",
    )
    eject_after_errors: int = Field(
        default=5, ge=1, description="An engine that answers so many requests in a row with an error rests."
    )
    eject_s: float = Field(
        default=10,
        gt=0,
        description=f"How long it rests; twice as long when it happens again soon, up to {LONGEST_REST_S:.0f} s. "
        "Afterwards it must answer a request for one token, or is replaced.",
    )
