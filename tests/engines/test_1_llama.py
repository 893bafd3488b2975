"""What Llama 3.1 has and the embedded model lacks, computed right by the engines: the tiny model's three tiers.

Its reference is Hugging Face Transformers on the same weights in FP32, as the Reference tier promises.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kernels.divergence import kl_lower_bound
from tests.engines.conftest import CHECKPOINTS, LLAMA, LLAMA_CONTEXT, TIERS, Server

pytestmark = pytest.mark.timeout(1200)
TOP = 20
TRAINED_FIRST = 8192
"""The context that the RoPE scaling starts from."""
ENDS = {"<|end_of_text|>": 128_001, "<|eom_id|>": 128_008, "<|eot_id|>": 128_009}
HI: Any = [{"role": "user", "content": "Hi"}]

Top = dict[int, float]
"""The log-probabilities of the likeliest tokens at one position, by token id."""


class Scored(NamedTuple):
    """A tier's view of a text: its tokens, and what it held likely at some of the positions."""

    tokens: list[int]
    tops: dict[int, Top]
    """By the position whose next token it is about."""


def ask(assay: Server, tier: str, messages: Any, **options: Any) -> Any:
    """A chat completion with every token as its id."""
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, **options.pop("extra_body", {})}
    return assay.client().chat.completions.create(
        model=f"{LLAMA}-{tier}", messages=messages, temperature=0, extra_body=extra, **options
    )


def prefilled(assay: Server, tier: str, messages: Any) -> Scored:
    """What the tier holds likely after every token of a prompt."""
    answer = ask(assay, tier, messages, max_tokens=1, extra_body={"prompt_logprobs": TOP})
    rows = enumerate(answer.prompt_logprobs[1:])
    tops = {at: {int(token): entry["logprob"] for token, entry in row.items()} for at, row in rows}
    return Scored(answer.prompt_token_ids, tops)


def decoded(assay: Server, tier: str, messages: Any, tokens: int) -> Scored:
    """What the tier holds likely at each of the tokens that it answers."""
    answer = ask(assay, tier, messages, max_tokens=tokens, logprobs=True, top_logprobs=TOP)
    start = len(answer.prompt_token_ids) - 1
    tops = {
        start + step: {int(top.token.removeprefix("token_id:")): top.logprob for top in at.top_logprobs}
        for step, at in enumerate(answer.choices[0].logprobs.content)
    }
    return Scored(answer.prompt_token_ids + answer.choices[0].token_ids, tops)


def transformers_says(folder: Path, scored: Scored, *, scaling: bool = True) -> torch.Tensor:
    """Log-probabilities in FP32 at the scored positions, [P, V]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if not scaling:
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model.model(torch.tensor([scored.tokens])).last_hidden_state[0, list(scored.tops)]
        logprobs: torch.Tensor = model.lm_head(hidden).log_softmax(-1)
    return logprobs


class Distance(NamedTuple):
    """How far a tier is from Transformers over its likeliest tokens: nats."""

    rms: float
    """Root mean square difference of log-probabilities."""
    kl: float
    """A lower bound of KL(Transformers ‖ tier), mean over positions."""


def distance(scored: Scored, truth: torch.Tensor) -> Distance:
    differences, bounds = [], []
    for top, row in zip(scored.tops.values(), truth, strict=True):
        ours, theirs = torch.tensor(list(top.values())), row[list(top)]
        differences.append(ours - theirs)
        bounds.append(kl_lower_bound(theirs[None], ours[None]))
    return Distance(torch.cat(differences).square().mean().sqrt().item(), torch.cat(bounds).mean().item())


@pytest.fixture(scope="module")
def long_text(llama_tokenizer: Any) -> str:
    """More words than `TRAINED_FIRST`, each a token of its own."""
    words = sorted(token[1:] for token in llama_tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", token))
    return " ".join(random.Random(8).choices(words, k=8_900))


Decoded = Callable[[str], Scored]


@pytest.fixture(scope="module")
def long_decoded(assay: Server, long_text: str) -> Decoded:
    """Each tier's answer to the long text, asked for once."""
    answers: dict[str, Scored] = {}

    def of(tier: str) -> Scored:
        if tier not in answers:
            answers[tier] = decoded(assay, tier, [{"role": "user", "content": long_text}], 24)
        return answers[tier]

    return of


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_answers(assay: Server, tier: str) -> None:
    answer = ask(assay, tier, HI, max_tokens=8, logprobs=True, top_logprobs=2)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == len(answer.choices[0].logprobs.content) == 8
    assert assay.get(f"/v1/tiers/{LLAMA}-{tier}")["context_length"] == LLAMA_CONTEXT


def test_a_prompt_scores_as_in_transformers(assay: Server, llama_folder: Path) -> None:
    scored = prefilled(assay, "Reference", [{"role": "user", "content": "Wie spät ist es? 12:30, 昨日 👋"}])
    away = distance(scored, transformers_says(llama_folder, scored))
    print(f"prefill, {len(scored.tops)} positions: {away}")
    assert away.rms < 0.12
    assert away.kl < 0.004


def test_so_does_an_answer_beyond_the_first_8192_tokens(llama_folder: Path, long_decoded: Decoded) -> None:
    scored = long_decoded("Reference")
    assert min(scored.tops) > TRAINED_FIRST
    away = distance(scored, transformers_says(llama_folder, scored))
    unscaled = distance(scored, transformers_says(llama_folder, scored, scaling=False))
    print(f"decode, {len(scored.tops)} positions from {min(scored.tops)} on: {away}; without scaling: {unscaled}")
    assert away.rms < 0.12
    assert away.kl < 0.004
    assert unscaled.rms > 1, "without the scaling of RoPE this test fails"
    assert unscaled.kl > 0.1


@pytest.mark.parametrize(("tier", "nearest", "farthest"), [("Turbo", 0.005, 0.3), ("Lite", 0.02, 1.0)])
def test_the_quantized_tiers_scale_their_positions_too(
    llama_folder: Path, long_decoded: Decoded, tier: str, nearest: float, farthest: float
) -> None:
    """They are farther from Transformers than BF16 is, and nearer than they would be to a wrong RoPE."""
    scored = long_decoded(tier)
    away = distance(scored, transformers_says(llama_folder, scored))
    unscaled = distance(scored, transformers_says(llama_folder, scored, scaling=False))
    print(f"{tier}: {away}; without scaling: {unscaled}")
    assert nearest < away.kl < farthest
    assert unscaled.kl > 1.3 * away.kl


@pytest.mark.parametrize("tier", TIERS)
def test_a_dialogue_reaches_the_engine_as_llama_encodes_it(assay: Server, tier: str) -> None:
    """Meta's own encoding, with the date that the template adds; one BOS, not two."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    date = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    messages = [
        ("system", "Be brief."),
        ("user", "¿Qué hora es? 👋 1234567"),
        ("assistant", "12:30."),
        ("user", "Ok"),
    ]
    raw = [RawMessage(role=r, content=date + text if r == "system" else text) for r, text in messages]
    expected = ChatFormat(Tokenizer.get_instance()).encode_dialog_prompt(raw).tokens
    answer = ask(assay, tier, [{"role": role, "content": text} for role, text in messages], max_tokens=1)
    assert answer.prompt_token_ids == expected
    assert answer.usage.prompt_tokens == len(expected)


def test_a_tool_call_and_its_result_reach_the_engine(assay: Server, llama_tokenizer: Any) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tool: Any = {"type": "function", "function": function}
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}
    messages: Any = [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "yes"},
    ]
    answer = ask(assay, "Reference", messages, tools=[tool], tool_choice="none", max_tokens=1)
    prompt = llama_tokenizer.decode(answer.prompt_token_ids)
    assert '"name": "weather",\n' in prompt
    assert "Will it rain?<|eot_id|>" in prompt
    assert '\n\n{"name": "weather", "parameters": {"city": "Łódź"}}<|eot_id|>' in prompt
    assert prompt.endswith(
        '<|start_header_id|>ipython<|end_header_id|>\n\n"yes"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("tier", TIERS)
def test_an_answer_stops_at_each_token_that_ends_one(assay: Server, tier: str) -> None:
    for name, token in ENDS.items():
        choice = ask(assay, tier, HI, max_tokens=4, logit_bias={token: 100}).choices[0]
        assert (choice.finish_reason, choice.token_ids, choice.message.content) == ("stop", [token], ""), name


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("token", [127_999, 128_010, 128_255])
def test_every_other_token_can_be_said(assay: Server, tier: str, token: int) -> None:
    """To the last row of a head of 128,256."""
    choice = ask(assay, tier, HI, max_tokens=2, logit_bias={token: 100}, logprobs=True).choices[0]
    assert (choice.finish_reason, choice.token_ids) == ("length", [token, token])
    assert all(-60 < at.logprob < 0 for at in choice.logprobs.content)


def test_a_folder_of_weights_is_served_from_where_it_lies(assay: Server, llama_folder: Path) -> None:
    """What a person with Llama weights on disk does: the reference links to them instead of copying."""
    reference, turbo = (CHECKPOINTS / LLAMA / recipe / "model.safetensors" for recipe in ("bf16", "fp8-dynamic"))
    assert reference.is_symlink()
    assert reference.samefile(llama_folder / "model.safetensors")
    assert not turbo.is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_every_tier_reads_text_with_the_same_files(assay: Server, llama_folder: Path, name: str) -> None:
    for tier in TIERS:
        recipe = assay.get(f"/v1/tiers/{LLAMA}-{tier}")["recipe"]["name"]
        assert (CHECKPOINTS / LLAMA / recipe / name).read_bytes() == (llama_folder / name).read_bytes()


def test_a_text_longer_than_the_context_is_refused(assay: Server, long_text: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=str(LLAMA_CONTEXT)):
        ask(assay, "Reference", [{"role": "user", "content": long_text + " and more" * 200}], max_tokens=1)
