"""The text a recipe is calibrated on: chats whose answers the reference model itself wrote.

Rounding weights so that a layer's output error is least on some text presumes that the text is like what the
model will see. Nothing is more like it than its own answers, in its own chat template.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiers.manifest import Calibration

SEED = 20311
ANSWER_TOKENS = 160
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
BATCH = 32

PROMPTS = (
    "Explain photosynthesis to a ten-year-old.",
    "What is the difference between weather and climate?",
    "Write a short poem about a lighthouse in winter.",
    "List five things to check before a long drive.",
    "How does a refrigerator keep food cold?",
    "Write a Python function that counts the vowels in a string.",
    "What is 17 times 24? Show how you get there.",
    "Summarize the story of Romeo and Juliet in three sentences.",
    "Give me a recipe for a simple vegetable soup.",
    "Why is the sky blue?",
    "Write a polite email asking to move a meeting to Thursday.",
    "What are the main causes of inflation?",
    "Translate into French: The train leaves at eight in the morning.",
    "Explain what a hash table is and when to use one.",
    "A shop sells pens at three for two dollars. What do twelve pens cost?",
    "Describe the water cycle.",
    "What should I see in Rome in two days?",
    "Write a dialogue between a cat and a dog who share a sofa.",
    "How do vaccines work?",
    "What is the capital of Australia, and what is it known for?",
    "Write an SQL query that finds the ten most recent orders of a customer.",
    "Give me three arguments for and three against working from home.",
    "Who was Marie Curie?",
    "Explain supply and demand with an example.",
    "How do I politely decline an invitation?",
    "Tell me a story about a robot that learns to paint.",
    "What happens when ice melts, at the level of molecules?",
    "Write a JSON object that describes a book with title, author and year.",
    "If all cats are animals and some animals are black, are some cats black?",
    "What is the Pythagorean theorem used for?",
    "How can I sleep better?",
    "Explain the difference between a list and a tuple in Python.",
    "Describe a sunset over the sea without using the word red.",
    "What does a central bank do?",
    "Write a haiku about the first snow.",
    "How are mountains formed?",
    "What are the rules of chess in short?",
    "Write a bash command that finds all files larger than 100 MB.",
    "How do bees make honey?",
    "Name the planets of the solar system and one fact about each.",
    "Rewrite this more formally: hey, can you send me that thing asap?",
    "What is machine learning?",
    "How long does light take from the sun to the earth, and why?",
    "Plan a week of dinners for two people who eat no meat.",
    "What was the Industrial Revolution?",
    "Explain recursion with an everyday example.",
    "Write a product description for a wooden toy train.",
    "What is the difference between a virus and a bacterium?",
    "A train goes 60 miles per hour for two and a half hours. How far does it go?",
    "How do I start to learn the guitar?",
    "Write a regular expression that matches an email address.",
    "What is democracy?",
    "Give me a motivational quote and explain it.",
    "How does the internet deliver a web page?",
    "Write the opening paragraph of a detective story set in Lisbon.",
    "What are the benefits of reading every day?",
    "Convert 100 degrees Fahrenheit to Celsius.",
    "What is an algorithm?",
    "Explain how a bill becomes a law.",
    "What is the meaning of the proverb: a stitch in time saves nine?",
    "Write a class in Python for a bank account with deposit and withdraw.",
    "How do airplanes fly?",
    "What is the longest river in the world?",
    "Give feedback on this sentence: Their going to the park tommorow.",
)


@dataclass(frozen=True)
class Conversation:
    """Token ids of a question in the chat template with its answer, which starts at ``answer_start``."""

    tokens: list[int]
    answer_start: int


@dataclass(frozen=True)
class CalibrationText:
    """Every conversation, and the entry that a manifest keeps of them."""

    conversations: list[Conversation]
    entry: Calibration


def answered_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, seed: int = SEED
) -> CalibrationText:
    """Let the reference answer the prompts, sampled with a fixed seed.

    Args:
        model: a Transformers causal language model, the reference.
        tokenizer: its tokenizer; a model without a chat template continues the bare prompts.
        prompts: what it is asked.
        seed: of the sampling.
    """
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    ends = _end_tokens(model, tokenizer)
    conversations: list[Conversation] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not tokenizer.chat_template,  # a rendered chat has its own
        ).to(model.device)
        asked, mask = batch["input_ids"], batch["attention_mask"]
        answers = _sample(model, asked, mask, ends)
        for prompt, present, answer in zip(asked, mask.bool(), answers, strict=True):
            question = prompt[present].tolist()
            conversations.append(Conversation(question + _until_end(answer.tolist(), ends), len(question)))
    digest = hashlib.sha256(repr([each.tokens for each in conversations]).encode()).hexdigest()
    tokens = sum(len(each.tokens) for each in conversations)
    entry = Calibration(sha256=digest, conversations=len(conversations), tokens=tokens, seed=seed)
    return CalibrationText(conversations, entry)


def _render(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return rendered


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Whatever ends an answer: an engine stops at each of them, and Llama 3.1 has three."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


@torch.inference_mode()
def _sample(model: Any, ids: torch.Tensor, mask: torch.Tensor, ends: frozenset[int]) -> torch.Tensor:
    """Answers to a left-padded batch of prompts [B, T], drawn from the likeliest tokens: [B, ≤ `ANSWER_TOKENS`].

    ``generate`` would draw from the same distribution and sort the whole vocabulary for every token, which for
    Llama 3's 128,256 takes longer on a CPU than a small model does.
    """
    cache, answers = None, []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    last = torch.tensor(sorted(ends), device=ids.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(ANSWER_TOKENS):
        step = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        logits, candidates = step.logits[:, -1].float().topk(TOP_K)
        probabilities = (logits / TEMPERATURE).softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities > TOP_P] = 0
        ids = candidates.gather(1, torch.multinomial(probabilities, 1))
        answers.append(ids)
        ended |= torch.isin(ids[:, 0], last)
        if ended.all():
            break
        cache, positions = step.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(answers, 1)


def _until_end(answer: list[int], ends: frozenset[int]) -> list[int]:
    """The answer up to the token that ends it, which belongs to it; what follows is the batch's."""
    for length, token in enumerate(answer, start=1):
        if token in ends:
            return answer[:length]
    return answer
