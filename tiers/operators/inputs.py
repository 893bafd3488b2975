"""What operators are run on: tensors that a real model computes, or others drawn to be like them.

Captured with Transformers from the reference checkpoint, in BF16, on a fixed text: what each operator of its
middle block is given, and that block's weights. For other widths values are drawn: a channel of the drawn tensor
has the scale that the real one's channel at the same quantile has, outliers included, and in units of that scale
the values of real ones, drawn with replacement. Neighbouring tokens and channels then know nothing of each other.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.reference import Llama3Scaling
from tiers.conformance.corpus import load_corpus

TOKENS = 264
SEED = 31
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama-3.1-8B's config.json, as far as its operators depend on it."""
_POOL = 1 << 20
_DISTINCT_ROWS = 1 << 13
_ENDS = ("embed", "head")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama, from its config.json."""

    name: str
    config: dict[str, Any]

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.config["hidden_size"])

    @property
    def inner(self) -> int:
        """F."""
        return int(self.config["intermediate_size"])

    @property
    def heads(self) -> int:
        """Of queries."""
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        """Of keys and values."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def width(self) -> int:
        """D, of one head."""
        return int(self.config.get("head_dim") or self.hidden // self.heads)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.config["vocab_size"])

    @property
    def context(self) -> int:
        """Positions that rotations are known for."""
        return int(self.config["max_position_embeddings"])

    @property
    def epsilon(self) -> float:
        """Of norms."""
        return float(self.config["rms_norm_eps"])

    @property
    def group(self) -> int:
        """Weights that share a scale in INT4: 128 where that divides the widths, or half as many until it does."""
        size = 128
        while any(width % size for width in (self.hidden, self.inner, self.heads * self.width)):
            size //= 2
        return size

    @property
    def theta(self) -> float:
        """Of rotations."""
        return float(self._rope["rope_theta"])

    @property
    def scaling(self) -> Llama3Scaling | None:
        """Llama 3.1's, if the config asks for it."""
        if self._rope.get("rope_type") != "llama3":
            return None
        return Llama3Scaling(**{name: self._rope[name] for name in Llama3Scaling.__dataclass_fields__})

    @property
    def _rope(self) -> dict[str, Any]:
        # Of two generations of Transformers.
        return {
            "rope_theta": self.config.get("rope_theta", 10000.0),
            **(self.config.get("rope_scaling") or {}),
            **(self.config.get("rope_parameters") or {}),
        }


@dataclass(frozen=True)
class Inputs:
    """Of one shape: activations by what they are, [T, width], and weights by their names in a block."""

    shape: Shape
    activations: dict[str, Tensor]
    weights: Mapping[str, Tensor]


@torch.inference_mode()
def capture(checkpoint: Path) -> Inputs:
    """Run the reference in Transformers on a fixed text, and keep what its middle block and its head are given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    text = "\n\n".join(passage.text for passage in load_corpus() if passage.language == "en")
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"][:TOKENS]
    block = model.model.layers[len(model.model.layers) // 2]
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: Any, *, output: bool = False) -> None:
        def hook(_: Any, given: Any, made: Any) -> None:
            kept[name] = (made if output else given[0])[0].clone()

        module.register_forward_hook(hook)

    keep("stream", block.input_layernorm)
    keep("normed", block.self_attn.q_proj)
    for name in ("q", "k", "v"):
        keep(name, getattr(block.self_attn, f"{name}_proj"), output=True)
    keep("attended", block.self_attn.o_proj)
    keep("added", block.self_attn.o_proj, output=True)
    keep("normed_mlp", block.mlp.gate_proj)
    keep("gate", block.mlp.gate_proj, output=True)
    keep("up", block.mlp.up_proj, output=True)
    keep("inner", block.mlp.down_proj)
    keep("final", model.lm_head)
    keep("logits", model.lm_head, output=True)
    model(torch.tensor([tokens]))
    kept["gate_up"] = torch.cat([kept.pop("gate"), kept.pop("up")], dim=-1)
    weights = {f"{name}.weight": tensor for name, tensor in _flat(block).items()}
    weights |= {"embed": model.model.embed_tokens.weight.data, "head": model.lm_head.weight.data}
    config["num_hidden_layers"] = 1
    return Inputs(Shape(checkpoint.parent.name, config), kept, weights)


def _flat(block: Any) -> dict[str, Tensor]:
    parts = {name: getattr(block.self_attn, name) for name in PROJECTIONS[:4]}
    parts |= {name: getattr(block.mlp, name) for name in PROJECTIONS[4:]}
    parts |= {name: getattr(block, name) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: part.weight.data for name, part in parts.items()}


@dataclass(frozen=True)
class Like:
    """What there is to know of a real tensor, to draw others like it."""

    scales: Tensor
    """Root mean square of each column, smallest first."""
    pool: Tensor
    """Values in units of their column's."""

    @classmethod
    def of(cls, real: Tensor, columns: int = -1) -> "Like":
        """By columns, or by rows with ``columns`` 0."""
        values = real.float() if columns == -1 else real.float().T
        scales = values.square().mean(0).sqrt()
        within = (values / scales.clamp_min(1e-30)).flatten()
        step = max(1, within.numel() // _POOL)
        return cls(scales.sort().values, within[::step][:_POOL].contiguous())

    def draw(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """[rows, columns], BF16."""
        at = torch.linspace(0, len(self.scales) - 1, columns).round().long()
        scales = self.scales[at][torch.randperm(columns, generator=generator)]
        drawn = torch.empty(rows, columns, dtype=torch.bfloat16)
        for begin in range(0, rows, 512):
            part = drawn[begin : begin + 512]
            chosen = torch.randint(len(self.pool), part.shape, generator=generator, dtype=torch.int32)
            part.copy_(self.pool[chosen] * scales)
        return drawn


def drawn_like(real: Inputs, shape: Shape) -> Inputs:
    """Inputs of another shape, like the real ones."""
    generator = torch.Generator().manual_seed(SEED)
    kv = shape.kv_heads * shape.width
    widths = {
        **dict.fromkeys(("stream", "normed", "added", "normed_mlp", "final"), shape.hidden),
        **dict.fromkeys(("q", "attended"), shape.heads * shape.width),
        **dict.fromkeys(("k", "v"), kv),
        "gate_up": 2 * shape.inner,
        "inner": shape.inner,
    }
    activations = {
        name: Like.of(real.activations[name]).draw(TOKENS, width, generator) for name, width in widths.items()
    }
    # Of logits the tokens vary, and few rows are needed.
    activations["logits"] = Like.of(real.activations["logits"]).draw(16, shape.vocabulary, generator)
    return Inputs(shape, activations, DrawnWeights(real.weights, shape))


class DrawnWeights(Mapping[str, Tensor]):
    """Weights of another shape, like the real ones; each is drawn when it is asked for, the same each time.

    A block's are kept, for each storage asks for them; embedding and head, which are more, are not.
    """

    def __init__(self, real: Mapping[str, Tensor], shape: Shape) -> None:
        self._real = real
        queries, keys = shape.heads * shape.width, shape.kv_heads * shape.width
        sizes = {
            "q_proj": (queries, shape.hidden),
            "k_proj": (keys, shape.hidden),
            "v_proj": (keys, shape.hidden),
            "o_proj": (shape.hidden, queries),
            "gate_proj": (shape.inner, shape.hidden),
            "up_proj": (shape.inner, shape.hidden),
            "down_proj": (shape.hidden, shape.inner),
            "input_layernorm": (shape.hidden,),
            "post_attention_layernorm": (shape.hidden,),
        }
        self._sizes = {f"{name}.weight": size for name, size in sizes.items()}
        self._sizes |= dict.fromkeys(_ENDS, (shape.vocabulary, shape.hidden))
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in _ENDS:
            return self._draw(name)
        if name not in self._kept:
            self._kept[name] = self._draw(name)
        return self._kept[name]

    def _draw(self, name: str) -> Tensor:
        *rows, columns = self._sizes[name]
        generator = torch.Generator().manual_seed(SEED + list(self._sizes).index(name))
        real = self._real[name]
        like, count = Like.of(real if real.dim() > 1 else real[None]), rows[0] if rows else 1
        drawn = like.draw(min(count, _DISTINCT_ROWS), columns, generator)
        # Of embedding and head the later rows are the first ones, turned: drawing all of them takes long.
        turned = [drawn.roll(turn, -1) for turn in range(-(-count // len(drawn)))]
        whole = torch.cat(turned)[:count] if len(turned) > 1 else drawn
        return whole if rows else whole[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
