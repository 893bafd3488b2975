"""The operators that are held to their definitions, and the errors that can be planted in them, as plain data.

Those that one model holds stand together, for a model takes seconds to build. A new operator is a line in
`OPERATORS` and a function of the module named there, which yields its cases. A new planted error is a line in
`PLANTS` and a function of its name in `tiers/operators/planting.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """One operator of the engine."""

    name: str
    what: str
    """It computes."""
    module: str
    """Of this package; its function has the operator's name, with underscores."""


@dataclass(frozen=True)
class Plant:
    """One error that holding to a definition must find."""

    name: str
    operator: str
    what: str
    """Is wrong."""


OPERATORS = (
    Operator("embedding", "each token's row of the table", "elementwise"),
    Operator("rms-norm", "w · x / √(mean x² + ε)", "elementwise"),
    Operator("add-rms-norm", "the residual's sum, and its norm", "elementwise"),
    Operator("linear-bf16", "x Wᵀ in BF16", "products"),
    Operator("rope", "queries and keys turned by their positions", "elementwise"),
    Operator("attention", "causal grouped-query attention over a paged cache", "attending"),
    Operator("swiglu", "silu(gate) · up", "elementwise"),
    Operator("head", "final hidden states into logits", "products"),
    Operator("log-softmax", "ln of the distribution", "drawing"),
    Operator("logit-bias", "l + b", "drawing"),
    Operator("penalties", "repetition, frequency and presence", "drawing"),
    Operator("greedy", "the likeliest token", "drawing"),
    Operator("temperature", "l / τ", "drawing"),
    Operator("min-p", "tokens at least min_p times as likely as the likeliest", "drawing"),
    Operator("top-k", "the k likeliest", "drawing"),
    Operator("top-p", "the fewest likeliest whose mass is p", "drawing"),
    Operator("linear-fp8", "x Wᵀ in FP8: a scale for each token and each output", "products"),
    Operator("linear-fp8-block", "x Wᵀ in FP8: a scale for each 128 × 128 of the weight", "products"),
    Operator("linear-int4", "x Wᵀ, W in symmetric INT4 groups", "products"),
    Operator("linear-int4-asymmetric", "x Wᵀ, W in INT4 groups with zero points", "products"),
    Operator("attention-fp8-kv", "the same over a cache in FP8", "attending"),
)

PLANTS = (
    Plant("embedding-next-row", "embedding", "each token has the next one's row"),
    Plant("epsilon-outside", "rms-norm", "ε is added to the root instead of under it"),
    Plant("epsilon-forgotten", "rms-norm", "there is no ε"),
    Plant("norm-of-the-addend", "add-rms-norm", "what is added is normalized, not the sum"),
    Plant("rope-interleaved", "rope", "neighbours are turned instead of halves"),
    Plant("rope-unscaled", "rope", "Llama 3.1's scaling is left out"),
    Plant("rope-next-position", "rope", "keys stand one position farther than queries"),
    Plant("sums-in-bf16", "linear-bf16", "sums are rounded to BF16 after every 64 products"),
    Plant("fp8-scales-transposed", "linear-fp8", "weight scales are those of inputs instead of outputs"),
    Plant("fp8-scale-of-all", "linear-fp8", "one scale for all tokens of a batch"),
    Plant("int4-scales-transposed", "linear-int4", "[N, groups] of scales is read as [groups, N]"),
    Plant("int4-order", "linear-int4", "numbers of a word are read in AWQ's order"),
    Plant("int8-activations", "linear-int4", "activations are rounded to INT8"),
    Plant("zero-points-off", "linear-int4-asymmetric", "zero points are one too large, as in GPTQ's first format"),
    Plant("scores-unscaled", "attention", "1/√D is left out"),
    Plant("heads-interleaved", "attention", "query head h reads KV head h mod their number"),
    Plant("mask-off", "attention", "each token sees the next one"),
    Plant("block-swapped", "attention", "the first two blocks of a sequence change places"),
    Plant("value-scale-forgotten", "attention-fp8-kv", "values are read without their scale"),
    Plant("gate-for-up", "swiglu", "gate and up change places"),
    Plant("head-shifted", "head", "logits stand one token farther"),
    Plant("log-softmax-in-bf16", "log-softmax", "the sum is rounded to BF16"),
    Plant("bias-of-the-next-row", "logit-bias", "each row has another one's biases"),
    Plant("prompt-counted", "penalties", "tokens of the prompt are counted too"),
    Plant("repetition-divides", "penalties", "negative logits are divided too"),
    Plant("second-best", "greedy", "the second likeliest"),
    Plant("temperature-multiplied", "temperature", "l · τ"),
    Plant("min-p-absolute", "min-p", "min_p itself is the bound"),
    Plant("top-k-one-more", "top-k", "one token more"),
    Plant("top-p-one-more", "top-p", "one token more"),
    Plant("top-p-one-fewer", "top-p", "one token fewer"),
)


def operator_names() -> list[str]:
    """For those who choose."""
    return [operator.name for operator in OPERATORS]
