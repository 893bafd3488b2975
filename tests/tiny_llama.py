"""A model with everything that Llama 3.1 has and the embedded one lacks, made in seconds: its weights are random.

The real vocabulary of 128,256 tokens, the chat format, `llama3` RoPE scaling, grouped-query attention, a head of
its own and a context of 131,072. What it says means nothing; whether an engine computes it right can be measured.

The vocabulary is read from the package `llama-models`. That file holds the mergeable ranks only: the pattern that
splits text is the default of Transformers' converter, and the special tokens are named here. Tests hold both
against that package's own tokenizer.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

NAME = "Tiny-Random-Llama-3.1"
SEED = 31
BASE_TOKENS = 128_000
NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""By their distance from `BASE_TOKENS`; the other ones of 256 are reserved."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
"""As Llama 3.1 publishes it, `head_dim` left out included; smaller in hidden and intermediate size, layers and
heads, which are such that an engine's kernels take them and that quantization groups of 128 divide them."""
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
}


def special_tokens() -> list[str]:
    """Llama 3.1's own 256, in the order of their ids, which begin at `BASE_TOKENS`."""
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256))
    return [NAMED_SPECIALS.get(number) or next(reserved) for number in range(256)]


def model_folder(home: Path) -> Path:
    """The model's folder under ``home``, written if there is none made by this very code and these packages."""
    made_by = [importlib.metadata.version(package).encode() for package in ("llama-models", "transformers")]
    made_by += [Path(__file__).read_bytes(), _TEMPLATE.read_bytes()]
    folder = home / f"tiny-llama-{hashlib.sha256(b' '.join(made_by)).hexdigest()[:8]}"
    if not folder.exists():
        for outdated in home.glob("tiny-llama-*"):  # what an interrupted run left included
            shutil.rmtree(outdated)
        unfinished = folder.with_name(f"{folder.name}.partial")
        unfinished.mkdir(parents=True)
        write_weights(unfinished)
        write_tokenizer(unfinished)
        unfinished.rename(folder)
    return folder


def write_weights(folder: Path) -> None:
    """Config and BF16 weights: 131 MB, nearly all of it embedding and head."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2))
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        name: (mean + spread * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape, mean, spread in _layout()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _layout() -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and standard deviation of every tensor.

    The spreads are such that everything counts: attention logits vary by about 2.5, so that a head looks at a few
    tokens of thousands; a block adds about as much as the residual stream holds; logits vary by about 4, so that
    the likeliest of 128,256 tokens have probabilities worth comparing.
    """
    hidden, inner, vocabulary = (CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    key_width = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden), 0.0, 1.0
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,), 1.0, 0.1
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden), 0.0, 1.6 * hidden**-0.5
        yield f"{at}.self_attn.k_proj.weight", (key_width, hidden), 0.0, 1.6 * hidden**-0.5
        yield f"{at}.self_attn.v_proj.weight", (key_width, hidden), 0.0, hidden**-0.5
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden), 0.0, hidden**-0.5
        yield f"{at}.post_attention_layernorm.weight", (hidden,), 1.0, 0.1
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden), 0.0, hidden**-0.5
        yield f"{at}.mlp.up_proj.weight", (inner, hidden), 0.0, hidden**-0.5
        yield f"{at}.mlp.down_proj.weight", (hidden, inner), 0.0, inner**-0.5
    yield "model.norm.weight", (hidden,), 1.0, 0.1
    yield "lm_head.weight", (vocabulary, hidden), 0.0, 4.0 * hidden**-0.5


def write_tokenizer(folder: Path) -> None:
    """``tokenizer.json``, its config and the chat template, as a Llama 3.1 folder has them."""
    converted_tokenizer().save(str(folder / "tokenizer.json"))
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")
    config = {
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def converted_tokenizer() -> Any:
    """Llama 3's tokenizer as a `tokenizers.Tokenizer`; text encoded with special tokens begins with one BOS."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # Read where it lies, without a copy in a cache that knows the path and not what is in the file.
    with mock.patch.dict("os.environ", {"TIKTOKEN_CACHE_DIR": ""}):
        tokenizer = TikTokenConverter(str(_ranks_file()), extra_special_tokens=special_tokens()).converted()
    bos = ("<|begin_of_text|>", BASE_TOKENS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos]),
        ]
    )
    return tokenizer


def _ranks_file() -> Path:
    files = importlib.metadata.files("llama-models") or []
    return next(Path(str(f.locate())) for f in files if str(f) == "llama_models/llama3/tokenizer.model")


_TEMPLATE = Path(__file__).with_suffix(".jinja")
