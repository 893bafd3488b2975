"""The text a recipe is calibrated on: the reference's own answers, as an engine would have given them."""

from typing import Any

import pytest
import torch

from tests import tiny_llama
from tiers import calibration

PROMPTS = ("Hi", "Which of the two is the longer prompt?", "And?")


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(**small, vocab_size=128_256, initializer_range=0.5)).eval()
    made.generation_config.eos_token_id = tiny_llama.GENERATION_CONFIG["eos_token_id"]
    return made


def answered(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[list[int]]:
    """The conversations with few prompts and short answers."""
    for name, value in ({"BATCH": 2, "ANSWER_TOKENS": 8} | settings).items():
        monkeypatch.setattr(calibration, name, value)
    answered = calibration.answered_prompts(model, tokenizer, PROMPTS)
    assert all(0 < each.answer_start < len(each.tokens) for each in answered.conversations)
    return [each.tokens for each in answered.conversations]


def test_the_likeliest_answers_are_those_of_transformers(
    model: Any, llama_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different length in one batch: padding, positions and cache are right."""
    conversations = answered(model, llama_tokenizer, monkeypatch, TOP_K=1)
    for conversation, prompt in zip(conversations, PROMPTS, strict=True):
        ids = llama_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=128_004)
        assert conversation == expected[0].tolist()


def test_only_likely_tokens_are_drawn(model: Any, llama_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (conversation, *_) = answered(model, llama_tokenizer, monkeypatch, TOP_K=3, TOP_P=1.0)
    logits = model(torch.tensor([conversation])).logits[0]
    ranks = [(row > row[token]).sum().item() for row, token in zip(logits[:-1], conversation[1:], strict=True)][
        -8:
    ]
    assert max(ranks) < 3
    assert max(ranks) > 0, "they are drawn, not the first ones taken"


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
def test_an_answer_ends_with_whichever_token_ends_it(
    model: Any, llama_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    token = llama_tokenizer.convert_tokens_to_ids(end)

    def third_is_the_end(*args: Any) -> torch.Tensor:
        return torch.tensor([[11, 12, token, 13]] * len(args[1]))

    monkeypatch.setattr(calibration, "_sample", third_is_the_end)
    for conversation in answered(model, llama_tokenizer, monkeypatch):
        assert conversation[-3:] == [11, 12, token]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "base"])
def test_every_conversation_begins_with_one_bos(
    model: Any, llama_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setattr(llama_tokenizer, "chat_template", llama_tokenizer.chat_template if chat else None)
    for conversation in answered(model, llama_tokenizer, monkeypatch):
        assert conversation[0] == 128_000
        assert conversation.count(128_000) == 1
