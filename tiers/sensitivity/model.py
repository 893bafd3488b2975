"""The reference in Transformers, any part of which can be quantized: hidden states in both phases, and scores.

Everything that is not quantized is FP32, so that nothing else differs. One sequence at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from kernels.divergence import compare
from kernels.fakequant import Scales, Scheme, fake_quantize, scales_of
from kernels.fp8_attention import PER_TENSOR, OperandScales, attention, attention_in_fp8
from kernels.head import Projected, fp32_logits
from tiers.conformance.pack import Answer
from tiers.conformance.scores import Phase, Scores
from tiers.precision import NumberFormat
from tiers.sensitivity.units import HEAD_NAME, Format, Unit

_NAME = "assay"
"""Of our attention, among those that Transformers can be told to take."""
_NUMBERS = {"fp8_e4m3": "fp8", "int8": "int8", "int4": "int4"}


@dataclass
class Reading:
    """How attention treats what it multiplies, in one pass over one sequence."""

    scales: Sequence[OperandScales] = ()
    """Of each layer."""
    from_cache: bool = False
    """Whether keys and values are read as an FP8 cache holds them."""
    in_fp8: bool = False
    """Whether the products are of FP8 operands."""
    largest: dict[int, list[Tensor]] | None = None
    """Where it is noted how large each layer's queries, keys and values were."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One layer's attention, [B, H, Q, D]."""
        if self.largest is not None:
            now = [each.abs().amax() for each in (query, key, value)]
            before = self.largest.get(layer, now)
            self.largest[layer] = [torch.maximum(*pair) for pair in zip(before, now, strict=True)]
        if self.in_fp8:
            return attention_in_fp8(query, key, value, scaling, self.scales[layer])
        if self.from_cache:
            scales = self.scales[layer]
            key = fake_quantize(key, PER_TENSOR, scales.key)
            value = fake_quantize(value, PER_TENSOR, scales.value)
        return attention(query, key, value, scaling)


_EXACT = Reading()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """As Transformers calls attention; the mask of one whole sequence is known without being told."""
    reading: Reading = given.get("reading", _EXACT)
    return reading.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


@dataclass
class ReferenceModel:
    """A checkpoint, loaded."""

    model: Any
    scales: tuple[OperandScales, ...] = field(default=())
    """Static ones of queries, keys and values, once `calibrate` has found them."""

    @classmethod
    def load(cls, checkpoint: Path) -> "ReferenceModel":
        """In FP32, on a GPU where there is one."""
        AttentionInterface.register(_NAME, _attend)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=_NAME)
        return cls(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def head(self) -> Tensor:
        """The last matrix, [V, H]."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    @torch.inference_mode()
    def calibrate(self, texts: Sequence[Sequence[int]]) -> None:
        """Find static scales as llm-compressor's ``static_minmax`` does: from the largest values in the texts."""
        reading = Reading(largest={})
        for text in texts:
            self._read(text, reading)
        assert reading.largest
        self.scales = tuple(
            # In BF16, as a checkpoint holds them.
            OperandScales(*(Scales(scales_of(each.bfloat16(), PER_TENSOR).scale.float(), None) for each in found))
            for _, found in sorted(reading.largest.items())
        )

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The likeliest tokens after a prompt, at most so many."""
        given = torch.tensor([list(prompt)], device=self.model.device)
        whole = self.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens
        )
        answer: list[int] = whole[0, len(prompt) :].tolist()
        return answer

    @torch.inference_mode()
    def final_states(self, answer: Answer, unit: Unit, phase: Phase) -> Tensor:
        """The final hidden states that predict an answer's tokens, [A, H].

        In prefill, prompt and answer are read as one prompt: attention takes keys and values as they were just
        computed, in FP8 operands if the unit says so. In decode the prompt is read like that, and then each token
        of the answer reads all keys and values, its own among them, from the cache. These tokens are read
        together: none sees anything of those after it, so each is computed as if it came alone.
        """
        prefill = Reading(self.scales, in_fp8=unit.attention)
        if phase == "prefill":
            states, _ = self._read([*answer.prompt, *answer.answer[:-1]], prefill)
            return states[len(answer.prompt) - 1 :]
        states, cache = self._read(answer.prompt, prefill)
        if not (rest := answer.answer[:-1]):
            return states[-1:]
        decoded, _ = self._read(rest, Reading(self.scales, from_cache=unit.kv_cache), cache)
        return torch.cat([states[-1:], decoded])

    def _read(self, tokens: Sequence[int], reading: Reading, cache: Any = None) -> tuple[Tensor, Any]:
        given = torch.tensor([list(tokens)], device=self.model.device)
        read = self.model.model(given, past_key_values=cache, use_cache=True, reading=reading)
        return read.last_hidden_state[0], read.past_key_values

    @contextmanager
    def quantized(self, unit: Unit, number: Format) -> Iterator[None]:
        """Have the unit's linear layers, but for the head, compute in that format within the block."""
        with ExitStack() as undo:
            for name in unit.linears:
                if name != HEAD_NAME:
                    undo.enter_context(_quantized(self.model.get_submodule(name), number))
            yield

    @torch.inference_mode()
    def scores(
        self,
        unit: Unit,
        number: Format,
        phase: Phase,
        answers: Sequence[Answer],
        references: Sequence[Tensor],
        on_answer: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """How far the model is from itself, token by token, when the unit is quantized.

        Args:
            unit: what is quantized.
            number: into what.
            phase: how answers are computed.
            answers: along which.
            references: the exact final hidden states of each, [A, H].
            on_answer: told how many are done.
        """
        head_quantized = HEAD_NAME in unit.linears
        head = _weight_in(self.head, number) if head_quantized else self.head
        parts = []
        with self.quantized(unit, number):
            for place, (answer, exact) in enumerate(zip(answers, references, strict=True)):
                states = self.final_states(answer, unit, phase)
                if head_quantized and number.activations:
                    states = fake_quantize(states, _scheme(number.activations))
                given = torch.tensor(answer.answer, device=states.device)
                found = compare(Projected(exact, self.head), fp32_logits(states, head), given)
                columns = {name: getattr(found, name).cpu().numpy() for name in _COLUMNS}
                position = np.arange(len(given))
                here = {"prompt": np.full(len(given), place), "position": position, "token": answer.answer}
                parts.append(Scores.of(columns | here))
                on_answer(place + 1)
        scores = Scores.joined(parts)
        # An answer's first token comes from the prompt's prefill, in both phases.
        return scores if phase == "prefill" else scores.where(scores.position > 0)


_COLUMNS = ("kl", "tv", "ln_p", "ln_q", "top_p", "top_q")


@contextmanager
def _quantized(linear: torch.nn.Linear, number: Format) -> Iterator[None]:
    weight = linear.weight.data
    linear.weight.data = _weight_in(weight, number)
    hook = None
    if number.activations is not None:
        scheme = _scheme(number.activations)
        hook = linear.register_forward_pre_hook(lambda _, given: (fake_quantize(given[0], scheme), *given[1:]))
    try:
        yield
    finally:
        linear.weight.data = weight
        if hook is not None:
            hook.remove()


def _weight_in(weight: Tensor, number: Format) -> Tensor:
    """What an engine multiplies by: quantized from BF16, as the checkpoint has it, FP32.

    Products whose activations are quantized too apply their scales in FP32; others make BF16 of the weights first.
    """
    dtype = torch.float32 if number.activations is not None else None
    return fake_quantize(weight.bfloat16(), _scheme(number.weights), dtype=dtype).float()


def _scheme(number: NumberFormat) -> Scheme:
    return Scheme(
        _NUMBERS[number.type],  # type: ignore[arg-type]
        number.scale,  # type: ignore[arg-type]  # of its words a scheme has all
        number.size or 0,
        number.symmetric,
    )
