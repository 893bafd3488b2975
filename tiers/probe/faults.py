"""Breaks the model of a running engine, one fault at a time, and mends it; loaded inside the engine's workers.

Only in engines that were started to be broken, which their reading shows: `tiers.probe.reading.MAY_PLANT`. Such
engines run without compiled graphs, in which nothing could be exchanged. Written against vLLM 0.32.0.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

from tiers.conformance.faults import KV_SCALE, LOGITS_SCALE

_E4M3_MOST = 448.0


class Faults:
    """What is broken in one worker's model."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._model: Any = runner.get_model()
        self._mending: list[Callable[[], None]] = []
        self._plants: dict[str, Callable[[], None]] = {
            "layer-dropped": self._drop_layer,
            "scales-swapped": self._swap_scales,
            "positions-shifted": self._shift_positions,
            "rope-unscaled": self._unscale_rope,
            "kv-scale": self._scale_cache,
            "rounded-twice": self._round_twice,
            "logits-scaled": self._scale_logits,
            "top-p-ignored": self._ignore_top_p,
        }

    @torch.inference_mode()
    def plant(self, name: str | None) -> int:
        """Mend what is broken, and break this; in how many places, none where this worker has no such part."""
        self._mend()
        try:
            if name is not None:
                self._plants[name]()
        except BaseException:
            self._mend()
            raise
        return len(self._mending)

    def _mend(self) -> None:
        """Undo it, last first."""
        while self._mending:
            self._mending.pop()()

    def _put(self, owner: Any, name: str, value: Any) -> None:
        """In the place of an attribute or a method of an object."""
        if name in vars(owner):
            before = vars(owner)[name]
            self._mending.append(lambda: setattr(owner, name, before))
        else:
            self._mending.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def _fill(self, tensor: Tensor, values: Tensor) -> None:
        """Where kernels find it: they may have kept the tensor itself."""
        before = tensor.detach().cpu().clone()
        self._mending.append(lambda: _copy(tensor, before))
        _copy(tensor, values)

    def _blocks(self) -> list[tuple[int, Any]]:
        """Of this stage of the pipeline, with their numbers in the whole model."""
        stack = self._model.model
        return [(number, stack.layers[number]) for number in range(stack.start_layer, stack.end_layer)]

    @property
    def _middle(self) -> int:
        return int(self._model.config.num_hidden_layers) // 2

    def _modules(self, kind: type[nn.Module]) -> Iterator[Any]:
        return (module for module in self._model.modules() if isinstance(module, kind))

    def _drop_layer(self) -> None:
        for number, block in self._blocks():
            if number == self._middle:
                self._put(block, "forward", lambda positions, hidden, residual: (hidden, residual))

    def _swap_scales(self) -> None:
        blocks = dict(self._blocks())
        if {self._middle - 1, self._middle} <= set(blocks):
            one, other = (blocks[self._middle - back].mlp.down_proj for back in (1, 0))
            for name in ("weight_scale", "weight_scale_inv"):  # the latter of blocks
                if hasattr(one, name):
                    ours, theirs = getattr(one, name).data, getattr(other, name).data
                    before = theirs.clone()
                    self._fill(theirs, ours)
                    self._fill(ours, before)

    def _shift_positions(self) -> None:
        for rope in self._modules(RotaryEmbeddingBase):
            self._put(rope, "forward", _shifting(rope.forward))

    def _unscale_rope(self) -> None:
        for rope in self._modules(Llama3RotaryEmbedding):
            plain = RotaryEmbeddingBase._compute_inv_freq(rope, rope.base)
            angles = torch.outer(torch.arange(len(rope.cos_sin_cache), dtype=torch.float), plain)
            self._fill(rope.cos_sin_cache, torch.cat((angles.cos(), angles.sin()), dim=-1))

    def _scale_cache(self) -> None:
        for attention in self._modules(Attention):
            self._put(attention, "forward", _misreading(attention.forward))

    def _round_twice(self) -> None:
        """To scales that are powers of two, as vLLM does of itself for DeepGEMM where it is let."""
        for layer in self._model.modules():
            weight, scale = getattr(layer, "weight", None), getattr(layer, "weight_scale", None)
            if weight is None or scale is None or weight.dtype != torch.float8_e4m3fn:
                continue
            coarse = torch.exp2(torch.ceil(torch.log2(scale.float())))
            # vLLM holds the weight as [K, N], the scales as [N, 1] or one.
            rounded = (weight.float() * (scale.float() / coarse).view(1, -1)).clamp(-_E4M3_MOST, _E4M3_MOST)
            self._fill(weight.data, rounded.to(weight.dtype))
            self._fill(scale.data, coarse)
            if (values := getattr(layer, "fp8_values_in_fp32", None)) is not None:  # of our kernel for CPUs
                self._fill(values, weight.data.t().float())

    def _scale_logits(self) -> None:
        compute = self._model.compute_logits
        self._put(self._model, "compute_logits", lambda *args, **kwargs: _times(compute(*args, **kwargs)))

    def _ignore_top_p(self) -> None:
        sampler = self._runner.sampler
        if (states := getattr(sampler, "sampling_states", None)) is not None:  # vLLM's second runner
            both = states.get_top_k_top_p
            self._put(states, "get_top_k_top_p", lambda *args: (both(*args)[0], None))
        else:
            draw = sampler.topk_topp_sampler.forward
            ignoring = lambda logits, generators, k, p: draw(logits, generators, k, None)  # noqa: E731
            self._put(sampler.topk_topp_sampler, "forward", ignoring)


def _copy(tensor: Tensor, values: Tensor) -> None:
    if tensor.shape != values.shape:
        raise ValueError(f"{tuple(values.shape)} does not fit into {tuple(tensor.shape)}")
    tensor.copy_(values)


def _times(logits: Tensor | None) -> Tensor | None:
    return None if logits is None else logits * LOGITS_SCALE  # only one rank may have them


def _generated(rows: int) -> Tensor | None:
    """Which rows of this step are tokens that follow a generated one, [rows]: those that are alone of their kind.

    None in a step without requests, as vLLM runs them while it starts.
    """
    metadata: Any = get_forward_context().attn_metadata
    while isinstance(metadata, list | dict):
        metadata = next(iter(metadata if isinstance(metadata, list) else metadata.values()), None)
    if metadata is None:
        return None
    lengths = torch.diff(metadata.query_start_loc)
    alone = torch.repeat_interleave(lengths == 1, lengths)[:rows]
    return nn.functional.pad(alone, (0, rows - len(alone)))


def _shifting(rotate: Callable[..., Any]) -> Callable[..., Any]:
    def shifted(positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = _generated(positions.shape[-1])
        return rotate(positions if rows is None else positions + rows.to(positions.dtype), *args, **kwargs)

    return shifted


def _misreading(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keys and values read with a wrong scale: (c·K)ᵀq is Kᵀ(c·q), and weights of c·V are c times those of V."""

    def misread(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = _generated(query.shape[0])
        if rows is None:
            return attend(query, *args, **kwargs)
        factor = torch.where(rows, KV_SCALE, 1.0).to(query.dtype).view(-1, *[1] * (query.dim() - 1))
        attended = attend(query * factor, *args, **kwargs)
        return attended * factor.view(-1, *[1] * (attended.dim() - 1))

    return misread
