"""A server that someone else runs, measured by its public API: a fake one, whose distributions are all known."""

import asyncio
import hashlib
import io
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.special import log_softmax, logsumexp, rel_entr
from typer.testing import CliRunner, Result

from server import cli
from server.certificates import Certificates
from server.commands import certificate as certificate_cli
from server.config import Config
from server.measuring import outside
from server.measuring.certify_outside import certify_outside, score, write
from server.measuring.outside import PublicApi, ServerNotMeasured, read_key, read_url
from server.progress import Steps
from tests.server.test_certificates import pool_of
from tiers.conformance import corpus
from tiers.conformance.budget import Budget
from tiers.conformance.certificate import Certificate
from tiers.conformance.extent import QUICK_TOKENS, Asked, Extent
from tiers.conformance.findings import Verdict
from tiers.conformance.pack import PACK_NAME, Answer, Origin, Pack, PackError
from tiers.conformance.prompts import digest, load_prompts
from tiers.conformance.scores import Phase, Scores
from tiers.conformance.signature import Envelope, make_key, read_public_key, verify
from tiers.errors import AssayError, ConfigError

VOCABULARY, TOP = 60, 20
PROMPTS = [prompt for prompt in load_prompts(quick=True) if not prompt.tools][:6]
MODEL = "SmolLM2-135M-Instruct"
NAME = "their-name"
KEY = "sk-not-to-be-seen"
Floats = NDArray[np.float64]


@cache
def ln_p(before: tuple[int, ...]) -> Floats:
    """The reference's distribution after these tokens, [V]: of the last two, as far as it goes."""
    random = np.random.default_rng([*before[-2:], len(before)])
    return np.asarray(log_softmax(random.normal(0, 2.5, VOCABULARY)), np.float64)


@cache
def ln_q(before: tuple[int, ...]) -> Floats:
    """The server's: near to it."""
    random = np.random.default_rng([*before[-3:], 7])
    return np.asarray(log_softmax(ln_p(before) + random.normal(0, 0.35, VOCABULARY)), np.float64)


def told(before: Sequence[int], given: int, top: int) -> dict[int, float]:
    """What the server tells of the position after these tokens."""
    row = ln_q(tuple(before))
    return {int(token): float(row[token]) for token in [*np.argsort(-row)[:top], given]}


@dataclass
class Theirs:
    """Their server, and what it was asked."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    busy: int = 0
    """How often it has no time."""
    lacks: str = ""
    """What it does not do."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of tokens, by the text of a prompt's last message."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers.get("authorization"))
        if self.busy:
            self.busy -= 1
            return web.Response(text="slow down", status=429, headers={"retry-after": "0"})
        if self.lacks == "the key":
            return web.json_response({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status=401)
        if self.lacks == "health":
            return web.Response(text=f"\x1b[2J out of memory, {request.headers.get('authorization')}", status=500)
        if self.lacks == "an API":
            return web.Response(text="<html>", content_type="text/html")
        if self.lacks == "its old place":
            raise web.HTTPTemporaryRedirect("https://elsewhere.example/v1")
        if request.path.endswith("/chat/completions"):
            count = self.counts[json.dumps(body["messages"])]
            return web.json_response({"usage": {"prompt_tokens": count + (self.lacks == "the tokenizer")}})
        assert request.path == "/v1/completions"
        if self.lacks == "twenty" and max(body.get("logprobs", 0), body.get("prompt_logprobs", 0)) > 5:
            return web.json_response({"error": {"message": "logprobs of 20 is greater than 5"}}, status=400)
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None}
        ids = body["prompt"]
        if "prompt_logprobs" in body and self.lacks != "prompt_logprobs":
            rows = [
                {str(t): {"logprob": v} for t, v in told(ids[:i], ids[i], TOP).items()} for i in range(1, len(ids))
            ]
            choice["prompt_logprobs"] = [None, *rows]
        if "logprobs" in body and self.lacks != "logprobs":
            choice["logprobs"] = self._written(ids, body["max_tokens"])
        return web.json_response({"choices": [choice]})

    def _written(self, ids: list[int], count: int) -> dict[str, Any]:
        name = "token_id:{}" if self.lacks != "token ids" else " w{}"
        steps: dict[str, Any] = {"tokens": [], "top_logprobs": []}
        for _ in range(min(count, 5) if self.lacks == "ignore_eos" else count):
            token = int(ln_q(tuple(ids)).argmax())
            steps["tokens"].append(name.format(token))
            steps["top_logprobs"].append({name.format(t): v for t, v in told(ids, token, TOP).items()})
            ids = [*ids, token]
        return steps


@pytest.fixture
async def theirs() -> AsyncIterator[Theirs]:
    made = Theirs()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    made.url = f"http://{host}:{port}/v1"
    yield made
    await runner.cleanup()


def answered(prompt: list[int], length: int, source: str, seed: int) -> list[int]:
    """As the reference would."""
    random = np.random.default_rng(seed)
    ids = list(prompt)
    for _ in range(length):
        row = ln_p(tuple(ids))
        ids.append(int(row.argmax() if source == "greedy" else random.choice(VOCABULARY, p=np.exp(row))))
    return ids[len(prompt) :]


def make_pack(folder: Path, *, length: int = 16, model: str = MODEL, prompts: str | None = None) -> Pack:
    """What the reference answers, with what it holds likeliest; no hidden states."""
    answers = []
    for number, prompt in enumerate(PROMPTS):
        for source in ("greedy", "sampled"):
            tokens = np.random.default_rng(number).integers(0, VOCABULARY, 4 + number).tolist()
            answer = answered(tokens, length, source, number)
            answers.append(
                Answer(
                    prompt_id=prompt.id,
                    kind=prompt.kind,
                    language=prompt.language,
                    source=source,
                    prompt=tokens,
                    answer=answer,
                )
            )
    passages = corpus.load_corpus()[:6]
    for number, passage in enumerate(passages):
        text = answered([number], length, "sampled", 100 + number)
        answers.append(
            Answer(
                prompt_id=passage.id,
                kind="corpus",
                language=passage.language,
                source="written",
                prompt=[number],
                answer=text,
            )
        )
    for each in answers:
        rows = np.stack([ln_p((*each.prompt, *each.answer[:i])) for i in range(length)])
        top = np.argsort(-rows, axis=1)[:, :TOP]
        others = rows.copy()
        np.put_along_axis(others, top, -np.inf, axis=1)
        file = folder / each.hidden
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "hidden": np.zeros((length, 1), np.float32),
            "top": top.astype(np.int32),
            "ln_top": np.take_along_axis(rows, top, axis=1).astype(np.float32),
            "ln_rest": logsumexp(others, axis=1).astype(np.float32),
            "ln_given": rows[np.arange(length), each.answer].astype(np.float32),
        }
        save_file(columns, file)
    made = Pack.write(
        folder,
        Origin(model=model, checkpoint="a" * 64, tokenizer="b" * 64, template="c" * 64),
        answers,
        engine="f",
        prompts=prompts or digest(PROMPTS),
        corpus=corpus.digest(passages),
        seed=5,
    )
    for each in answers:
        (folder / each.hidden).unlink()
    (folder / "hidden").rmdir()
    return made


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs") / "pack"
    make_pack(folder)
    return Pack.read(folder)


@pytest.fixture
def expects(theirs: Theirs, pack: Pack) -> Theirs:
    """Theirs, with the reference's tokenizer."""
    lengths = {answer.prompt_id: len(answer.prompt) for answer in pack.answers}
    theirs.counts = {json.dumps(list(prompt.messages)): lengths[prompt.id] for prompt in PROMPTS}
    return theirs


def silent(text: str) -> None:
    """Nobody watches."""


async def scored(theirs: Theirs, pack: Pack) -> dict[Phase, Scores]:
    async with PublicApi(theirs.url, NAME) as api:
        return await score(api, pack, say=silent)


def exact_of(pack: Pack, scores: Scores) -> tuple[Floats, Floats]:
    """KL and TV of the whole vocabulary, where the scores are."""
    befores = [
        (*pack.answers[number].prompt, *pack.answers[number].answer[:position])
        for number, position in zip(scores.prompt, scores.position, strict=True)
    ]
    p = np.exp(np.stack([ln_p(before) for before in befores]))
    q = np.exp(np.stack([ln_q(before) for before in befores]))
    return np.asarray(rel_entr(p, q).sum(axis=1)), np.abs(p - q).sum(axis=1) / 2


async def test_every_bound_is_below_what_it_bounds(theirs: Theirs, pack: Pack) -> None:
    for phase, found in (await scored(theirs, pack)).items():
        kl, tv = exact_of(pack, found)
        assert (found.kl <= kl * 1.00001 + 1e-6).all(), phase
        assert (found.tv <= tv + 1e-6).all(), phase
        assert found.kl.mean() > 0.4 * kl.mean(), phase
        for row in range(len(found)):
            answer = pack.answers[found.prompt[row]]
            before = (*answer.prompt, *answer.answer[: found.position[row]])
            assert found.top_p[row] == ln_p(before).argmax()
            assert found.top_q[row] == ln_q(before).argmax()
            assert found.ln_p[row] == pytest.approx(ln_p(before)[found.token[row]], abs=1e-5)
            assert found.ln_q[row] == pytest.approx(ln_q(before)[found.token[row]], abs=1e-9)


async def test_prefill_is_of_every_token(theirs: Theirs, pack: Pack) -> None:
    prefill = (await scored(theirs, pack))["prefill"]
    assert prefill.token.tolist() == [token for answer in pack.answers for token in answer.answer]


@pytest.mark.parametrize("lacks", ["", "ignore_eos"])
async def test_decode_is_of_what_follows_a_token_that_the_server_chose(
    theirs: Theirs, pack: Pack, lacks: str
) -> None:
    theirs.lacks = lacks
    decode = (await scored(theirs, pack))["decode"]
    found = set(zip(decode.prompt.tolist(), decode.position.tolist(), strict=True))
    follows = {
        (number, position)
        for number, answer in enumerate(pack.answers)
        for position in range(1, len(answer.answer))
        if ln_q((*answer.prompt, *answer.answer[: position - 1])).argmax() == answer.answer[position - 1]
    }
    assert len(found) == len(decode)
    assert found <= follows
    if lacks:
        assert 0.7 * len(follows) < len(found) < len(follows)  # an answer that ends early is gone on with
    else:
        assert found == follows
    assert {number for number, _ in found} == set(range(len(pack.answers)))


async def test_each_request_asks_for_what_is_needed_and_no_more(theirs: Theirs, pack: Pack) -> None:
    await scored(theirs, pack)
    prefills = [each for each in theirs.asked if "prompt_logprobs" in each]
    decodes = [each for each in theirs.asked if "logprobs" in each]
    assert len(prefills) + len(decodes) == len(theirs.asked)
    assert len(prefills) == len(pack.answers)
    assert {each["model"] for each in theirs.asked} == {NAME}
    assert {(each["prompt_logprobs"], each["max_tokens"]) for each in prefills} == {(TOP, 1)}
    assert {(each["logprobs"], each["temperature"]) for each in decodes} == {(TOP, 0)}
    assert all(each["return_tokens_as_token_ids"] for each in decodes)
    written = sum(each["max_tokens"] for each in decodes)
    assert written < 2 * sum(len(answer.answer) for answer in pack.answers)


async def check(theirs: Theirs, pack: Pack, key: str | None = None) -> int:
    async with PublicApi(theirs.url, NAME, key) as api:
        return await api.check(pack, PROMPTS)


async def test_a_server_that_can_be_measured_says_how_many_tokens_it_tells_of(expects: Theirs, pack: Pack) -> None:
    assert await check(expects, pack, KEY) == TOP
    assert expects.keys == {f"Bearer {KEY}"}
    chats = [each for each in expects.asked if "messages" in each]
    assert 1 <= len(chats) <= 3


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ("twenty", r"20 is greater than 5.*Bounds take the 20 likeliest"),
        ("prompt_logprobs", "gives no prompt_logprobs.*such as vLLM"),
        ("logprobs", "gives no logprobs of the tokens that it writes"),
        ("token ids", "does not know return_tokens_as_token_ids"),
        ("the tokenizer", r"makes \d+ tokens of the prompt .*another tokenizer or chat template"),
        ("the key", r"refuses the key \(401\)"),
        ("health", r"fails at .* as their-name \(500: .*out of memory"),
        ("its old place", r"fails at .* \(307"),
        ("an API", "otherwise than OpenAI's API"),
    ],
)
async def test_what_a_server_lacks_is_one_sentence(expects: Theirs, pack: Pack, lacks: str, why: str) -> None:
    expects.lacks = lacks
    with pytest.raises(ServerNotMeasured, match=why) as raised:
        await check(expects, pack, KEY)
    assert KEY not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert expects.url in str(raised.value)


async def test_who_has_no_key_is_told_how_to_give_one(expects: Theirs, pack: Pack) -> None:
    expects.lacks = "the key"
    with pytest.raises(ServerNotMeasured, match="--key-env"):
        await check(expects, pack)


async def test_nobody_there_is_one_sentence(pack: Pack) -> None:
    async with PublicApi("http://127.0.0.1:9/v1", NAME) as api:
        with pytest.raises(ServerNotMeasured, match="gives no answer to"):
            await api.check(pack, PROMPTS)


def test_an_address_is_an_apis_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_url(" https://host/v1/ ") == "https://host/v1"
    for wrong in (
        "host/v1",
        "ftp://host",
        "https://",
        "https://me:secret@host/v1",
        "https://host/v1?key=1",
        "http://h/é",
    ):
        with pytest.raises(ConfigError, match="--url") as raised:
            read_url(wrong)
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("THEIR_KEY", f" {KEY}\n")
    assert read_key("THEIR_KEY") == KEY
    monkeypatch.setenv("THEIR_KEY", "né")
    for name in ("THEIR_KEY", "NO_SUCH"):
        with pytest.raises(ConfigError, match=name) as raised:
            read_key(name)
        assert "né" not in str(raised.value)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(home=tmp_path)


async def certified(theirs: Theirs, config: Config, folder: Path | None, **asked: Any) -> Certificate:
    """Of their server as Turbo, from the file that it was written into."""
    api, tier = PublicApi(theirs.url, NAME), config.tiers[1]
    found = await certify_outside(config, tier, api, Asked(**asked), folder, Steps())
    report = write(found, tier, api, config)
    assert report.with_suffix(".parquet").read_bytes() == found.evidence
    read = Certificate.read(report.with_suffix(".json"))
    assert read == found.measured.certificate
    return read


async def test_the_certificate_says_what_is_known_and_what_is_not(
    expects: Theirs, config: Config, pack: Pack
) -> None:
    certificate = await certified(expects, config, pack.folder)
    said = certificate.predicate
    assert (said.method, said.findings.exact) == ("public api", False)
    assert (said.verified, said.hardware, said.versions.vllm, said.versions.torch) == (None, None, None, None)
    assert (said.tier, said.pack.digest, said.pack.prompts) == (f"{MODEL}-Turbo", pack.digest, len(PROMPTS))
    assert certificate.subject[0].name == f"{expects.url} {NAME}"
    assert all(found.noise_floor is None for found in said.findings.phases.values())
    assert said.findings.phases.keys() == said.budget.keys() == {"prefill", "decode"}
    # What decode does not tell of the given token is prefill's.
    judged = {(each.phase, each.metric) for each in said.findings.judgements}
    assert ("prefill", "perplexity_gap") in judged
    assert ("decode", "perplexity_gap") not in judged
    assert "perplexity_gap" not in said.budget["decode"]


async def test_a_server_that_has_no_time_is_asked_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, expects: Theirs, config: Config, pack: Pack
) -> None:
    monkeypatch.setattr(outside, "_WAITS_S", (0.0, 0.0))
    expects.busy = 2
    await certified(expects, config, pack.folder)
    expects.busy = 100
    with pytest.raises(ServerNotMeasured, match=r"has no time for .*429: slow down"):
        await certified(expects, config, pack.folder)


async def test_in_decode_nothing_is_judged_for_its_tokens_are_the_easier_ones(
    expects: Theirs, config: Config, pack: Pack
) -> None:
    found = (await certified(expects, config, pack.folder)).predicate
    assert {each.phase for each in found.findings.judgements} == {"prefill"}
    assert found.budget["decode"] == {}
    assert "decode" in found.findings.phases


async def test_the_subject_is_the_evidence(expects: Theirs, config: Config, pack: Pack) -> None:
    certificate = await certified(expects, config, pack.folder)
    port = expects.url.split(":")[2].removesuffix("/v1")
    files = {file.name for file in config.certificates.iterdir()}
    (evidence_file,) = (each for each in files if each.endswith(".parquet"))
    name = evidence_file.removesuffix(".parquet")
    assert name.startswith(f"{config.tiers[1].slug}-outside-127.0.0.1-{port}-")
    assert files == {f"{name}.parquet", f"{name}.json", f"{name}.html"}
    evidence = (config.certificates / f"{name}.parquet").read_bytes()
    assert hashlib.sha256(evidence).hexdigest() == certificate.subject[0].digest.sha256
    table = pq.read_table(io.BytesIO(evidence))
    prefill = [row for row in table.to_pylist() if row["phase"] == "prefill" and row["source"] != "written"]
    mean = certificate.predicate.findings.phases["prefill"].overall.kl.value
    assert np.mean([row["kl"] for row in prefill]) == pytest.approx(mean)
    assert {row["prompt_id"] for row in prefill} == {prompt.id for prompt in PROMPTS}
    about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert about == {"url": expects.url, "model": NAME, "likeliest": "20", "pack": pack.digest}


async def test_a_bound_over_the_budget_fails_and_one_below_it_shows_nothing(
    expects: Theirs, config: Config, pack: Pack
) -> None:
    for limit, verdict in ((0.001, Verdict.FAIL), (5.0, Verdict.INCONCLUSIVE)):
        (model,) = config.models
        tiers = {kind: tier.model_copy(update={"budget": Budget(kl=limit)}) for kind, tier in model.tiers.items()}
        limited = config.model_copy(update={"models": (model.model_copy(update={"tiers": tiers}),)})
        assert (await certified(expects, limited, pack.folder)).verdict is verdict


async def test_a_gateway_takes_it_for_no_tiers_own(expects: Theirs, config: Config, pack: Pack) -> None:
    certificate = await certified(expects, config, pack.folder)
    pool, standings = pool_of(config.home)
    kept = Certificates(config.certificates)
    assert kept.of(pool.tier) is None
    kept.save(pool.tier, certificate)
    standing = standings.of(pool)
    assert standing.verdict == "none"
    (reason,) = standing.reasons
    assert expects.url in reason
    assert "measured from outside" in reason


async def test_of_a_server_that_never_agrees_only_prefill_is_known_and_that_is_said(
    expects: Theirs, config: Config, pack: Pack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(globals(), "ln_q", cache(lambda before: log_softmax(-ln_p(before))))
    certificate = await certified(expects, config, pack.folder)
    found = certificate.predicate.findings
    assert found.phases.keys() == {"prefill"}
    assert "Nothing is known of decode" in caplog.text
    assert found.phases["prefill"].overall.kl.low > 1
    assert certificate.verdict is Verdict.FAIL


def as_named(config: Config, tokens: int, *, model: str = MODEL) -> Path:
    """Where `assay certify` would put the pack of the quick prompts."""
    mark = replace(Extent.of(Asked(quick=True), 2048), tokens=tokens).mark(24)
    return config.packs / f"{model.replace('/', '--')}-{'ab' * 6}-{mark}"


async def test_the_pack_is_the_newest_of_as_much_as_is_asked(expects: Theirs, config: Config) -> None:
    with pytest.raises(PackError, match=r"`assay certify Reference --quick` makes one.*--pack names one"):
        await certified(expects, config, None, quick=True)
    with pytest.raises(PackError, match=r"with \d+ prompts .* 128 tokens .*`assay certify Reference` makes one"):
        await certified(expects, config, None)
    older = make_pack(as_named(config, QUICK_TOKENS), length=6)
    newer = make_pack(Path(str(as_named(config, QUICK_TOKENS)).replace("ab", "cd")), length=8)
    make_pack(as_named(config, QUICK_TOKENS, model=f"{MODEL}-Else"), length=6)
    make_pack(as_named(config, 128), length=6)
    os.utime(older.folder / PACK_NAME, (1, 1))
    assert (await certified(expects, config, None, quick=True)).predicate.pack.digest == newer.digest


async def test_a_pack_is_of_the_tiers_model(expects: Theirs, config: Config, tmp_path: Path) -> None:
    other = make_pack(tmp_path / "other", length=3, model="Another")
    with pytest.raises(PackError, match=f"is of Another, and not of {MODEL}"):
        await certified(expects, config, other.folder)
    assert not expects.asked


async def test_of_other_prompts_the_tokenizer_is_not_checked_and_that_is_said(
    theirs: Theirs, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_pack(tmp_path / "other", length=4, prompts="d" * 64)
    await certified(theirs, config, other.folder)
    assert "the tokenizer is not checked" in caplog.text
    assert not any("messages" in each for each in theirs.asked)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    monkeypatch.setenv("THEIR_KEY", KEY)
    monkeypatch.setattr(logging.root, "handlers", [])  # the command sets its own, which end with the test
    return tmp_path


async def run(app: Any, *arguments: str | Path) -> Result:
    """The command, while their server answers."""
    return await asyncio.to_thread(CliRunner().invoke, app, [str(each) for each in arguments])


async def test_the_command_certifies_signs_and_shows(expects: Theirs, pack: Pack, home: Path) -> None:
    key = home / "assay.key"
    make_key(key)
    done = await run(
        cli.app, "certify", "Lite", "--url", expects.url, "--model", NAME, "--key-env", "THEIR_KEY",
        "--pack", pack.folder, "--sign", key, "--json",
    )  # fmt: skip
    assert done.exit_code in (1, 2), done.output
    assert expects.keys == {f"Bearer {KEY}"}
    assert KEY not in done.output
    (said,) = json.loads(done.stdout)
    (file,) = (home / "certificates").glob(f"{MODEL.lower()}-lite-outside-127.0.0.1-*-????????.json")
    assert json.loads(Certificate.read(file).canonical) == said
    written = [each for each in file.parent.iterdir() if each.is_file()]
    assert len(written) == 4
    assert not any(KEY.encode() in each.read_bytes() for each in written)
    signed = file.with_suffix(".dsse.json")
    public = key.with_name("assay.key.pub")
    assert verify(Envelope.parse(signed.read_bytes()), read_public_key(public)) == Certificate.read(file)

    shown = await run(certificate_cli.certificate_app, "verify", signed, "--key", public)
    assert shown.exit_code == 0, shown.output
    assert f"{expects.url} {NAME}" in shown.stdout
    assert "lower bounds" in shown.stdout
    assert said["subject"][0]["digest"]["sha256"] in shown.stdout
    told = json.loads((await run(certificate_cli.certificate_app, "verify", file, "--json")).stdout)
    assert told["checkpoint"] is None
    assert told["evidence"] == {"name": f"{expects.url} {NAME}", "digest": said["subject"][0]["digest"]["sha256"]}
    refused = await run(certificate_cli.certificate_app, "verify", file, "--checkpoint", home)
    assert refused.exit_code == 1
    assert "It speaks of no checkpoint" in refused.stdout

    page = home / "page.html"
    assert (await run(certificate_cli.certificate_app, "report", file, "--output", page)).exit_code == 0
    html = page.read_text()
    for sentence in (
        "What computes there is not known", "There is no noise floor by this method", "hardware not known",
        "vLLM not known", "≥ ", "what it answered then",
    ):  # fmt: skip
        assert sentence in html, sentence
    assert "checkpoint</dt>" not in html


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--model", "x"], "--model is of a server that someone else runs"),
        (["Turbo", "--key-env", "X"], "--key-env is of a server"),
        (["Turbo", "--pack", "x"], "--pack is of a server"),
        (["--url", "http://h/v1"], "--url is of one tier"),
        (["Turbo", "--url", "http://h/v1", "--self-test"], "--self-test takes engines of one's own"),
        (["Turbo", "--url", "http://h/v1", "--until-decided"], "--until-decided takes engines of one's own"),
        (["Turbo", "--url", "http://h/v1", "--pack", "x", "--quick"], "--quick and --pack both say"),
        (["Turbo", "--url", "h", "--pack", "x"], "--url is the base of an OpenAI API"),
        (["Turbo", "--url", "http://h/v1", "--key-env", "NO_SUCH"], "NO_SUCH, and no such variable is set"),
    ],
)
def test_options_that_do_not_go_together_are_a_sentence(home: Path, arguments: list[str], why: str) -> None:
    done = CliRunner().invoke(cli.app, ["certify", *arguments])
    assert isinstance(done.exception, AssayError), done.output
    assert isinstance(done.exception, ConfigError)
    assert why in str(done.exception)
