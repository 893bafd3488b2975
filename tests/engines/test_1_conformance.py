"""Every tier is walked along the reference's answers, inside its serving engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.engines.engine import Engine
from server.measuring.measure import make_pack, score
from tests.engines.conftest import CHECKPOINTS, LITE_RECIPE, MODEL, Server
from tiers.conformance.corpus import load_corpus
from tiers.conformance.pack import Pack, head_of
from tiers.conformance.prompts import load_prompts
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.conformance.sequence import TOP, Keep, Sequence
from tiers.manifest import Manifest

pytestmark = pytest.mark.timeout(1200)
REFERENCE = CHECKPOINTS / MODEL / "bf16"
TOKENS = 16


def silent(text: str) -> None:
    """Nobody watches."""


class Engines:
    """The engines of the embedded model, asked without the gateway, each on a loop of its own."""

    def __init__(self, assay: Server) -> None:
        self._assay = assay

    def run(self, tier: str, work: Any) -> Any:
        """What ``work``, a coroutine function of an engine, gives."""

        async def with_engine() -> Any:
            key = self._assay.engine(tier)[0].environ()["VLLM_API_KEY"]
            engine = Engine(tier, f"http://127.0.0.1:{self._assay.engine_port(tier)}", key, None)
            try:
                return await work(engine)
            finally:
                await engine.stop()

        return asyncio.run(with_engine())


@pytest.fixture(scope="module")
def engines(assay: Server) -> Engines:
    return Engines(assay)


@pytest.fixture(scope="module")
def pack(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Of a few short prompts in several languages."""
    prompts = [prompt for prompt in load_prompts(quick=True) if prompt.kind in ("chat", "knowledge")][:4]
    folder = tmp_path_factory.mktemp("pack")
    passages = [passage for passage in load_corpus() if passage.language == "en"][:1]

    async def make(engine: Engine) -> Pack:
        model = f"{MODEL}-Reference"
        return await make_pack(
            engine, model, REFERENCE, prompts, passages, folder, tokens=TOKENS, fingerprint="test", say=silent
        )

    made: Pack = engines.run("Reference", make)
    return made


def walked(engines: Engines, tier: str, sequence: Sequence) -> Scores:
    columns = engines.run(tier, lambda engine: engine.walk(sequence)).columns
    return Scores.of(columns | {"prompt": [0] * len(columns["token"])})


def test_a_pack_is_read_back_as_it_was_written(pack: Pack) -> None:
    again = Pack.read(pack.folder)
    assert again.answers == pack.answers
    assert again.digest == pack.digest
    assert {len(load_file(pack.folder / a.hidden)["hidden"]) - len(a.answer) for a in pack.answers} == {0}


def test_a_pack_keeps_the_likeliest_tokens_of_its_hidden_states(pack: Pack) -> None:
    """Recomputed in float64; enough for bounds, without the states and the head."""
    at = head_of(REFERENCE)
    head = load_file(at.file)[at.name].double()
    for number, answer in enumerate(pack.answers):
        ln_p = (load_file(pack.folder / answer.hidden)["hidden"].double() @ head.T).log_softmax(-1)
        kept = pack.likeliest(number)
        tokens = torch.tensor(kept.tokens).long()
        assert kept.tokens.shape == (len(answer.answer), TOP)
        assert torch.allclose(torch.tensor(kept.ln_p).double(), ln_p.gather(-1, tokens), atol=1e-4)
        assert torch.allclose(torch.tensor(kept.ln_p).double(), ln_p.topk(TOP).values, atol=1e-4)
        rest = 1 - ln_p.gather(-1, tokens).exp().sum(-1)
        assert torch.allclose(torch.tensor(kept.ln_rest).double().exp(), rest, rtol=1e-3, atol=1e-9)
        given = ln_p.gather(-1, torch.tensor(answer.answer)[:, None]).squeeze(-1)
        assert torch.allclose(torch.tensor(kept.ln_given).double(), given, atol=1e-4)


def test_a_prompt_from_the_prefix_cache_is_scored_as_one_that_is_computed(engines: Engines, pack: Pack) -> None:
    """Of the longest prompt, of which there are whole blocks in the cache."""
    longest = max(range(len(pack.answers)), key=lambda number: len(pack.answers[number].prompt))
    for phase in PHASES:
        computed, cached = (
            engines.run(
                "Reference",
                lambda engine, phase=phase, cached=cached: score(
                    engine, pack, REFERENCE, phase, say=silent, only=[longest], cached=cached
                ),
            )
            for cached in (False, True)
        )
        assert cached.position.tolist() == computed.position.tolist()
        assert abs(cached.ln_q - computed.ln_q).max() < 0.3
        assert cached.kl.mean() < 0.01


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("tier", ["Lite"])
def test_the_numbers_are_those_of_the_captured_distributions(
    engines: Engines, pack: Pack, tmp_path: Path, tier: str, phase: Phase
) -> None:
    """Recomputed in float64, in other words, from what the engine compared."""
    answer = max(pack.answers, key=lambda each: len(each.answer))
    saved = tmp_path / "saved.safetensors"
    reference = pack.reference(answer, head_of(REFERENCE))
    ours = walked(
        engines,
        tier,
        Sequence(
            prompt=answer.prompt,
            answer=answer.answer,
            phase=phase,
            reference=reference,
            keep=Keep(file=str(saved), logits=True),
        ),
    )
    hidden = load_file(pack.folder / answer.hidden)["hidden"].double()
    head = load_file(reference.head.file)[reference.head.name].double()
    p = (hidden @ head.T).softmax(-1)
    q = load_file(saved)["logits"].double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    assert torch.allclose(torch.tensor(ours.kl), kl, rtol=1e-4, atol=1e-7)
    assert torch.allclose(torch.tensor(ours.tv), (p - q).abs().sum(-1) / 2, rtol=1e-4, atol=1e-7)
    given = torch.tensor(answer.answer)
    rows = torch.arange(len(given))
    assert torch.allclose(torch.tensor(ours.ln_p), p[rows, given].log(), rtol=1e-4, atol=5e-5)
    assert torch.allclose(torch.tensor(ours.ln_q), q[rows, given].log(), rtol=1e-4, atol=5e-5)
    assert ours.top_p.tolist() == p.argmax(-1).tolist()


def test_the_public_api_says_the_same_of_a_token(assay: Server, engines: Engines, pack: Pack) -> None:
    """A greedy answer, asked for again: the engine's own log-probabilities are those it was scored by."""
    answer = next(each for each in pack.answers if each.source == "greedy")
    ours = walked(
        engines,
        "Reference",
        Sequence(
            prompt=answer.prompt,
            answer=answer.answer,
            phase="decode",
            reference=pack.reference(answer, head_of(REFERENCE)),
        ),
    )
    said = assay.client().completions.create(
        model=f"{MODEL}-Reference",
        prompt=answer.prompt,
        max_tokens=len(answer.answer),
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice: Any = said.choices[0]
    same = [a == b for a, b in zip(choice.token_ids, answer.answer, strict=True)]
    until = same.index(False) if False in same else len(same)
    assert until > len(same) // 2
    theirs = torch.tensor(choice.logprobs.token_logprobs[:until])
    away = (torch.tensor(ours.ln_q[:until]).float() - theirs).abs()
    assert away.max() < 0.2, "logits in BF16 are an eighth apart"
    assert away.mean() < 0.03


def test_callers_are_not_touched_while_a_tier_is_measured(assay: Server, engines: Engines, pack: Pack) -> None:
    """Their answers are neither forced nor scored, in the same steps."""

    callers: list[int] = []
    answers = [number for number, answer in enumerate(pack.answers) if not answer.is_written]

    async def measure(engine: Engine) -> tuple[Scores, list[str]]:
        scoring = asyncio.create_task(score(engine, pack, REFERENCE, "decode", say=silent, only=answers))
        await asyncio.sleep(0.5)
        callers.append(await engine.callers())
        asking = asyncio.create_task(asyncio.to_thread(_ask, assay))
        while not asking.done():
            callers.append(await engine.callers())
            await asyncio.sleep(0.1)
        return await scoring, await asking

    alone = _ask(assay)
    measured, beside = engines.run("Turbo", measure)
    assert callers[0] == 0, "what measures is no caller"
    assert max(callers) == 1
    assert {answer[:12] for answer in beside} == {alone[0][:12]}
    assert len(measured) == sum(len(pack.answers[number].answer) - 1 for number in answers)


def _ask(assay: Server) -> list[str]:
    answers = []
    for _ in range(2):
        answer = assay.client().chat.completions.create(
            model=f"{MODEL}-Turbo",
            messages=[{"role": "user", "content": "Count to ten."}],
            max_tokens=24,
            temperature=0,
        )
        answers.append(answer.choices[0].message.content or "")
    return answers


def test_what_cannot_be_compared_is_refused_and_the_engine_serves_on(
    assay: Server, engines: Engines, pack: Pack
) -> None:
    answer = pack.answers[0]
    right, no_head = (
        pack.reference(answer, head_of(REFERENCE)),
        head_of(REFERENCE).model_copy(update={"name": "x"}),
    )
    for wrong in ({"hidden": "/nowhere.safetensors"}, {"head": no_head}):
        reference = right.model_copy(update=wrong)
        sequence = Sequence(prompt=answer.prompt, answer=answer.answer, phase="prefill", reference=reference)
        with pytest.raises(Exception, match="cannot be read"):
            engines.run("Lite", lambda engine, sequence=sequence: engine.walk(sequence))
    longer = Sequence(prompt=answer.prompt, answer=[*answer.answer, 1], phase="decode", reference=right)
    with pytest.raises(Exception, match="hidden states are"):
        engines.run("Lite", lambda engine: engine.walk(longer))
    assert _ask(assay)


def test_a_pack_is_for_its_tokenizer_and_template_only(pack: Pack) -> None:
    lite = Manifest.read(CHECKPOINTS / MODEL / LITE_RECIPE)
    pack.check(lite)
    other = next(
        name for name in lite.files if name.startswith("chat_template") or name == "tokenizer_config.json"
    )
    entry = lite.files[other].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(Exception, match="template"):
        pack.check(lite.model_copy(update={"files": lite.files | {other: entry}}))
