"""Measuring, at a fake engine: what is asked of it, and what is made of its answers."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import save_file

from server.engine import EngineNotStarted
from server.measure import make_pack, score, worst_tokens
from tests.server.conftest import Gateway, running_gateway
from tiers.conformance.pack import Pack, PackError
from tiers.conformance.prompts import load_prompts
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.manifest import FileEntry, Manifest

PROMPTS = load_prompts(quick=True)[:3]
TOKENS = [7, 8, 9]


def silent(text: str) -> None:
    """Nobody watches."""


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
        if request.path == "/detokenize":
            return web.json_response({"prompt": " ".join(map(str, body["tokens"]))})
        assert request.path == "/assay/score"
        self.walks.append(body)
        if body["save"]:
            Path(body["save"]).parent.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": np.zeros((len(TOKENS), 4), np.float32)}, body["save"])
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
async def pack(gateway: Gateway, tmp_path: Path) -> Pack:
    return await make_pack(
        gateway.replica.engine,
        "m",
        manifest_of(gateway),
        PROMPTS,
        tmp_path / "pack",
        tokens=3,
        fingerprint="f",
        say=silent,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"model.embed_tokens.weight": np.zeros((16, 4), np.float32)}, folder / "model.safetensors")
    return folder


async def test_every_prompt_is_answered_greedily_and_sampled(pack: Pack, fake: FakeEngine) -> None:
    asked = {(json.dumps(each["messages"]), each["temperature"]) for each in fake.answers}
    assert asked == {(json.dumps(list(prompt.messages)), t) for prompt in PROMPTS for t in (0, 1)}
    assert {each["seed"] for each in fake.answers} == {5}
    assert [answer.answer for answer in pack.answers] == [TOKENS] * 6
    assert {each["phase"] for each in fake.walks} == {"prefill"}
    assert Pack.read(pack.folder).digest == pack.digest


async def test_scores_know_their_prompt(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    prefill = await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent)
    assert prefill.prompt.tolist() == [number for number in range(6) for _ in TOKENS]
    assert prefill.position.tolist() == [0, 1, 2] * 6


async def test_the_first_token_of_an_answer_is_not_decoded(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    decode = await score(gateway.replica.engine, pack, checkpoint, "decode", say=silent)
    assert decode.position.tolist() == [1, 2] * 6
    assert decode.kl.tolist() == [0.2, 0.3] * 6


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


async def test_answers_to_one_prompt_are_counted_together(gateway: Gateway, pack: Pack, checkpoint: Path) -> None:
    scores = await score(gateway.replica.engine, pack, checkpoint, "prefill", say=silent)
    asked = [answer.prompt_id for answer in pack.prompts_asked]
    assert asked == [prompt.id for prompt in PROMPTS]
    counted = pack.by_prompt(scores)
    assert [asked[place] for place in counted.prompt] == [pack.answers[place].prompt_id for place in scores.prompt]
    assert counted.kl is scores.kl
