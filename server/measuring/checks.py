"""What of an engine no walk along given tokens sees: how it writes chats down, draws tokens, and ends answers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.engines.engine import Engine
from server.measuring.measure import SEED
from tiers.conformance.pack import Pack
from tiers.conformance.prompts import Prompt

TOP_P = 0.5
DRAWN = 16
"""Tokens after each prompt."""
_ANSWERS = 12
"""After so many prompts: with `top_p` ignored, tokens outside come every few."""
_SLACK = 0.01
"""Of a nucleus' probability: a sampler adds it up in another order."""
_SHOWN = 20
"""Tokens of which vLLM tells the probability."""
_FORCED = 100.0
"""The greatest bias that a request may give a token: nothing else is likely then."""


@dataclass(frozen=True)
class Found:
    """What is not as it should be."""

    metric: str
    tokens: int
    """Looked at until it was found."""


async def rendering(engine: Engine, model: str, pack: Pack, prompts: Mapping[str, Prompt]) -> Found | None:
    """Whether a chat becomes other tokens than the reference was given.

    Raises:
        EngineNotStarted: the engine does not answer.
    """
    compared = 0
    for answer in pack.answers:
        if answer.source != "greedy":
            continue  # of the same prompt, or of none
        ours = await engine.answer(model, prompts[answer.prompt_id], tokens=1, greedy=True, seed=SEED)
        for one, other in zip(ours.prompt, answer.prompt, strict=False):
            compared += 1
            if one != other:
                return Found("prompt token", compared)
        if len(ours.prompt) != len(answer.prompt):
            return Found("prompt length", compared)
    return None


async def nucleus(engine: Engine, model: str, pack: Pack) -> Found | None:
    """Whether a token is drawn before which `TOP_P` of the engine's own probability lies.

    Raises:
        EngineNotStarted: the engine does not answer.
    """
    drawn = 0
    for number, answer in enumerate(pack.answers[:_ANSWERS]):
        choice = await engine.completion(
            model,
            answer.prompt,
            max_tokens=DRAWN,
            temperature=1,
            top_p=TOP_P,
            seed=SEED + number,
            logprobs=_SHOWN,
        )
        said = choice["logprobs"]
        for own, likeliest in zip(said["token_logprobs"], said["top_logprobs"], strict=True):
            drawn += 1
            before = math.fsum(math.exp(ln) for ln in likeliest.values() if ln > own)
            if before > TOP_P + _SLACK:
                return Found("token outside the nucleus", drawn)
    return None


async def end(engine: Engine, model: str, pack: Pack, reference: Path) -> Found | None:
    """Whether an answer goes on after a token that ends it, or ends at the one beside.

    Args:
        engine: to ask.
        model: its name for the tier.
        pack: whose first prompt is asked.
        reference: the reference checkpoint's folder, which says what the tokens are.

    Raises:
        EngineNotStarted: the engine does not answer.
    """
    ends = _ends(reference)
    for looked_at, token in enumerate(sorted(ends | {each + 1 for each in ends}), 1):
        choice = await engine.completion(
            model,
            pack.answers[0].prompt,
            max_tokens=4,
            temperature=0,
            logit_bias={str(token): _FORCED},
        )
        if (choice["finish_reason"] == "stop") != (token in ends):
            return Found("finish reason", looked_at)
    return None


def _ends(checkpoint: Path) -> set[int]:
    """The tokens that end an answer, from the checkpoint itself and not from an engine."""
    for name in ("generation_config.json", "config.json"):
        file = checkpoint / name
        told = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if told is not None:
            return {told} if isinstance(told, int) else set(told)
    return set()
