"""From logits to tokens: vLLM's sampler, step by step, in FP32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import sampling
from kernels.rounding import Allowance, accumulated, nothing, rounded, stored, unit_roundoff
from tiers.operators.bench import Bench
from tiers.operators.bench import says as told
from tiers.operators.judgement import Absent, Case, compared, decided

FP32 = torch.float32
ROWS = 16
_FEW = 4.0


class Sampler:
    """The parts of vLLM's sampler that are held to definitions, as its first model runner puts them together."""

    def __init__(self, config: Any, device: torch.device) -> None:
        from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinPLogitsProcessor
        from vllm.v1.sample.ops.penalties import apply_all_penalties
        from vllm.v1.sample.sampler import Sampler as Theirs

        self.device = device
        self.whole = Theirs()
        # Only so does it give back what it draws from; FlashInfer's, which vLLM may take on GPUs, never does.
        self.nucleus: Any = Theirs(logprobs_mode="processed_logits").topk_topp_sampler
        self.penalties: Callable[..., Tensor] = apply_all_penalties
        self.min_p: Any = MinPLogitsProcessor(config, device, is_pin_memory=False)
        self.bias: Any = LogitBiasLogitsProcessor(config, device, is_pin_memory=False)
        self.log_softmax: Callable[[Tensor], Tensor] = self.whole.compute_logprobs
        self.greedy: Callable[[Tensor], Tensor] = self.whole.greedy_sample
        self.temperature: Callable[..., Tensor] = self.whole.apply_temperature


def _prepared(bench: Bench) -> tuple[Sampler, Tensor] | Absent:
    """The sampler of this machine and the logits it is given, [16, V] in BF16."""
    one = bench.layer("bf16")
    if getattr(one.vllm_config, "use_v2_model_runner", False):
        return Absent("vLLM's second model runner samples here, whose kernels are not held to definitions yet")
    logits = bench.inputs.activations["logits"]
    rows = torch.linspace(0, len(logits) - 1, ROWS).round().long()
    return bench.broken(Sampler(one.vllm_config, one.device)), logits[rows]


def _each(
    bench: Bench, run: Callable[[Sampler, Tensor, Callable[[str], str]], Iterator[Case]]
) -> Iterator[Case | Absent]:
    prepared = _prepared(bench)
    if isinstance(prepared, Absent):
        yield prepared
        return
    sampler, logits = prepared
    with torch.inference_mode():
        yield from run(sampler, logits, lambda what: told(f"{logits.shape[-1]} logits, {what}", len(logits)))


def log_softmax(bench: Bench) -> Iterator[Case | Absent]:
    """The log-probabilities that callers see: a sum of exponentials in FP32, whose logarithm is taken off."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        ran = sampler.log_softmax(logits.to(sampler.device)).cpu()
        exact = sampling.log_softmax(logits)
        x = logits.double()
        probabilities = exact.exp()
        distance = (x - x.amax(-1, keepdim=True)).abs()
        # Of the sum: the order of it, and each exponential by the error of its argument and its own.
        of_sum = accumulated(x.shape[-1], torch.ones_like(x[:, :1]), FP32) + rounded(
            (probabilities * (distance + _FEW)).sum(-1, keepdim=True), FP32
        )
        whole = Allowance(of_sum.most.expand_as(exact), of_sum.most.expand_as(exact))
        most = x.amax(-1, keepdim=True).abs() + (exact - x).abs()
        allowed = whole + rounded(distance + most, FP32, 2.0)
        yield compared("Sampler.compute_logprobs", says("ln p"), ran, exact, stored(exact, allowed, FP32))

    return _each(bench, run)


def temperature(bench: Bench) -> Iterator[Case | Absent]:
    """One division."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        degrees = torch.linspace(0.1, 2.0, len(logits))
        x = logits.float()
        ran = sampler.temperature(x.clone().to(sampler.device), degrees.to(sampler.device), all_random=True).cpu()
        exact = sampling.temperature(x, degrees)
        yield compared(
            "Sampler.apply_temperature", says("τ 0.1 to 2"), ran, exact, stored(exact, nothing(exact), FP32)
        )

    return _each(bench, run)


def logit_bias(bench: Bench) -> Iterator[Case | Absent]:
    """One sum."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        from vllm import SamplingParams

        biases = _biases(logits)
        _update(sampler.bias, [SamplingParams(logit_bias=bias or None) for bias in biases])
        x = logits.float()
        ran = sampler.bias.apply(x.clone().to(sampler.device)).cpu()
        exact = sampling.logit_bias(x, biases)
        yield compared(
            type(sampler.bias).__name__, says("up to ±100"), ran, exact, stored(exact, nothing(exact), FP32)
        )

    return _each(bench, run)


def _biases(logits: Tensor) -> list[dict[int, float]]:
    """Of each row but every third: of its likeliest tokens, and of the vocabulary's ends."""
    last = logits.shape[-1] - 1
    return [
        {} if row % 3 == 2 else {int(top): 0.7 * row - 5.3, 0: -100.0, last: 12.5}
        for row, top in enumerate(logits.argmax(-1))
    ]


def _update(processor: Any, params: list[Any]) -> None:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    added: list[Any] = [(row, each, [], []) for row, each in enumerate(params)]
    processor.update_state(BatchUpdate(batch_size=len(params), removed=[], added=added, moved=[]))


def penalties(bench: Bench) -> Iterator[Case | Absent]:
    """A quotient or product, and two differences."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        vocabulary = logits.shape[-1]
        likely = logits.topk(24).indices
        unlikely = (-logits.float()).topk(8).indices
        prompts = torch.cat([likely[:, :12], unlikely[:, :4]], 1)
        answers = [
            [*high[6:18].tolist(), *high[6:9].tolist(), *low[2:6].tolist()]
            for high, low in zip(likely, unlikely, strict=True)
        ]
        answers[0] = []
        size = len(logits)
        repetition, frequency, presence = (
            torch.linspace(*bounds, size) for bounds in ((0.7, 1.9), (-1.9, 1.7), (1.3, -1.6))
        )
        x = logits.float()
        there = [each.to(sampler.device) for each in (x.clone(), prompts, presence, frequency, repetition)]
        ran = sampler.penalties(*there, answers).cpu()
        asked, told = sampling.counts(prompts.tolist(), vocabulary), sampling.counts(answers, vocabulary)
        repeated = sampling.repetition_penalty(x, asked, told, repetition)
        less = sampling.frequency_penalty(repeated, told, frequency)
        exact = sampling.presence_penalty(less, told, presence)
        each = (repeated, frequency.double()[:, None] * told, less)
        allowed = nothing(exact)
        for step in each:
            allowed = allowed + rounded(step, FP32)
        # Of tokens that no penalty reaches nothing is rounded.
        reached = (asked > 0) | (told > 0)
        allowed = Allowance(allowed.most * reached, allowed.spread * reached)
        yield compared("apply_all_penalties", says("all three"), ran, exact, stored(exact, allowed, FP32))

    return _each(bench, run)


def greedy(bench: Bench) -> Iterator[Case | Absent]:
    """Of tokens that tie any will do."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        x = logits.float()
        chosen = sampler.greedy(x.clone().to(sampler.device)).cpu().view(-1, 1).long()
        misses = x.double().amax(-1) - x.double().gather(-1, chosen).squeeze(-1)
        yield decided("Sampler.greedy_sample", says("arg max"), misses, FP32)

    return _each(bench, run)


def min_p(bench: Bench) -> Iterator[Case | Absent]:
    """Two exponentials that are compared: a token may be on the wrong side by what these are wrong."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        from vllm import SamplingParams

        bounds = torch.logspace(-4, -0.05, len(logits))
        _update(sampler.min_p, [SamplingParams(min_p=float(each)) for each in bounds])
        x = logits.float()
        ran = sampler.min_p.apply(x.clone().to(sampler.device)).cpu()
        misses = sampling.min_p_misses(x, _kept(ran), bounds)
        distance = (x - x.amax(-1, keepdim=True)).double().abs()
        within = (distance + 2 * _FEW) * unit_roundoff(FP32)
        says_ = says("0.0001 to 0.9")
        yield decided(type(sampler.min_p).__name__, says_, _spoiled(misses, x, ran), FP32, within)

    return _each(bench, run)


def top_k(bench: Bench) -> Iterator[Case | Absent]:
    """Nothing is computed, so nothing is rounded; told in tokens, not ulps."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        k = torch.tensor([1, 2, 5, 10, 20, 50, 100, 1000] * (len(logits) // 8), dtype=torch.int32)
        x = logits.float()
        ran = _masked(sampler, x, k, None)
        misses = sampling.top_k_misses(x, _kept(ran), k)
        yield decided(_nucleus(sampler), says("1 to 1,000"), _spoiled(misses, x, ran), FP32)

    return _each(bench, run)


def top_p(bench: Bench) -> Iterator[Case | Absent]:
    """A sum over the vocabulary in FP32, whose rounding moves the bound."""

    def run(sampler: Sampler, logits: Tensor, says: Callable[[str], str]) -> Iterator[Case]:
        p = torch.linspace(0.05, 0.99, len(logits))
        x = logits.float()
        ran = _masked(sampler, x, None, p)
        misses = sampling.top_p_misses(x, _kept(ran), p)
        one = torch.ones_like(misses)
        # Of the softmax's sum and of the running sum after it.
        within = 2 * accumulated(x.shape[-1], one, FP32).most + rounded(one, FP32, 2 * _FEW).most
        yield decided(_nucleus(sampler), says("0.05 to 0.99"), _spoiled(misses, x, ran), FP32, within)

    return _each(bench, run)


def _nucleus(sampler: Sampler) -> str:
    return f"{type(sampler.nucleus).__name__}.{sampler.nucleus.forward.__name__}"


def _masked(sampler: Sampler, logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    there = [None if each is None else each.clone().to(sampler.device) for each in (k, p)]
    _, masked = sampler.nucleus(logits.clone().to(sampler.device), {}, *there)
    return torch.as_tensor(masked).cpu()


def _kept(ran: Tensor) -> Tensor:
    return ran > -torch.inf


def _spoiled(misses: Tensor, given: Tensor, ran: Tensor) -> Tensor:
    """With what no choice may do: change a logit that it keeps, or keep one that is less likely than another
    left.
    """
    kept = _kept(ran)
    fine = sampling.most_likely(given, kept) & ((ran == given) | ~kept).all(-1)
    return misses.masked_fill(~fine.view(-1, *[1] * (misses.dim() - 1)), torch.inf)
