"""Moves quantized weights along their grid so that the model's distribution is kept.

Runs in the quantization environment, after llm-compressor has chosen scales and zero points and before the
checkpoint is written. Rounding layer by layer keeps each layer's output; what a caller sees is the distribution
at the end. So descend on KL(reference ‖ model) itself, over calibration text, through the rounding
(quantization-aware distillation, with the straight-through estimator). Only which grid point a weight sits on
changes: scales, zero points, and every tensor that is not quantized stay as they are, and so does what an
engine computes. Distances and learning rate are counted in steps of the grid, which makes them mean the same in
every group.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.fakequant import fp8_per_token, fp8_spacing, to_fp8, to_integers
from tiers.calibration import Conversation
from tiers.recipe import Tuning

WARM_UP = 4
"""Steps until the full learning rate: Adam's first directions are of one batch alone."""
BETAS = (0.9, 0.95)
_ROWS = 512
"""Positions whose logits exist at once: 512 × 128,256 × 4 bytes is 260 MB."""

Say = Callable[[str], None]


class _GridLinear(nn.Module):
    """Stands in for a quantized linear layer: its weights are grid points, and ``moved`` learns how far to go."""

    scale: Tensor
    low: Tensor
    high: Tensor
    start: Tensor
    spacing: Tensor

    def __init__(self, linear: Any, original: Tensor) -> None:
        super().__init__()
        self._linear = [linear]  # in a list, so that it is no submodule: its weight is not trained
        self._shape = linear.weight.shape
        scheme = linear.quantization_scheme
        self._float = scheme.weights.type == "float"
        self._fp8_activations = scheme.input_activations is not None
        scale = linear.weight_scale.detach().float().unsqueeze(-1)  # [O, groups, 1]
        half = 2 ** (scheme.weights.num_bits - 1)
        zero = getattr(linear, "weight_zero_point", None)
        zero = torch.zeros_like(scale) if zero is None else zero.detach().float().unsqueeze(-1)
        self.register_buffer("scale", scale)
        self.register_buffer("low", -half - zero)
        self.register_buffer("high", half - 1 - zero)
        grouped = (*scale.shape[:2], -1)
        point = self._nearest(linear.weight.detach().float().view(grouped) / scale)
        # A weight that was rounded to its nearest point starts where it was before, so that the first to move are
        # those that were nearly rounded the other way; one that compensates for others starts on its point, safe
        # from going back. Just below a power of two the spacing of FP8 is half of that above.
        offset = original.detach().float().view(grouped) / scale - point
        nearest = offset.abs() < 0.49 * self._spacing(0.99 * point)
        self.register_buffer("start", torch.where(nearest, point + offset, point))
        self.register_buffer("spacing", self._spacing(self.start))
        self.moved = nn.Parameter(torch.zeros_like(point))

    def _nearest(self, x: Tensor) -> Tensor:
        return to_fp8(x) if self._float else to_integers(x, self.low, self.high)

    def _spacing(self, x: Tensor) -> Tensor:
        return fp8_spacing(x) if self._float else torch.ones((), device=x.device)

    def weight(self) -> Tensor:
        """The weights an engine will compute with, [O, I]."""
        return (self._nearest(torch.addcmul(self.start, self.moved, self.spacing)) * self.scale).view(self._shape)

    def forward(self, x: Tensor) -> Tensor:
        if self._fp8_activations:
            x = fp8_per_token(x)
        return functional.linear(x, self.weight().to(x.dtype))

    def settle(self) -> nn.Module:
        """The linear layer itself, with the weights found."""
        linear = self._linear[0]
        linear.weight.data = self.weight().detach().to(linear.weight.dtype)
        return linear  # type: ignore[no-any-return]


class _HeadKL(torch.autograd.Function):
    """Mean KL(p ‖ q) of the distributions that two sets of final hidden states give, a few rows at a time.

    The gradient by q's logits is q − p, so no more than `_ROWS` rows of logits need to exist.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, reference: Tensor, head: Tensor) -> Tensor:
        gradient, total = torch.empty_like(states), torch.zeros(())
        for start in range(0, len(states), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p = (reference[rows] @ head.T).float().log_softmax(-1)
            log_q = (states[rows] @ head.T).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum().cpu()
            gradient[rows] = (log_q.exp() - p).to(head.dtype) @ head
        ctx.save_for_backward(gradient / len(states))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].device), None, None


def _head_kl(states: Tensor, reference: Tensor, head: Tensor) -> Tensor:
    loss: Tensor = _HeadKL.apply(states, reference, head)  # type: ignore[no-untyped-call]
    return loss


def tune(model: Any, reference: Any, text: list[Conversation], tuning: Tuning, say: Say) -> None:
    """Move the quantized weights of ``model`` to where its answers are most like those of ``reference``.

    Args:
        model: a Transformers causal language model that llm-compressor's oneshot has quantized; changed in place.
        reference: the same model, not quantized.
        text: what both read; only the positions that predict an answer's tokens count.
        tuning: how long and how fast.
        say: is told the progress.
    """
    model.requires_grad_(False)
    layers = {
        name: _GridLinear(module, reference.get_submodule(name).weight)
        for name, module in model.named_modules()
        if _is_quantized(module)
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    optimizer = torch.optim.Adam((layer.moved for layer in layers.values()), betas=BETAS, eps=1e-12, fused=True)
    with torch.no_grad():
        targets = [_states(reference, [each]) for each in text]
    head = reference.get_output_embeddings().weight.detach()
    batches = _batches(len(text), tuning)
    for step in range(tuning.steps):
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate * _schedule(step, tuning.steps)
        chosen = next(batches)
        states = _states(model, [text[i] for i in chosen])
        loss = _head_kl(states, torch.cat([targets[i] for i in chosen]), head)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        say(f"tuning, step {step + 1} of {tuning.steps}: KL {loss.item():.4f}")
    for name, layer in layers.items():
        model.set_submodule(name, layer.settle())


def _is_quantized(module: nn.Module) -> bool:
    return getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None


def _states(model: Any, text: list[Conversation]) -> Tensor:
    """The final hidden states that predict the answers' tokens, one conversation after the other: [T, H]."""
    longest = max(len(each.tokens) for each in text)
    ids = torch.zeros(len(text), longest, dtype=torch.long)
    answers = torch.zeros(len(text), longest, dtype=torch.bool)
    for row, each in enumerate(text):
        ids[row, : len(each.tokens)] = torch.tensor(each.tokens)
        answers[row, each.answer_start - 1 : len(each.tokens) - 1] = True
    # What follows a short conversation is padding; attention looks back only, so nothing before it sees it.
    states: Tensor = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return states[answers.to(states.device)]


def _batches(count: int, tuning: Tuning) -> Iterator[list[int]]:
    """Conversations by number, all of them before any comes again."""
    generator = torch.Generator().manual_seed(tuning.seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - tuning.batch + 1, tuning.batch):
            yield order[start : start + tuning.batch]


def _schedule(step: int, steps: int) -> float:
    """A share of the learning rate: up over `WARM_UP` steps, down along a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
