"""Walks this engine along one sequence and collects its scores; loaded inside the API server.

Knows how a request is put to vLLM and how its workers are asked; what they do is `tiers.probe.scoring`.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tiers.conformance.sequence import Scored, Sequence
from tiers.probe.reading import OWN
from tiers.probe.scoring import MARK

AT_ONCE = 32
"""Tokens reduced in one call, during which no step of the engine runs; for fewer the head is read in vain."""
TRIES = 5
"""Of a sequence for which the engine has no room while others run."""


class WalkFailed(Exception):
    """The engine could not be walked along this sequence; one sentence of why."""


class WalkInterrupted(WalkFailed):
    """The engine began the sequence anew, for want of memory: another try may do better."""


async def walk(engine: Any, sequence: Sequence) -> Scored:
    """Have ``engine``, vLLM's client of its core, compute the sequence; its numbers.

    Raises:
        WalkFailed: they could not be had.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(WalkInterrupted):
            return await _walk(engine, sequence)
    return await _walk(engine, sequence)


async def _walk(engine: Any, sequence: Sequence) -> Scored:
    token = secrets.token_hex(16)
    job = {
        "prompt": len(sequence.prompt),
        "answer": sequence.answer,
        "decodes": sequence.phase == "decode",
        "saves_logits": sequence.keep is not None and sequence.keep.logits,
        "reference": sequence.reference.model_dump() if sequence.reference else None,
    }
    try:
        if sequence.cached:
            await _fill_cache(engine, sequence, token)
        await _ask(engine, "assay_score_begin", token, job)
        columns = await _scored(engine, sequence, token)
        if (keep := sequence.keep) is not None:
            await _ask(engine, "assay_score_keep", token, keep.file, keep.head.model_dump() if keep.head else None)
        return Scored(columns=columns)
    finally:
        await asyncio.shield(_ask(engine, "assay_score_end", token))


async def _fill_cache(engine: Any, sequence: Sequence, token: str) -> None:
    """Have the prompt computed as a request of its own, of which nothing is kept but the cache."""
    params = _params(max_tokens=1)
    # Without its last token: what an answer begins from is computed anew even where all else is found.
    prompt = tokens_input(prompt_token_ids=sequence.prompt[:-1] or sequence.prompt, cache_salt=token)
    async for _ in engine.generate(prompt, params, f"{OWN}cache-{token}"):
        pass


async def _scored(engine: Any, sequence: Sequence, token: str) -> dict[str, list[Any]]:
    """Put the request, and have its tokens reduced as they come; the scores' columns."""
    columns: dict[str, list[Any]] = {}
    taken = 0
    async with contextlib.aclosing(_run(engine, sequence, token)) as running:
        async for generated in running:
            # Kept until then: the logits of so many tokens.
            if sequence.reference is not None and sequence.phase == "decode" and generated - taken >= AT_ONCE:
                taken += await _take(engine, token, columns)
    while sequence.reference is not None and taken < len(sequence.answer):
        taken += await _take(engine, token, columns)
    return columns


async def _run(engine: Any, sequence: Sequence, token: str) -> AsyncGenerator[int]:
    """Put the request; how many tokens it has generated so far, until all of it is computed."""
    decodes = sequence.phase == "decode"
    ids = sequence.prompt if decodes else [*sequence.prompt, *sequence.answer[:-1]]
    params = _params(
        max_tokens=len(sequence.answer) if decodes else 1,
        skip_reading_prefix_cache=not sequence.cached,  # what is in the cache was not computed now
        extra_args={MARK: token},
    )
    # The salt keeps callers from finding what is computed here in their cache.
    prompt = tokens_input(prompt_token_ids=ids, cache_salt=token)
    generated = 0
    async with contextlib.aclosing(engine.generate(prompt, params, f"{OWN}{token}")) as outputs:
        async for output in outputs:
            generated += len(output.outputs[0].token_ids)
            yield generated


async def _take(engine: Any, token: str, columns: dict[str, list[Any]]) -> int:
    """Have the tokens reduced that are there, at most `AT_ONCE`; how many they were.

    Raises:
        WalkFailed: there are none.
    """
    said = await _ask(engine, "assay_score", token, AT_ONCE)
    if "columns" not in said:
        raise WalkFailed(f"{said['left']} tokens of the sequence were not computed")
    for name, column in said["columns"].items():
        columns.setdefault(name, []).extend(column)
    return len(said["columns"]["token"])


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, **fields
    )


async def _ask(engine: Any, method: str, *args: Any) -> dict[str, Any]:
    """What the worker says that has the answer.

    Raises:
        WalkFailed: one of them could not do it.
    """
    return next(answer for answer in await ask_workers(engine, method, *args) if answer["answers"])


async def ask_workers(engine: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """What each worker says; all of them are asked, for they work together.

    Without a time limit: the answer to a call that was given up would be taken for that to the engine's next step.

    Raises:
        WalkFailed: one of them could not do it.
    """
    answers: list[dict[str, Any]] = await engine.collective_rpc(method, timeout=None, args=args)
    if problems := [answer for answer in answers if "problem" in answer]:
        raise (WalkInterrupted if problems[0].get("again") else WalkFailed)(problems[0]["problem"])
    return answers
