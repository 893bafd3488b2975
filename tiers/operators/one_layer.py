"""A Llama of one block as vLLM builds it: its own classes, choice of kernels, loader and KV cache, in this
process.

Written against vLLM 0.32.0. On a GPU the same steps take what vLLM chooses there; that has not been run yet.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, get_kv_cache_spec, init_attn_backend, init_kv_cache

from tiers.operators.storing import Stored

BLOCKS = 16
"""Of the KV cache."""


@dataclass(frozen=True)
class Part:
    """One sequence of a batch: its last ``new`` tokens are computed, those before are in the cache."""

    length: int
    new: int
    blocks: tuple[int, ...]


class OneLayer:
    """The model, and what running parts of it takes."""

    def __init__(self, stored: Stored) -> None:
        # What a checkpoint would hold is read once: embedding and head of a large model are some GB.
        self.stored = replace(stored, tensors=[])
        self.device = torch.device(current_platform.device_type)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(stored.config))
            self.vllm_config: VllmConfig = EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                enforce_eager=True,
                generation_config="vllm",
                kv_cache_dtype="fp8_e4m3" if stored.has_kv_scales else "auto",
                kv_cache_memory_bytes=1 << 28,
                max_model_len=min(8192, int(stored.config["max_position_embeddings"])),
            ).create_engine_config()
        self.vllm_config.kernel_config.ir_op_priority.set_default()
        with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(torch.bfloat16), self.device:
            _join(self.vllm_config)
            self.model: Any = initialize_model(self.vllm_config)
            self.model.load_weights(stored.tensors)
            process_weights_after_loading(self.model, self.vllm_config.model_config, self.device)
            self._cache()
        self.block = self.model.model.layers[0]
        self.attention = self.block.self_attn.attn

    def _cache(self) -> None:
        config = self.vllm_config
        specs = get_kv_cache_spec(config)
        (layer,) = config.compilation_config.static_forward_context.values()
        backend = layer.get_attn_backend()
        layouts = [layout.name for layout in backend.supported_kv_cache_layouts() or ()]
        resolve_kv_cache_layout(config, [layouts], specs.values())
        config.cache_config.num_gpu_blocks_override = BLOCKS
        groups = get_kv_cache_groups(config, specs)
        self._kv = get_kv_cache_config_from_groups(config, groups, available_memory=0)
        self._groups, _, sizes = init_attn_backend(self._kv, config, self.device)
        (self.block_size,) = sizes
        context = config.compilation_config.static_forward_context
        every = [group for groups in self._groups for group in groups]
        init_kv_cache(context, self._kv, self.device, sizes, config, attn_groups=every)

    @torch.inference_mode()
    def run(self, layer: Any, *given: Tensor) -> Any:
        """What a layer of the model gives for this, on the CPU; the tensors given are left as they are."""
        with set_current_vllm_config(self.vllm_config), set_forward_context(None, self.vllm_config):
            made = layer(*(each.clone().to(self.device) for each in given))
        return tuple(each.cpu() for each in made if each is not None) if isinstance(made, tuple) else made.cpu()

    @torch.inference_mode()
    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Sequence[Part]) -> Tensor:
        """Write new keys and values into the cache and attend over it: [T, heads · D] → [T, heads · D].

        Args:
            query: of the new tokens of all sequences of the batch, one after another.
            key: [T, KV heads · D].
            value: [T, KV heads · D].
            batch: the sequences.
        """
        new = torch.tensor([each.new for each in batch])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), new.cumsum(0)]).int()
        lengths = torch.tensor([each.length for each in batch], dtype=torch.int32)
        most = max(len(each.blocks) for each in batch)
        rows = [[*each.blocks, *[0] * (most - len(each.blocks))] for each in batch]
        table = torch.tensor(rows, dtype=torch.int32)
        slots = torch.tensor([slot for each in batch for slot in self._slots(each)])
        metadata = build_attn_metadata(
            self._groups,
            num_reqs=len(batch),
            num_tokens=len(query),
            query_start_loc_gpu=starts.to(self.device),
            query_start_loc_cpu=starts,
            max_query_len=int(new.max()),
            seq_lens=lengths.to(self.device),
            max_seq_len=int(lengths.max()),
            block_tables=[table.to(self.device)],
            slot_mappings=slots[None].to(self.device),
            kv_cache_config=self._kv,
            seq_lens_cpu_upper_bound=lengths,
        )
        mapping = dict.fromkeys(metadata, slots.to(self.device))
        with (
            set_current_vllm_config(self.vllm_config),
            set_forward_context(metadata, self.vllm_config, num_tokens=len(query), slot_mapping=mapping),
        ):
            made: Tensor = self.attention(*(each.clone().to(self.device) for each in (query, key, value)))
        return made.view(len(query), -1).cpu()

    def _slots(self, sequence: Part) -> Iterator[int]:
        for position in range(sequence.length - sequence.new, sequence.length):
            yield sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size


def _join(config: VllmConfig) -> None:
    """vLLM's layers ask of which group of processes they are one: of one that is alone."""
    meeting = Path(_meetings().name) / uuid.uuid4().hex  # a file that another group has left cannot be met at
    init_distributed_environment(1, 0, f"file://{meeting}", 0, current_platform.dist_backend)
    ensure_model_parallel_initialized(1, 1)


@cache
def _meetings() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends; the group keeps its file open to itself until then."""
    return tempfile.TemporaryDirectory()
