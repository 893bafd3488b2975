"""The faults that a meter of tiers must find: what each is, and how one would notice it. Plain data.

They are planted in engines that were started for it, one at a time: `tiers.probe.faults` breaks the model,
`tiers.probe.planting` what stands before it.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

FaultName = Literal[
    "template",
    "lite-as-turbo",
    "layer-dropped",
    "scales-swapped",
    "positions-shifted",
    "rope-unscaled",
    "kv-scale",
    "rounded-twice",
    "logits-scaled",
    "top-p-ignored",
    "end-mistaken",
]
Check = Literal["divergence", "rendering", "nucleus", "end"]
"""divergence: distributions along the reference's answers. rendering: the tokens that a chat becomes. nucleus:
whether a token is drawn that `top_p` rules out. end: whether an answer ends at the tokens that end it, and at no
other."""

LOGITS_SCALE = 1.02
KV_SCALE = 1.1


@dataclass(frozen=True)
class Fault:
    """One way in which a tier can be wrong."""

    name: FaultName
    planted: str
    """What exactly is broken, in words."""
    check: Check = "divergence"
    is_planted: bool = True
    """Whether something in the engine has to be broken for it."""
    may_lack: str = ""
    """What a model may be without, which then cannot be broken; any other fault can be in every Turbo."""


FAULTS = (
    Fault("template", "chats are written in Llama 2's template", "rendering"),
    Fault("lite-as-turbo", "the Lite engine answers as Turbo", is_planted=False, may_lack="a Lite"),
    Fault("layer-dropped", "the middle block passes on what it gets"),
    Fault("scales-swapped", "the middle block's down_proj has the next one's scales"),
    # All positions shifted alike is no fault: rotary embeddings know distances only.
    Fault("positions-shifted", "generated tokens stand one place too far, those of the prompt do not"),
    Fault("rope-unscaled", "rotary embeddings without Llama 3.1's scaling", may_lack="scaled rotary embeddings"),
    Fault("kv-scale", f"generated tokens read keys and values times {KV_SCALE} from the cache"),
    Fault("rounded-twice", "FP8 weights rounded again, to scales that are powers of two"),
    Fault("logits-scaled", f"logits times {LOGITS_SCALE}"),
    Fault("top-p-ignored", "the sampler does not see top_p", "nucleus"),
    Fault("end-mistaken", "answers end at the token after the last that ends one, and at no other", "end"),
)
BY_NAME = {fault.name: fault for fault in FAULTS}


class Planting(BaseModel):
    """What an engine is asked to break: one fault, or none, which mends it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: FaultName | None
