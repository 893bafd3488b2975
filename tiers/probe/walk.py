"""Walks this engine along one sequence and collects its scores; loaded inside the API server.

Knows how a request is put to vLLM and how its workers are asked; what they do is `tiers.probe.scoring`.
"""

import asyncio
import secrets
from typing import Any

from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from tiers.conformance.sequence import Scored, Sequence
from tiers.probe.scoring import MARK

AT_ONCE = 64
"""Tokens reduced in one call, during which no step of the engine runs; for fewer the head is read in vain."""
LOOK_S = 0.2


class WalkFailed(Exception):
    """The engine could not be walked along this sequence; one sentence of why."""


async def walk(engine: Any, sequence: Sequence) -> Scored:
    """Have ``engine``, vLLM's client of its core, compute the sequence; its numbers.

    Raises:
        WalkFailed: they could not be had.
    """
    token = secrets.token_hex(16)
    decodes = sequence.phase == "decode"
    job = {
        "prompt": len(sequence.prompt),
        "answer": sequence.answer,
        "decodes": decodes,
        "saves_logits": sequence.keep is not None and sequence.keep.logits,
        "reference": sequence.reference.model_dump() if sequence.reference else None,
    }
    try:
        if sequence.cached:
            await _fill_cache(engine, sequence, token)
        await _ask(engine, "assay_score_begin", token, job)
        running = asyncio.create_task(_run(engine, sequence, token))
        columns = await _collect(engine, sequence, token, running)
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
    async for _ in engine.generate(prompt, params, f"assay-cache-{token}"):
        pass


async def _run(engine: Any, sequence: Sequence, token: str) -> None:
    """Put the request; done when the engine has computed all of it."""
    decodes = sequence.phase == "decode"
    ids = sequence.prompt if decodes else [*sequence.prompt, *sequence.answer[:-1]]
    params = _params(
        max_tokens=len(sequence.answer) if decodes else 1,
        skip_reading_prefix_cache=not sequence.cached,  # what is in the cache was not computed now
        extra_args={MARK: token},
    )
    # The salt keeps callers from finding what is computed here in their cache.
    prompt = tokens_input(prompt_token_ids=ids, cache_salt=token)
    async for _ in engine.generate(prompt, params, f"assay-{token}"):
        pass


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **fields
    )


async def _collect(
    engine: Any, sequence: Sequence, token: str, running: "asyncio.Task[None]"
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    try:
        while not running.done() and sequence.phase == "prefill":
            await asyncio.wait({running})
        while sequence.reference is not None:
            over = running.done()
            said = await _ask(engine, "assay_score", token, AT_ONCE if not over else 1, AT_ONCE)
            for name, column in said.get("columns", {}).items():
                columns.setdefault(name, []).extend(column)
            if not said["left"]:
                break
            if over and "columns" not in said:
                raise WalkFailed(f"{said['left']} tokens of the sequence were not computed")
            if not over:
                await asyncio.wait({running}, timeout=LOOK_S)
        await running
    finally:
        running.cancel()
    return columns


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
    if problems := [answer["problem"] for answer in answers if "problem" in answer]:
        raise WalkFailed(problems[0])
    return answers
