"""Measuring, at a fake engine: what is asked of it, and what is made of its answers."""

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import save_file

from server.engines.failures import EngineNotStarted
from server.measuring.measure import make_pack, score, worst_tokens
from tests.server.conftest import Gateway, running_gateway
from tiers.conformance.corpus import load_corpus
from tiers.conformance.pack import Pack, PackError
from tiers.conformance.prompts import Prompt, load_prompts
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.manifest import FileEntry, Manifest

PROMPTS = load_prompts(quick=True)[:3]
TOKENS = [7, 8, 9]


def silent(text: str) -> None:
    """Nobody watches."""


def keep_in(file: Path, tokens: int) -> None:
    """What an engine writes of an answer of so many tokens."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(tokens, dtype=np.float32)
    top = np.stack([rows.astype(np.int32) + rank for rank in range(3)], axis=1)
    ln_top = np.stack([-rows - rank for rank in range(3)], axis=1)
    kept = {"hidden": np.zeros((tokens, 4), np.float32), "top": top, "ln_top": ln_top}
    save_file(kept | {"ln_rest": -rows - 9, "ln_given": -rows - 1}, file)


class FakeEngine:
    """Answers every prompt with the same tokens, and scores them with numbers that tell where they are from."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.walks: list[dict[str, Any]] = []
        self.fails_at: str | None = None

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if request.path == "/v1/chat/completions":
            self.answers.append(body)
            choice = {"token_ids": TOKENS}
            return web.json_response({"prompt_token_ids": [1, 2], "choices": [choice]})
        if request.path == "/tokenize":
            return web.json_response({"tokens": [1, *TOKENS]})
        if request.path == "/detokenize":
            return web.json_response({"prompt": " ".join(map(str, body["tokens"]))})
        assert request.path == "/assay/score"
        self.walks.append(body)
        if body["keep"]:
            keep_in(Path(body["keep"]["file"]), len(body["answer"]))
        if body["reference"] and self.fails_at and self.fails_at in body["reference"]["hidden"]:
            return web.json_response({"detail": "no room"}, status=409)
        if not body["reference"]:
            return web.json_response({"columns": {}})
        numbers = {name: [0.1, 0.2, 0.3] for name in ("kl", "tv", "ln_p", "ln_q")}
        tops = dict.fromkeys(("top_p", "top_q", "token"), TOKENS)
        return web.json_response({"columns": {**numbers, **tops, "position": [0, 1, 2]}})


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def gateway(tmp_path: Path, fake: FakeEngine) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as made:
        made.handler = fake
        yield made


def manifest_of(gateway: Gateway, **files: str) -> Manifest:
    digests = {"tokenizer.json": "a" * 64, "chat_template.jinja": "b" * 64} | {
        name.replace("_json", ".json").replace("_jinja", ".jinja"): digest for name, digest in files.items()
    }
    entries = {name: FileEntry(sha256=digest, size=1) for name, digest in digests.items()}
    return gateway.replica.manifest.model_copy(update={"files": entries})


@pytest.fixture
async def checkpoint(tmp_path: Path, gateway: Gateway) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"model.embed_tokens.weight": np.zeros((16, 4), np.float32)}, folder / "model.safetensors")
    manifest_of(gateway).write(folder)
    return folder


@pytest.fixture
async def pack(gateway: Gateway, checkpoint: Path, tmp_path: Path) -> Pack:
    return await made(gateway, checkpoint, tmp_path / "pack", PROMPTS)


async def made(
    gateway: Gateway,
    checkpoint: Path,
    folder: Path,
    prompts: Sequence[Prompt],
    earlier: Pack | None = None,
    *,
    twice: bool = True,
) -> Pack:
    return await make_pack(
        gateway.replica.engine,
        "m",
        checkpoint,
        prompts,
        load_corpus()[: len(prompts) - 1],
        folder,
        tokens=3,
        fingerprint="f",
        say=silent,
        twice=twice,
        earlier=earlier,
    )


async def test_every_prompt_is_answered_greedily_and_sampled(pack: Pack, fake: FakeEngine) -> None:
    asked = {(json.dumps(each["messages"]), each["temperature"]) for each in fake.answers}
    assert asked == {(json.dumps(list(prompt.messages)), t) for prompt in PROMPTS for t in (0, 1)}
    assert {each["seed"] for each in fake.answers} == {5}
    assert [answer.answer for answer in pack.answers] == [TOKENS] * 8
    assert [answer.source for answer in pack.answers] == ["greedy", "sampled"] * 3 + ["written"] * 2
    assert {each["phase"] for each in fake.walks} == {"prefill"}
    assert Pack.read(pack.folder).digest == pack.digest


async def test_once_each_they_are_greedy_and_sampled_by_turns(
    gateway: Gateway, checkpoint: Path, tmp_path: Path
) -> None:
    pack = await made(gateway, checkpoint, tmp_path / "once", PROMPTS, twice=False)
    assert [answer.source for answer in pack.answers] == ["greedy", "sampled", "greedy", "written", "written"]
    assert [answer.prompt_id for answer in pack.prompts_asked] == [prompt.id for prompt in PROMPTS]


async def test_scores_know_their_prompt(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    prefill = await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent)
    assert prefill.prompt.tolist() == [number for number in range(8) for _ in TOKENS]
    assert prefill.position.tolist() == [0, 1, 2] * 8


async def test_the_first_token_of_an_answer_is_not_decoded(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    decode = await score(gateway.replica.engine, pack, checkpoint, "decode", say=silent)
    assert decode.position.tolist() == [1, 2] * 8
    assert decode.kl.tolist() == [0.2, 0.3] * 8


async def test_a_sequence_that_fails_ends_the_measurement(
    gateway: Gateway, fake: FakeEngine, pack: Pack, checkpoint: Path
) -> None:
    fake.fails_at = pack.answers[2].hidden
    with pytest.raises(EngineNotStarted, match="no room"):
        await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent)


async def test_the_worst_tokens_are_shown_once_and_in_their_context(
    gateway: Gateway, pack: Pack, checkpoint: Path
) -> None:
    scores: dict[Phase, Scores] = {
        phase: await score(gateway.replica.engine, pack, checkpoint, phase, say=silent) for phase in PHASES
    }
    scores["decode"].kl[3] = 5.0
    worst = await worst_tokens(gateway.replica.engine, "m", pack, scores, count=4)
    assert [each.kl for each in worst] == [5.0, 0.3, 0.3, 0.3]
    assert worst[0].phase == "decode"
    assert (worst[0].before, worst[0].token) == ("1 2 7 8", "9")
    assert len({(each.prompt_id, each.position) for each in worst}) <= 4


async def test_a_pack_with_another_byte_is_refused(pack: Pack) -> None:
    file = pack.folder / pack.answers[0].hidden
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PackError, match="not what it was"):
        Pack.read(pack.folder)


async def test_a_pack_is_for_one_tokenizer_and_template(gateway: Gateway, pack: Pack) -> None:
    pack.check(manifest_of(gateway))
    for name in ("tokenizer", "template"):
        file = "tokenizer_json" if name == "tokenizer" else "chat_template_jinja"
        with pytest.raises(PackError, match=name):
            pack.check(manifest_of(gateway, **{file: "c" * 64}))


async def test_answers_are_counted_by_prompts_and_the_corpus_by_passages(
    gateway: Gateway, pack: Pack, checkpoint: Path
) -> None:
    scores = await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent)
    assert [answer.prompt_id for answer in pack.prompts_asked] == [prompt.id for prompt in PROMPTS]
    assert pack.of_answers(scores).prompt.tolist() == [place for place in range(3) for _ in range(6)]
    assert pack.of_corpus(scores).prompt.tolist() == [0, 0, 0, 1, 1, 1]


async def test_only_the_answers_asked_for_are_walked(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    scores = await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent, only=[7, 2], cached=True)
    assert scores.prompt.tolist() == [2, 2, 2, 7, 7, 7]


async def test_a_pack_goes_on_from_an_earlier_one(
    gateway: Gateway, fake: FakeEngine, pack: Pack, checkpoint: Path, tmp_path: Path
) -> None:
    asked = len(fake.answers)
    further = load_prompts(quick=True)[3:5]
    longer = await made(gateway, checkpoint, tmp_path / "longer", (*PROMPTS, *further), earlier=pack)
    assert len(fake.answers) == asked + 4
    assert longer.answers[: len(pack.answers)] == pack.answers
    assert Pack.read(longer.folder).digest == longer.digest != pack.digest
    assert len(longer.prompts_asked) == 5
    assert len(longer.passages) == 4


async def test_a_pack_without_hidden_states_is_enough_for_bounds_and_for_nothing_else(
    gateway: Gateway, pack: Pack, checkpoint: Path
) -> None:
    shutil.rmtree(pack.folder / "hidden")
    small = Pack.read(pack.folder)
    assert small.digest == pack.digest
    kept = small.likeliest(1)
    assert kept.tokens.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert kept.ln_p.tolist() == [[0, -1, -2], [-1, -2, -3], [-2, -3, -4]]
    assert (kept.ln_rest.tolist(), kept.ln_given.tolist()) == ([-9, -10, -11], [-1, -2, -3])
    with pytest.raises(PackError, match="for bounds only"):
        await score(gateway.replica.engine, small, checkpoint, "prefill", say=silent)
