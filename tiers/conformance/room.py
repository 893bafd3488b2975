"""How much memory a pack's answers take in FP32, and whether there is so much. Knows shapes; knows no tensors.

Weights and hidden states are counted; what passes while one sequence is in one layer is an **estimate**, by what
Transformers' `LlamaDecoderLayer` holds at once.
"""

from collections.abc import Sequence

from tiers.catalog import BF16_BYTES, ModelShape
from tiers.conformance.pack import Answer
from tiers.errors import PlacementError
from tiers.hardware import GIB

ALL_TOKENS = 311_000
"""Of all prompts, each answered twice, and of the corpus, in Llama 3.1's vocabulary and for its context."""
FEW_TOKENS = 36_000
"""Of the first 24 prompts and of as much of the corpus."""
LONGEST = 8_900
"""Of the longest of them with its answer."""
_FP32_BYTES = 4
_HEAD_ROWS = 1 << 14
"""Of the head, that `kernels.head` holds in FP32 at once."""
_MARGIN = GIB
"""PyTorch and Transformers themselves, and logits, which are there a run of rows at a time."""


def truth_bytes(shape: ModelShape, tokens: int = ALL_TOKENS, longest: int = LONGEST) -> int:
    """What `tiers.conformance.truth` takes, by default for all that can be asked of a Llama 3.1.

    The hidden states of all tokens, and the larger of two moments. In a layer: its weights in FP32 and as they are
    stored, and what passes of the longest sequence, four times its hidden states and three times as wide as the
    feed-forward layer is inside. At the head: what is stored of it, and a part of it in FP32.

    Args:
        shape: the model's; the number of its layers says nothing here.
        tokens: of all prompts, answers and passages.
        longest: of one prompt with its answer.
    """
    layer = shape.linear_weights // shape.num_hidden_layers + 2 * shape.hidden_size
    passing = longest * (4 * shape.hidden_size + 3 * shape.intermediate_size) * _FP32_BYTES
    head = (shape.vocab_size * BF16_BYTES + min(_HEAD_ROWS, shape.vocab_size) * _FP32_BYTES) * shape.hidden_size
    states = tokens * shape.hidden_size * _FP32_BYTES
    return max(layer * (_FP32_BYTES + BF16_BYTES) + passing, head) + states + _MARGIN


def tokens_of(answers: Sequence[Answer]) -> tuple[int, int]:
    """How many tokens are read, a prompt with several answers once, and the most of one prompt with its answer."""
    prompts = {tuple(answer.prompt) for answer in answers}
    given = sum(len(answer.answer) for answer in answers)
    longest = max((len(answer.prompt) + len(answer.answer) for answer in answers), default=0)
    return sum(map(len, prompts)) + given, longest


def check_room(model: str, shape: ModelShape, answers: Sequence[Answer], free: int) -> None:
    """Hold what these answers take against what is free.

    Args:
        model: its name.
        shape: its sizes.
        answers: that are to be computed.
        free: bytes of memory.

    Raises:
        PlacementError: there is less.
    """
    tokens, longest = tokens_of(answers)
    needed = truth_bytes(shape, tokens, longest)
    if needed > free:
        raise PlacementError(
            f"The reference of {model} is held against Transformers in FP32: {tokens:,} tokens, a layer at a "
            f"time, take about {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB are free: free memory, "
            "raise the container's limit, or ask fewer prompts (--quick). Other tiers take none of it: name them "
            "alone."
        )
