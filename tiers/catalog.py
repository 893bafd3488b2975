"""The models Assay knows by name, and the shape of any Llama from its ``config.json``.

Knows sizes; knows nothing of engines. A checkpoint that bears the name of a model in the catalog must have its
shape; any other ``LlamaForCausalLM`` is taken as its config describes it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.errors import ConfigError, SourceError
from tiers.source import EMBEDDED_MODEL, EMBEDDED_PACKAGE, Source

BF16_BYTES = 2


class RopeScaling(BaseModel):
    """How rotary positions are stretched beyond the length a model was first trained on."""

    model_config = ConfigDict(frozen=True)

    rope_type: str
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class Rope(BaseModel):
    """Rotary position embedding: its base, and its scaling if there is any."""

    model_config = ConfigDict(frozen=True)

    theta: float = 10000.0
    """The default of Llama configs that do not name it."""
    scaling: RopeScaling | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Rope":
        """From a config with ``rope_parameters``, as transformers 5 writes it, or the two older fields."""
        fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = fields.get("rope_type", fields.get("type", "default"))
        return cls(
            theta=fields.get("rope_theta", config.get("rope_theta", cls().theta)),
            scaling=None if kind == "default" else RopeScaling.model_validate({**fields, "rope_type": kind}),
        )


class Linear(NamedTuple):
    """One linear layer, by its name in the checkpoint: ``outputs`` × ``inputs`` weights."""

    name: str
    inputs: int
    outputs: int


class ModelShape(BaseModel):
    """The sizes of a dense ``LlamaForCausalLM``, in its config's own names."""

    model_config = ConfigDict(frozen=True)

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope = Rope()

    @classmethod
    def read(cls, folder: Path) -> "ModelShape":
        """The shape of the checkpoint in ``folder``.

        Raises:
            SourceError: there is no readable ``config.json``, or it describes another architecture.
        """
        path = folder / "config.json"
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be read as JSON ({error}): is {folder} a model folder?") from error
        if not isinstance(fields, dict) or "LlamaForCausalLM" not in (fields.get("architectures") or ()):
            found = fields.get("architectures") if isinstance(fields, dict) else type(fields).__name__
            raise SourceError(
                f"{path} describes {found}; Assay serves LlamaForCausalLM, the architecture of Llama 3.1."
            )
        try:
            # Configs written before these were named leave them to Llama's defaults.
            if not fields.get("head_dim"):
                fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
            fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
            fields.setdefault("tie_word_embeddings", False)
            plain = {name: fields.get(name) for name in cls.model_fields if name != "rope"}
            return cls.model_validate(plain | {"rope": Rope.of(fields)})
        except ValidationError as error:
            where = ", ".join(str(e["loc"][0]) for e in error.errors())
            raise SourceError(f"{path} lacks a usable value for {where}.") from error
        except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise SourceError(f"{path} lacks a usable value for the sizes of a Llama ({error!r}).") from error

    def linear_layers(self) -> Iterator[Linear]:
        """The linear layers of all blocks, in order: what a recipe may quantize."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        for index in range(self.num_hidden_layers):
            block = f"model.layers.{index}"
            yield Linear(f"{block}.self_attn.q_proj", hidden, queries)
            yield Linear(f"{block}.self_attn.k_proj", hidden, keys)
            yield Linear(f"{block}.self_attn.v_proj", hidden, keys)
            yield Linear(f"{block}.self_attn.o_proj", queries, hidden)
            yield Linear(f"{block}.mlp.gate_proj", hidden, inner)
            yield Linear(f"{block}.mlp.up_proj", hidden, inner)
            yield Linear(f"{block}.mlp.down_proj", inner, hidden)

    @property
    def linear_weights(self) -> int:
        """How many weights lie in the linear layers of all blocks: what a recipe quantizes."""
        return sum(layer.inputs * layer.outputs for layer in self.linear_layers())

    @property
    def norm_weights(self) -> int:
        """How many weights the norms hold: two in each block and one before the head."""
        return (2 * self.num_hidden_layers + 1) * self.hidden_size

    @property
    def embedding_weights(self) -> int:
        """How many weights the embedding and the head hold; they stay BF16 in every tier."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """How many weights there are in all."""
        return self.linear_weights + self.norm_weights + self.embedding_weights

    @property
    def linear_inputs(self) -> tuple[int, ...]:
        """The input widths of the linear layers: a quantization group must divide each."""
        return (self.hidden_size, self.num_attention_heads * self.head_dim, self.intermediate_size)

    @property
    def linear_widths(self) -> tuple[int, ...]:
        """Input and output widths of the linear layers, each once."""
        keys = self.num_key_value_heads * self.head_dim
        return (*self.linear_inputs, keys)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of BF16 keys and values that one token of context holds."""
        return 2 * BF16_BYTES * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


class Member(BaseModel):
    """One model of the catalog. ``published_bytes`` is the size of its BF16 weights as its publisher states it."""

    model_config = ConfigDict(frozen=True)

    name: str
    ids: tuple[str, ...]
    """On the hub, or of the package that carries it."""
    shape: ModelShape
    published_bytes: int
    licence: str
    licence_url: str

    def check(self, found: ModelShape, where: Path) -> None:
        """Hold the shape of the checkpoint in ``where`` against this entry.

        Raises:
            SourceError: a field differs; the sentence has it, what was found and what was expected.
        """
        for field, is_, expected in _differences(found, self.shape):
            raise SourceError(
                f"{where / 'config.json'} does not describe {self.name}: {field} is {is_} and the catalog has "
                f"{expected}: correct `source` and `revision`, or give the model a name of its own."
            )


def _differences(found: BaseModel, expected: BaseModel) -> Iterator[tuple[str, object, object]]:
    """Each field in which two models of one class differ, by its path."""
    for name in type(expected).model_fields:
        is_, should_be = getattr(found, name), getattr(expected, name)
        if isinstance(is_, BaseModel) and isinstance(should_be, BaseModel):
            yield from ((f"{name}.{path}", a, b) for path, a, b in _differences(is_, should_be))
        elif is_ != should_be:
            yield name, is_, should_be


def _llama(size: str, layers: int, hidden: int, inner: int, heads: int, published: int) -> tuple[Member, Member]:
    """The instruct model and the base model of one size; what is written out here is common to the family."""
    shape = ModelShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        rope=Rope(
            theta=500000.0,
            scaling=RopeScaling(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    )
    instruct, base = (
        Member(
            name=f"Llama-3.1-{variant}",
            # Each was published under the second id and renamed to the first; the hub answers to both.
            ids=(f"meta-llama/Llama-3.1-{variant}", f"meta-llama/Meta-Llama-3.1-{variant}"),
            shape=shape,
            published_bytes=published,
            licence="Llama 3.1 Community License",
            licence_url="https://www.llama.com/llama3_1/license/",
        )
        for variant in (f"{size}-Instruct", size)
    )
    return instruct, base


CATALOG: tuple[Member, ...] = (
    *_llama("8B", layers=32, hidden=4096, inner=14336, heads=32, published=16_060_522_496),
    *_llama("70B", layers=80, hidden=8192, inner=28672, heads=64, published=141_107_412_992),
    # As published now; the first revision stored every KV head twice and counted 16.
    *_llama("405B", layers=126, hidden=16384, inner=53248, heads=128, published=811_706_777_600),
    Member(
        name=EMBEDDED_MODEL,
        ids=(f"HuggingFaceTB/{EMBEDDED_MODEL}", EMBEDDED_PACKAGE),
        shape=ModelShape(
            num_hidden_layers=30,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope=Rope(theta=100000.0),
        ),
        published_bytes=269_030_016,
        licence="Apache License 2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    ),
)
"""The Llama 3.1 family, and the embedded model."""


def member_of(model: str, source: Source) -> Member | None:
    """The catalog's entry for a configured model, by its source or by its name; None for any other Llama."""
    names = {model.lower(), model.rpartition("/")[2].lower()}
    if source.kind != "folder":
        names.add(source.id.lower())
    return next((m for m in CATALOG if names & {m.name.lower(), *map(str.lower, m.ids)}), None)


def find_member(name: str) -> Member:
    """The catalog's entry of this name or hub id.

    Raises:
        ConfigError: there is none; the sentence lists those there are.
    """
    member = member_of(name, Source(kind="hub", id=name))
    if member is None:
        known = ", ".join(member.name for member in CATALOG)
        raise ConfigError(
            f"The catalog has no model {name!r}; it has {known}. Plan any other Llama from a config: "
            "`assay plan --config`."
        )
    return member


def checked_shape(folder: Path, model: str, source: Source) -> ModelShape:
    """The shape of the checkpoint in ``folder``, which must be the catalog's if the model is one of its members.

    Raises:
        SourceError: as `ModelShape.read` and `Member.check`.
    """
    shape = ModelShape.read(folder)
    if member := member_of(model, source):
        member.check(shape, folder)
    return shape
