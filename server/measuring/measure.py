"""Measures tiers on their running engines: the reference answers, and each tier is walked along its answers.

Knows engines and what is asked of them; knows no statistics and no verdicts.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from server.engines.engine import Engine
from tiers.conformance import corpus
from tiers.conformance.corpus import Passage
from tiers.conformance.findings import WorstToken
from tiers.conformance.pack import Answer, Origin, Pack, head_of
from tiers.conformance.prompts import Prompt, digest
from tiers.conformance.scores import Phase, Scores
from tiers.conformance.sequence import Keep
from tiers.conformance.sequence import Sequence as Walk
from tiers.errors import AssayError, BuildError
from tiers.manifest import Manifest

Say = Callable[[str], None]
T = TypeVar("T")

SEED = 5
CONTEXT = 48
"""Tokens that are shown before one of the worst."""
AT_ONCE = 32
"""Sequences: neighbours in the same steps, as callers are."""
LONGEST_PASSAGE = 128
"""Tokens of a passage of the corpus that are scored."""


async def make_pack(
    engine: Engine,
    model: str,
    checkpoint: Path,
    prompts: Sequence[Prompt],
    passages: Sequence[Passage],
    folder: Path,
    *,
    tokens: int,
    fingerprint: str,
    say: Say,
    twice: bool = True,
    earlier: Pack | None = None,
) -> Pack:
    """Have the reference answer every prompt, greedily or sampled, and keep its distributions there.

    Those along the corpus are kept as well.

    Args:
        engine: the reference's.
        model: its name for the tier.
        checkpoint: its checkpoint's folder.
        prompts: to be answered.
        passages: of the corpus.
        folder: where the pack is to be.
        tokens: of each answer, at most.
        fingerprint: of the engine.
        say: told how far it is.
        twice: whether each prompt is answered both ways, or one this way and the next that.
        earlier: a pack of the first of these prompts and passages, whose answers are taken over, as its first.

    Raises:
        EngineNotStarted: it gives no answer.
        PackError: its checkpoint is none that can be asked.
    """
    manifest, head = Manifest.read(checkpoint), head_of(checkpoint)
    origin = Origin.of(manifest)
    taken = earlier.share(folder) if earlier else []
    have = {answer.prompt_id for answer in taken}
    wanted = [
        (prompt, greedy)
        for place, prompt in enumerate(prompts)
        for greedy in ((True, False) if twice else (place % 2 == 0,))
        if prompt.id not in have
    ]
    further = [passage for passage in passages if passage.id not in have]
    done = 0

    async def kept(answer: Answer) -> Answer:
        nonlocal done
        keep = Keep(file=str(folder / answer.hidden), head=head)
        await engine.walk(Walk(prompt=answer.prompt, answer=answer.answer, phase="prefill", keep=keep))
        done += 1
        say(f"{done} of {len(wanted) + len(further)} answers and passages")
        return answer

    async def answered(prompt: Prompt, greedy: bool) -> Answer:
        return await kept(await engine.answer(model, prompt, tokens=tokens, greedy=greedy, seed=SEED))

    async def read(passage: Passage) -> Answer:
        first, *rest = await engine.tokens(model, passage.text)
        return await kept(
            Answer(
                prompt_id=passage.id,
                kind="corpus",
                language=passage.language,
                source="written",
                prompt=[first],
                answer=rest[:LONGEST_PASSAGE],
            )
        )

    works = [*(partial(answered, *each) for each in wanted), *(partial(read, each) for each in further)]
    answers = taken + await by_turns(works, AT_ONCE)
    return Pack.write(
        folder,
        origin,
        answers,
        engine=fingerprint,
        prompts=digest(prompts),
        corpus=corpus.digest(passages),
        seed=SEED,
    )


async def score(
    engine: Engine,
    pack: Pack,
    reference: Path,
    phase: Phase,
    *,
    say: Say,
    at_once: int = AT_ONCE,
    only: Collection[int] | None = None,
    cached: bool = False,
) -> Scores:
    """Walk an engine along the pack's answers, and the corpus.

    Args:
        engine: of the tier to measure.
        pack: of a reference with the tier's tokenizer and template; see `Pack.check`.
        reference: the folder of the reference's checkpoint, for its head.
        phase: how the answers are computed.
        say: told how far it is.
        at_once: sequences in the same steps.
        only: the places of the answers; all of them by default.
        cached: whether prompts are read from the engine's prefix cache.

    Raises:
        EngineNotStarted: the engine cannot be walked, or is gone.
        PackError: the pack has no hidden states.
    """
    head = head_of(reference)
    numbers = range(len(pack.answers)) if only is None else only
    # The longest first: those that are left at the end have few neighbours.
    numbers = sorted(numbers, key=lambda number: -len(pack.answers[number].answer))
    done = 0

    async def scored(number: int) -> Scores:
        nonlocal done
        answer = pack.answers[number]
        walk = Walk(
            prompt=answer.prompt,
            answer=answer.answer,
            phase=phase,
            reference=pack.reference(answer, head),
            cached=cached,
        )
        columns = (await engine.walk(walk)).columns
        done += 1
        say(f"{phase}: {done} of {len(numbers)} answers and passages")
        return Scores.of(columns | {"prompt": [number] * len(columns["token"])})

    measured = await by_turns([partial(scored, number) for number in numbers], at_once)
    scores = Scores.joined([each for _, each in sorted(zip(numbers, measured, strict=True), key=itemgetter(0))])
    # An answer's first token comes from the prompt's prefill, in both phases.
    return scores if phase == "prefill" else scores.where(scores.position > 0)


async def compute_in_fp32(pack: Pack, checkpoint: Path, folder: Path, earlier: Pack | None, say: Say) -> None:
    """Have Transformers make a pack of the same answers, whose distributions are those that it computes in FP32.

    In a process of its own, for it needs PyTorch, and as much memory as `conformance.room` says.

    Args:
        pack: whose answers.
        checkpoint: the reference checkpoint's folder.
        folder: where the new pack is to be.
        earlier: one that this made of the first of the answers, which are taken over.
        say: told how far it is.

    Raises:
        BuildError: it could not.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tiers.conformance.truth",
        *(str(pack.folder), str(checkpoint), str(folder)),
        *(("--earlier", str(earlier.folder)) if earlier else ()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        errors = asyncio.create_task(process.stderr.read())
        async for line in process.stdout:
            say(line.decode(errors="replace").strip())
        code = await process.wait()
        if code == -signal.SIGKILL:
            raise BuildError(
                "Transformers was ended while it computed the reference's answers, by the kernel if memory ran "
                "out: free some, or raise the container's limit."
            )
        if code:
            last = (await errors).decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
            raise BuildError(f"Transformers could not compute the reference's answers: {last[-1][:300]}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def by_turns(works: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """What each gives, in their order; so many are under way at once.

    Raises:
        AssayError: the first that one of them raised; the others are cancelled.
    """
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
    """Where the tier is farthest from the reference's answers, in context; each token once, in its worse phase.

    Raises:
        EngineNotStarted: the engine does not tell what tokens say.
    """
    answered = np.array([not answer.is_written for answer in pack.answers])
    scores = {phase: each.where(answered[each.prompt]) for phase, each in scores.items()}
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
