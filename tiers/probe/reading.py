"""What an engine says of its own arithmetic. Plain data: written inside the engine, read by the gateway."""

import hashlib
import os
from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from tiers.precision import NumberFormat

End = Literal["embedding", "head"]
READING_ROUTE = "/assay/reading"
"""Where an engine answers with a list of readings, one a worker."""
SLEEP_ROUTE = "/assay/sleep"
WAKE_ROUTE = "/assay/wake"
SCORE_ROUTE = "/assay/score"
"""Where an engine scores one sequence: a `Sequence` in, `Scored` out."""
CALLERS_ROUTE = "/assay/callers"
"""Where an engine says how many requests it has that measure nothing."""
CHECKPOINT_ROUTE = "/assay/checkpoint"
"""Where an engine gives a `CheckpointReading`, for a gateway that has no checkpoint of its own."""
DRAIN_ROUTE = "/assay/drain"
"""Where an engine is told to take no further request, and answers how many it still works on."""
DRAINING = "x-assay-draining"
"""The header of every answer that an engine gives while it drains."""
READY_ROUTE = "/assay/ready"
"""Where an engine is told that it was found to compute what it should, and has answered."""
WAITS = "ASSAY_HEALTH_WAITS"
"""The variable by which it is well for an orchestrator only then; `tiers.engine` sets it for `assay engine`."""
VERIFYING = "x-assay-verifying"
"""The header of a refusal of /health until then: this engine answers whoever has its key."""
OWN = "assay-"
"""Begins the ids of requests by which an engine is measured; vLLM puts words of its own before and after."""
FAULT_ROUTE = "/assay/fault"
"""Where an engine that was started to be broken takes a `Planting`; others have no such route."""
MAY_PLANT = "ASSAY_PLANT_FAULTS"
"""The variable that says so; `tiers.engine` sets it at every start, to 0 but for the self-test."""

CHECKPOINT = "ASSAY_CHECKPOINT"
"""The variable with the digest of the manifest that an engine is started on; `tiers.engine` sets it."""


def may_plant() -> bool:
    """Whether faults may be planted in the engine that this process is of."""
    return os.environ.get(MAY_PLANT) == "1"


class LayerReading(BaseModel):
    """One linear layer as it is in the memory of a worker.

    ``parts`` are the checkpoint's names of what the engine has fused into it. A format that is None could not be
    told: the probe does not know this kernel.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    parts: tuple[str, ...]
    kernel: str
    weights: NumberFormat | None
    activations: NumberFormat | None


class AttentionReading(BaseModel):
    """The attention of one block: the backend, what it keeps of past tokens, and what queries come in."""

    model_config = ConfigDict(frozen=True)

    name: str
    backend: str
    kv_cache: NumberFormat | None
    query: NumberFormat | None


class EngineReading(BaseModel):
    """All of one worker. With tensor parallelism every worker has its own, of its part of each layer."""

    model_config = ConfigDict(frozen=True)

    rank: int
    vllm: str
    torch: str
    device: str
    model_class: str
    layers: tuple[LayerReading, ...]
    attention: tuple[AttentionReading, ...]
    ends: dict[End, NumberFormat | None]
    """Of the model's two ends, those that this worker holds: a pipeline stage may hold neither."""
    head_kernel: str | None
    config_hash: str
    """vLLM's own digest of everything in its configuration that shapes the computation."""
    environment_hash: str
    """Of the variables by which an operator can tell vLLM something."""
    takes_faults: bool = False
    """Whether it was started to be broken, as no engine that serves is."""
    checkpoint: str | None = None
    """The digest of the manifest that it was started on; None of one that was not told."""
    device_class: str | None = None
    """What of its machine chooses kernels: the gateway's may be another."""

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documentation has it
    @property
    def fingerprint(self) -> str:
        """A digest of versions, device, configuration and every layer: equal ones compute with the same means."""
        # The class says less than the device; and which weights they are is no means of computing.
        fields = self.model_dump_json(exclude={"fingerprint", "rank", "checkpoint", "device_class"})
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def summary(self) -> "list[LayerGroup]":
        """Layers that are alike, together, the most common first."""
        alike = Counter((layer.kernel, layer.weights, layer.activations) for layer in self.layers)
        return [
            LayerGroup(count=count, kernel=kernel, weights=weights, activations=activations)
            for (kernel, weights, activations), count in alike.most_common()
        ]


class LayerGroup(BaseModel):
    """How many linear layers, fused as the engine has them, run by one kernel on the same formats."""

    model_config = ConfigDict(frozen=True)

    count: int
    kernel: str
    weights: NumberFormat | None
    activations: NumberFormat | None


class CheckpointReading(BaseModel):
    """What a gateway needs to know of the checkpoint that an engine runs, as it lay there when the engine started.

    Both are the files' own text: the manifest has the digest of the other.
    """

    model_config = ConfigDict(frozen=True)

    manifest: str
    config: str
