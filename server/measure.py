"""Measures tiers on their running engines: the reference answers, and each tier is walked along its answers.

Knows engines and what is asked of them; knows no statistics and no verdicts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from server.engine import Engine
from tiers.conformance.findings import WorstToken
from tiers.conformance.pack import Answer, Origin, Pack
from tiers.conformance.prompts import Prompt, digest
from tiers.conformance.scores import Phase, Scores
from tiers.conformance.sequence import Sequence as Walk
from tiers.errors import AssayError
from tiers.manifest import Manifest

Say = Callable[[str], None]
T = TypeVar("T")

SEED = 5
CONTEXT = 48
"""Tokens that are shown before one of the worst."""
AT_ONCE = 4
"""Sequences: neighbours in the same steps, as callers are."""


async def make_pack(
    engine: Engine,
    model: str,
    manifest: Manifest,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    tokens: int,
    fingerprint: str,
    say: Say,
) -> Pack:
    """Have the reference answer every prompt, greedily and sampled, and keep its distributions there.

    Raises:
        EngineNotStarted: it gives no answer.
        PackError: its checkpoint is none that can be asked.
    """
    origin = Origin.of(manifest)
    wanted = list(product(prompts, (True, False)))
    done = 0

    async def answered(prompt: Prompt, greedy: bool) -> Answer:
        nonlocal done
        answer = await engine.answer(model, prompt, tokens=tokens, greedy=greedy, seed=SEED)
        await engine.walk(
            Walk(prompt=answer.prompt, answer=answer.answer, phase="prefill", save=str(folder / answer.hidden))
        )
        done += 1
        say(f"{done} of {len(wanted)} answers")
        return answer

    answers = await _by_turns([partial(answered, *each) for each in wanted], AT_ONCE)
    return Pack.write(folder, origin, answers, engine=fingerprint, prompts=digest(prompts), seed=SEED)


async def score(
    engine: Engine, pack: Pack, reference: Path, phase: Phase, *, say: Say, at_once: int = AT_ONCE
) -> Scores:
    """Walk an engine along all of the pack's answers.

    Args:
        engine: of the tier to measure.
        pack: of a reference with the tier's tokenizer and template; see `Pack.check`.
        reference: the folder of the reference's checkpoint, for its head.
        phase: how the answers are computed.
        say: told how far it is.
        at_once: sequences in the same steps.

    Raises:
        EngineNotStarted: the engine cannot be walked, or is gone.
    """
    done = 0

    async def scored(number: int, answer: Answer) -> Scores:
        nonlocal done
        walk = Walk(
            prompt=answer.prompt, answer=answer.answer, phase=phase, reference=pack.reference(answer, reference)
        )
        columns = (await engine.walk(walk)).columns
        done += 1
        say(f"{phase}: {done} of {len(pack.answers)} answers")
        return Scores.of(columns | {"prompt": [number] * len(columns["token"])})

    works = [partial(scored, number, answer) for number, answer in enumerate(pack.answers)]
    scores = Scores.joined(await _by_turns(works, at_once))
    # An answer's first token comes from the prompt's prefill, in both phases.
    return scores if phase == "prefill" else scores.where(scores.position > 0)


async def _by_turns(works: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """What each gives, in their order; so many are under way at once."""
    gate = asyncio.Semaphore(at_once)

    async def in_turn(work: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await work()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(work)) for work in works]
    except* AssayError as problems:
        raise problems.exceptions[0] from None  # the others are its echo
    return [task.result() for task in tasks]


async def worst_tokens(
    engine: Engine, model: str, pack: Pack, scores: Mapping[Phase, Scores], count: int = 10
) -> list[WorstToken]:
    """Where the tier is farthest from the reference, in its context; each token once, in its worse phase.

    Raises:
        EngineNotStarted: the engine does not tell what tokens say.
    """
    rows = [(phase, row) for phase, each in scores.items() for row in np.argsort(-each.kl)[: 2 * count]]
    rows.sort(key=lambda found: -scores[found[0]].kl[found[1]])
    seen: set[tuple[int, int]] = set()
    worst: list[WorstToken] = []
    for phase, row in rows:
        each = scores[phase]
        number, position = int(each.prompt[row]), int(each.position[row])
        if (number, position) in seen or len(worst) == count:
            continue
        seen.add((number, position))
        answer = pack.answers[number]
        before = await engine.text(model, [*answer.prompt, *answer.answer[:position]][-CONTEXT:])
        worst.append(
            WorstToken(
                prompt_id=answer.prompt_id,
                phase=phase,
                position=position,
                before=before,
                token=await engine.text(model, [int(each.token[row])]),
                top_q=await engine.text(model, [int(each.top_q[row])]),
                kl=float(each.kl[row]),
                ln_p=float(each.ln_p[row]),
                ln_q=float(each.ln_q[row]),
            )
        )
    return worst
