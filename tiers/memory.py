"""How many bytes an engine takes: weights, KV cache, activations, graphs. Knows shapes; knows no machine.

Weights and KV cache are counted; the rest is an **estimate** that follows what vLLM 0.32 allocates when it
profiles itself at start (``GPUModelRunner.profile_run``), and a margin where only a measurement would tell. vLLM
gives its KV cache whatever is really left.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from pydantic import BaseModel, ConfigDict

from tiers.catalog import BF16_BYTES, ModelShape
from tiers.errors import ConfigError
from tiers.hardware import GIB, MIB, Gpu
from tiers.recipe import Recipe
from tiers.storage import bits, bytes_of, stored
from tiers.tier import Resources

CPU_ENGINE_OVERHEAD = int(2.2 * GIB)
"""Three processes with PyTorch and vLLM, before weights and cache; their proportional set size on vLLM 0.32.0."""
CUDA_OVERHEAD = GIB
"""CUDA's context, its libraries' workspaces and what the driver keeps of the card: a margin, not a measurement."""
NCCL_OVERHEAD = GIB
"""Buffers for talking to other GPUs: a margin, not a measurement."""
GRAPH_BYTES_PER_LAYER = MIB // 5
"""Of one captured CUDA graph: about 0.6 GiB for the hundred graphs of 32 layers; a rule of thumb, not measured."""
GRAPH_BATCHES = 51
"""vLLM captures batches of 1, 2, 4, every 8th up to 256 and every 16th up to 512, each whole and in pieces."""
SAMPLER_BYTES = 14
"""A logit while it is sampled from: BF16 and FP32 logits, FP32 probabilities, FP32 noise (2 + 4 + 4 + 4)."""
KV_BLOCK = 16
"""Tokens in a block of vLLM's KV cache: a request takes whole blocks."""


@dataclass(frozen=True)
class Degree:
    """Over how many GPUs an engine is spread: each layer over ``tensor``, the layers over ``pipeline``."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        """``tensor 8 × pipeline 2``; empty for a single GPU."""
        parts = {"tensor": self.tensor, "pipeline": self.pipeline}
        return " × ".join(f"{name} {size}" for name, size in parts.items() if size > 1)


@dataclass(frozen=True)
class Batch:
    """The largest step an engine prepares for: tokens in it, and sequences that sample at once."""

    tokens: int
    sequences: int

    @classmethod
    def of(cls, resources: Resources, gpu: Gpu | None) -> "Batch":
        """vLLM's defaults for a server on this GPU, or on the CPU, and what the config sets instead.

        From ``EngineArgs.get_batch_defaults`` of vLLM 0.32.

        Raises:
            ConfigError: the config's number of tokens is none.
        """
        tokens, sequences = 2048, 256 if gpu else 128
        if gpu and gpu.memory >= 160 * GIB:
            tokens, sequences = 16384, 1024
        elif gpu and gpu.memory >= 70 * GIB and "a100" not in gpu.name.lower():
            tokens, sequences = 8192, 1024
        for name, value in resources.engine_args.items():
            if name.strip("-").replace("_", "-") == "max-num-batched-tokens":
                if not str(value).isdigit():
                    raise ConfigError(f"engine_args: {name} must be a plain number, and it is {value!r}.")
                tokens = int(value)
        return cls(tokens, resources.max_num_seqs or min(sequences, tokens))


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint's weights, by where they lie."""

    blocks: int
    embedding: int
    head: int
    """0 when it is the embedding itself."""
    fp8: int = 0
    """How many of the weights in the blocks are FP8."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.embedding + self.head

    def on_one(self, degree: Degree, layers: int) -> int:
        """Bytes on the fullest of the GPUs; the embedding is at the pipeline's first, the head at its last."""
        blocks = self.blocks * ceil(layers / degree.pipeline) / layers
        one = degree.pipeline == 1
        ends = self.embedding + self.head if one else max(self.embedding, self.head)
        return ceil((blocks + ends) / degree.tensor)


@lru_cache(maxsize=256)
def weights_of(shape: ModelShape, recipe: Recipe) -> Weights:
    """What a checkpoint of this recipe will hold, to the byte; its files add a header of a few kB.

    Raises:
        BuildError: the recipe does not fit the shape.
    """
    blocks, fp8 = shape.norm_weights * BF16_BYTES, 0
    for layer, weights in stored(recipe, shape):
        blocks += bytes_of(layer, weights)
        fp8 += layer.inputs * layer.outputs if bits(weights) == 8 else 0
    embedding = shape.vocab_size * shape.hidden_size * BF16_BYTES
    return Weights(blocks, embedding, 0 if shape.tie_word_embeddings else embedding, fp8)


class Footprint(BaseModel):
    """Bytes that one engine takes on each of its GPUs, or in RAM, whatever it is asked."""

    model_config = ConfigDict(frozen=True)

    weights: int
    activations: int
    graphs: int
    overhead: int
    kv_per_token: int
    """Comes on top for each token of context."""

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.activations + self.graphs + self.overhead

    def kv_bytes(self, context: int) -> int:
        """Of one request of that many tokens."""
        return self.kv_per_token * ceil(context / KV_BLOCK) * KV_BLOCK


def kv_bytes_per_token(shape: ModelShape, recipe: Recipe, degree: Degree | None = None) -> int:
    """Bytes of keys and values of one token on the fullest GPU; of the whole engine without a ``degree``.

    A GPU holds at least one KV head: with more of them than heads, heads are repeated.
    """
    number = bits(recipe.precision.kv_cache) // 8
    layers, heads = shape.num_hidden_layers, shape.num_key_value_heads
    if degree is not None:
        layers, heads = ceil(layers / degree.pipeline), max(1, heads // degree.tensor)
    return 2 * number * layers * heads * shape.head_dim


def gpu_footprint(shape: ModelShape, recipe: Recipe, weights: Weights, degree: Degree, batch: Batch) -> Footprint:
    """Bytes on the fullest GPU of an engine spread over several."""
    return Footprint(
        weights=weights.on_one(degree, shape.num_hidden_layers),
        activations=activation_bytes(shape, degree, batch),
        graphs=2 * GRAPH_BATCHES * ceil(shape.num_hidden_layers / degree.pipeline) * GRAPH_BYTES_PER_LAYER,
        overhead=CUDA_OVERHEAD + (NCCL_OVERHEAD if degree.gpus > 1 else 0),
        kv_per_token=kv_bytes_per_token(shape, recipe, degree),
    )


def ram_footprint(shape: ModelShape, recipe: Recipe, weights: Weights, batch: Batch) -> Footprint:
    """Bytes of RAM of an engine on the CPU; it captures no graphs."""
    return Footprint(
        # tiers/probe/fp8_cpu.py keeps FP8 weights once more, in FP32.
        weights=weights.total + 4 * weights.fp8,
        activations=activation_bytes(shape, Degree(), batch),
        graphs=0,
        overhead=CPU_ENGINE_OVERHEAD,
        kv_per_token=kv_bytes_per_token(shape, recipe),
    )


def activation_bytes(shape: ModelShape, degree: Degree, batch: Batch) -> int:
    """The larger of two moments of a step, both beside the hidden states of all its T tokens.

    In a feed-forward layer: residual and normed input [T, hidden], gate and up [T, 2·inner], their product
    [T, inner], in BF16, the inner ones split by tensor parallelism. While sampling: the logits
    [sequences, vocabulary], gathered on every GPU, `SAMPLER_BYTES` each.
    """
    hidden = batch.tokens * shape.hidden_size * BF16_BYTES
    inner = batch.tokens * ceil(shape.intermediate_size / degree.tensor) * BF16_BYTES
    sampling = batch.sequences * shape.vocab_size * SAMPLER_BYTES
    return hidden + max(2 * hidden + 3 * inner, sampling)
