"""How much memory the reference's answers take in FP32, by shape."""

from pathlib import Path

import pytest

from tests.tiers.test_recipe import SMOL
from tiers.catalog import find_member
from tiers.conformance.pack import Answer
from tiers.conformance.room import ALL_TOKENS, FEW_TOKENS, check_room, tokens_of, truth_bytes
from tiers.errors import PlacementError
from tiers.hardware import GIB

LLAMA = find_member("Llama-3.1-8B-Instruct").shape


def answer(prompt: list[int], count: int) -> Answer:
    return Answer(prompt_id="p", kind="chat", language="en", source="greedy", prompt=prompt, answer=[1] * count)


def test_a_prompt_with_several_answers_is_read_once() -> None:
    assert tokens_of([answer([1, 2, 3], 5), answer([1, 2, 3], 7), answer([4], 2)]) == (3 + 5 + 7 + 1 + 2, 10)


def test_it_does_not_grow_with_the_number_of_layers_and_grows_with_tokens() -> None:
    deep = LLAMA.model_copy(update={"num_hidden_layers": 320})
    assert truth_bytes(deep) == truth_bytes(LLAMA)
    assert truth_bytes(LLAMA, 2_000, 500) - truth_bytes(LLAMA, 1_000, 500) == 1_000 * LLAMA.hidden_size * 4


def test_a_layer_or_the_head_counts_whichever_is_larger() -> None:
    layer = LLAMA.linear_weights // 32 + 2 * LLAMA.hidden_size
    assert truth_bytes(LLAMA, 0, 0) == max(layer * 6, 128_256 * 4096 * 2 + 16_384 * 4096 * 4) + GIB
    flat = LLAMA.model_copy(update={"vocab_size": 1000})
    assert truth_bytes(flat, 0, 0) == layer * 6 + GIB


def test_the_readme_has_what_llamas_take() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for size in ("8B", "70B", "405B"):
        shape = find_member(f"Llama-3.1-{size}-Instruct").shape
        few, every = (truth_bytes(shape, tokens) / GIB for tokens in (FEW_TOKENS, ALL_TOKENS))
        assert f"| {size} | {few:.1f} GiB | {every:.1f} GiB |" in readme


def test_what_does_not_fit_is_a_sentence() -> None:
    given = [answer([1] * 1000, 20)]
    needed = truth_bytes(SMOL, 1020, 1020)
    check_room("Mine", SMOL, given, needed)
    with pytest.raises(PlacementError, match=r"of Mine is held .* 1,020 tokens.* 1\.1 GiB are free: .*--quick"):
        check_room("Mine", SMOL, given, needed - 1)
