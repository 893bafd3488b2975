"""A tier: one model at one precision, the names it answers to, and what it is built from."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tiers.precision import PrecisionName
from tiers.recipe import Recipe, find_recipe
from tiers.source import Source


class TierKind(StrEnum):
    """The three grades, best first."""

    REFERENCE = "Reference"
    TURBO = "Turbo"
    LITE = "Lite"

    @property
    def precision(self) -> PrecisionName:
        """What this grade promises."""
        promised: dict[TierKind, PrecisionName] = {
            TierKind.REFERENCE: "bf16",
            TierKind.TURBO: "fp8",
            TierKind.LITE: "int4",
        }
        return promised[self]

    @property
    def default_recipe(self) -> str:
        """The recipe taken when the config names none."""
        return {"bf16": "bf16", "fp8": "fp8-dynamic", "int4": "w4a16-gptq"}[self.precision]


class Resources(BaseModel):
    """What a tier's engines may use, and what they answer. On the CPU only the KV cache and the limits count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    launch: Literal["local", "url", "ray"] = Field(
        default="local",
        description="local starts its engines here, ray on the nodes of a Ray cluster; url finds them at `urls`, "
        "where `assay engine` runs them.",
    )
    gpus: tuple[int, ...] = Field(
        default=(0,),
        min_length=1,
        description="GPU indices, dealt out evenly to the replicas; more than one for each is tensor parallelism. "
        "With `launch: ray` they are those of every replica, and only their number counts.",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="How many engines serve the tier, each with its own GPUs, or with its own memory on the CPU.",
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        description="Up to how many there may be while requests wait, with `launch: ray`; `replicas` by default.",
    )
    cpus: int = Field(
        default=1,
        ge=1,
        description="CPUs that an engine takes of its node with `launch: ray`; on CPUs it computes with so many.",
    )
    pipeline_parallel: int = Field(
        default=1,
        ge=1,
        description="Into how many stages the layers are cut; tensor parallelism is over the GPUs of one stage.",
    )
    gpu_memory: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The share of each GPU's memory this engine may take, weights and KV cache together. "
        "Default: what is left is shared evenly between the tiers on that GPU, up to 0.9.",
    )
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="KV cache in GiB, on each GPU. On the CPU 1 by default; on GPUs what gpu_memory leaves over.",
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="How many requests one engine runs at once; vLLM's default if absent."
    )
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longest prompt; a longer one is refused. The context length if absent."
    )
    max_output_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest answer: who asks for more is refused, who does not say gets at most this. "
        "What the prompt leaves of the context length if absent.",
    )
    max_waiting: int = Field(
        default=512,
        ge=0,
        description="How many requests may wait for a place in the engines; further ones get 429 at once.",
    )
    idle: Literal["stay", "sleep"] = Field(
        default="stay",
        description="sleep gives the GPU's memory back while no request comes and takes it again for the next. "
        "Of tiers on one GPU that sleep, one is awake at a time, and each may use the memory of all.",
    )
    engine_args: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Further vLLM arguments by their command-line name without dashes in front, "
        "such as {enable-chunked-prefill: true}. Those that Assay sets itself are refused.",
    )

    @model_validator(mode="after")
    def _gpus_make_whole_stages(self) -> Self:
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError(f"gpus {list(self.gpus)} names one twice")
        if self.launch == "ray":
            return self._on_ray()
        if self.max_replicas is not None:
            raise ValueError("max_replicas is for launch: ray, which finds room for further replicas")
        # Not the default: a CPU's config says nothing of GPUs. There tiers/placement.py asks whether they suffice.
        if "gpus" in self.model_fields_set and len(self.gpus) % self.replicas:
            raise ValueError(f"{len(self.gpus)} gpus cannot be dealt out evenly to {self.replicas} replicas")
        each = len(self.gpus) // self.replicas
        if each % self.pipeline_parallel:
            raise ValueError(f"{each} gpus cannot be cut into {self.pipeline_parallel} pipeline stages")
        return self

    def _on_ray(self) -> Self:
        if len(self.gpus) % self.pipeline_parallel:
            raise ValueError(f"{len(self.gpus)} gpus cannot be cut into {self.pipeline_parallel} pipeline stages")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        if self.idle == "sleep":
            raise ValueError("idle: sleep is for engines that share GPUs of this machine, not for launch: ray")
        return self

    @property
    def tensor_parallel(self) -> int:
        """Over how many GPUs of one engine each layer is spread."""
        each = len(self.gpus) if self.launch == "ray" else len(self.gpus) // self.replicas
        return each // self.pipeline_parallel


@dataclass(frozen=True)
class Tier:
    """One tier of one model, as configured."""

    model: str
    kind: TierKind
    source: Source
    recipe: Recipe
    checkpoint: Path
    resources: Resources
    context_length: int | None

    @property
    def name(self) -> str:
        """The full name: the model and the grade."""
        return f"{self.model}-{self.kind}"

    @property
    def names(self) -> tuple[str, ...]:
        """Every model name this tier answers to; the reference also owns the plain one."""
        return (self.model, self.name) if self.kind is TierKind.REFERENCE else (self.name,)

    def engines(self) -> "tuple[Tier, ...]":
        """The tier as each of its engines sees it: alone, and with its own part of the GPUs."""
        gpus, replicas = self.resources.gpus, self.resources.replicas
        if replicas == 1:
            return (self,)
        if self.resources.launch == "ray":
            alone = self.resources.model_copy(update={"replicas": 1})
            return (replace(self, resources=alone),) * replicas
        size = len(gpus) // replicas
        own = [{"replicas": 1, "gpus": gpus[size * i : size * (i + 1)]} for i in range(replicas)]
        return tuple(replace(self, resources=self.resources.model_copy(update=part)) for part in own)

    @property
    def reference(self) -> "Tier":
        """The tier whose checkpoint this one is made from, and measured against; itself for the reference."""
        recipe = find_recipe(TierKind.REFERENCE.default_recipe)
        checkpoint = self.checkpoint.with_name(recipe.name)
        return replace(self, kind=TierKind.REFERENCE, recipe=recipe, checkpoint=checkpoint)

    @property
    def slug(self) -> str:
        """A name for files."""
        return f"{self.model}-{self.kind}".replace("/", "--").lower()
