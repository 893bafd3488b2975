"""The shape of a Llama model, read from its ``config.json``. Knows sizes; knows nothing of engines."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.errors import SourceError
from tiers.precision import PrecisionName

BYTES_PER_WEIGHT: dict[PrecisionName, float] = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
"""Of a quantized linear weight, scales left out: they add 0.1 to 7 per cent."""


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
        if "LlamaForCausalLM" not in (fields.get("architectures") or ()):
            raise SourceError(
                f"{path} describes {fields.get('architectures')}; Assay serves LlamaForCausalLM, "
                "the architecture of Llama 3.1."
            )
        # Llama configs written before head_dim and tied embeddings were named leave them to these defaults.
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        fields.setdefault("tie_word_embeddings", False)
        try:
            return cls.model_validate({name: fields.get(name) for name in cls.model_fields})
        except ValidationError as error:
            where = ", ".join(str(e["loc"][0]) for e in error.errors())
            raise SourceError(f"{path} lacks a usable value for {where}.") from error

    @property
    def linear_weights(self) -> int:
        """How many weights lie in the linear layers of all blocks: what a recipe quantizes."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_weights(self) -> int:
        """How many weights the embedding and the head hold; they stay BF16 in every tier."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def linear_inputs(self) -> tuple[int, ...]:
        """The input widths of the linear layers: a quantization group must divide each."""
        return (self.hidden_size, self.num_attention_heads * self.head_dim, self.intermediate_size)

    @property
    def linear_widths(self) -> tuple[int, ...]:
        """Input and output widths of the linear layers, each once."""
        keys = self.num_key_value_heads * self.head_dim
        return (*self.linear_inputs, keys)

    def weight_bytes(self, precision: PrecisionName) -> int:
        """Bytes of all weights at a precision."""
        return int(self.linear_weights * BYTES_PER_WEIGHT[precision]) + self.embedding_weights * 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of BF16 keys and values that one token of context holds."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
