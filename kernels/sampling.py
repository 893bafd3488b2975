"""From logits to the distribution that tokens are drawn from: what each step means, in float64.

Steps that leave tokens out are given as questions, for there is more than one right answer where tokens tie. T is
positions, V vocabulary; parameters have one value for each position, [T].
"""

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """pᵢ = e^lᵢ / Σ e^lⱼ: [T, V] → [T, V]."""
    return logits.double().softmax(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """ln pᵢ = lᵢ − ln Σ e^lⱼ, in nats: [T, V] → [T, V]."""
    return logits.double().log_softmax(-1)


def temperature(logits: Tensor, degrees: Tensor) -> Tensor:
    """l / τ (Ackley, Hinton & Sejnowski, A Learning Algorithm for Boltzmann Machines, 1985, eq. 5)."""
    return logits.double() / degrees.double()[:, None]


def counts(tokens: list[list[int]], vocabulary: int) -> Tensor:
    """How often each token occurs at each position's: [T, V], int64."""
    return torch.stack([torch.tensor(row, dtype=torch.long).bincount(minlength=vocabulary) for row in tokens])


def repetition_penalty(logits: Tensor, prompt: Tensor, answer: Tensor, penalty: Tensor) -> Tensor:
    """Of tokens that prompt or answer have, l / r where l is positive and l · r where not.

    Keskar et al., CTRL, 2019, section 4.1, whose l / r raises negative logits; with the sign as in Transformers'
    ``RepetitionPenaltyLogitsProcessor``.

    Args:
        logits: [T, V].
        prompt: how often the prompt has each token, [T, V].
        answer: how often the answer has, so far.
        penalty: r.
    """
    x, r = logits.double(), penalty.double()[:, None]
    return torch.where((prompt > 0) | (answer > 0), torch.where(x > 0, x / r, x * r), x)


def frequency_penalty(logits: Tensor, answer: Tensor, penalty: Tensor) -> Tensor:
    """l − f · (how often the answer has the token so far): OpenAI's API reference, ``frequency_penalty``."""
    return logits.double() - penalty.double()[:, None] * answer


def presence_penalty(logits: Tensor, answer: Tensor, penalty: Tensor) -> Tensor:
    """l − f for each token that the answer has: OpenAI's API reference, ``presence_penalty``."""
    return logits.double() - penalty.double()[:, None] * (answer > 0)


def logit_bias(logits: Tensor, biases: list[dict[int, float]]) -> Tensor:
    """l + b for the tokens named: OpenAI's API reference, ``logit_bias``."""
    biased = logits.double().clone()
    for row, bias in enumerate(biases):
        for token, value in bias.items():
            biased[row, token] += value
    return biased


def most_likely(logits: Tensor, kept: Tensor) -> Tensor:
    """Whether no token left out is likelier than one that is kept, and one is kept: [T, V] and [T, V] → [T],
    bool.
    """
    least = logits.double().masked_fill(~kept, torch.inf).amin(-1)
    best_left = logits.double().masked_fill(kept, -torch.inf).amax(-1)
    return (least >= best_left) & kept.any(-1)


def top_k_misses(logits: Tensor, kept: Tensor, k: Tensor) -> Tensor:
    """By how many tokens the kept ones are too many or too few to be the k likeliest: [T], 0 where they are.

    Fan, Lewis & Dauphin, Hierarchical Neural Story Generation, 2018, section 5.4. Of tokens that tie for the k-th
    place any may stay, or all.
    """
    at_least = k.long().clamp_max(logits.shape[-1])
    kth = logits.double().topk(int(at_least.max())).values.gather(-1, at_least[:, None] - 1)
    at_most = (logits.double() >= kth).sum(-1)
    count = kept.sum(-1)
    return ((at_least - count).clamp_min(0) + (count - at_most).clamp_min(0)).double()


def top_p_misses(logits: Tensor, kept: Tensor, p: Tensor) -> Tensor:
    """By how much p would have to be another for the kept tokens to be its nucleus: [T], 0 where they are.

    The nucleus is the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al., The Curious
    Case of Neural Text Degeneration, 2020, eq. 2): the kept ones do, and no more without the least likely of them.
    """
    probabilities = softmax(logits)
    mass = (probabilities * kept).sum(-1)
    least = probabilities.masked_fill(~kept, torch.inf).amin(-1)
    least = torch.where(kept.sum(-1) > 1, least, mass)  # one token stays whatever p is
    return ((p.double() - mass).clamp_min(0) + (mass - least - p.double()).clamp_min(0)).double()


def min_p_misses(logits: Tensor, kept: Tensor, min_p: Tensor) -> Tensor:
    """By which part of the bound each token is on its wrong side: [T, V], 0 where it is on the right one.

    Tokens with at least ``min_p`` times the probability of the likeliest stay (Nguyen et al., Turning Up the Heat:
    Min-p Sampling, 2024, section 3.1).
    """
    x = logits.double()
    ratio = (x - x.amax(-1, keepdim=True)).exp() / min_p.double()[:, None]
    return torch.where(kept == (ratio >= 1), 0.0, (ratio - 1).abs())
