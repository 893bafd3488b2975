"""What a tier's certificate says of the engines that run now, and what becomes of its callers."""

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from aiohttp import web

from server.certificates import Certificates
from server.config import Config
from server.engines.pool import Pool
from server.engines.state import State
from server.metrics import Metrics
from server.standing import Standing, Standings
from tests.server.conftest import FakeEngineReplica, Gateway, fake_replica
from tests.server.test_keys import Clock
from tests.tiers.budgets import BUDGET
from tests.tiers.samples import make_certificate, make_findings, make_measurement
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.conformance.budget import Budget
from tiers.conformance.certificate import Certificate, Hardware, certificate_schema
from tiers.conformance.findings import Findings, Verdict
from tiers.errors import CertificateError
from tiers.hardware import device_class
from tiers.precision import FP8, NumberFormat
from tiers.tier import Tier
from tiers.verification import verify_precision

MODEL = "SmolLM2-135M-Instruct"
VLLM = "0.32.0"
Change = Callable[[FakeEngineReplica], object]


@cache
def findings(scale: float = 0.001) -> Findings:
    made = make_findings(*make_measurement(scale))
    assert made.verdict is (Verdict.PASS if scale < 0.01 else Verdict.FAIL)
    return made


def runs(replica: FakeEngineReplica, version: str = VLLM) -> None:
    """Be an engine that was read back and computes what is declared."""
    precision = replica.manifest.precision
    replica.engine_version = version
    replica.verified = verify_precision(precision, [reading(precision)], SMOL)


def says_it_has(replica: FakeEngineReplica, **fields: object) -> None:
    """Have something else read back than runs."""
    assert replica.verified is not None
    replica.verified = replica.verified.model_copy(update=fields)


def certificate_of(replica: FakeEngineReplica, found: Findings | None = None) -> Certificate:
    """Of the tier as it runs now."""
    found = found or findings()
    then = make_certificate(found, replica.tier.kind).predicate
    hardware = Hardware(device="cpu", device_class=device_class("cpu"), backend="cpu")
    now = then.model_copy(update={"verified": replica.verified, "hardware": hardware})
    return Certificate.of(replica.manifest, now)


def held_to(tier: Tier | None = None) -> Budget:
    """Every tier to what certificates here were judged by."""
    return Budget(**BUDGET["decode"])


def save(home: Path, replica: FakeEngineReplica, found: Findings | None = None) -> Certificate:
    """Put one where the gateway looks for it."""
    certificate = certificate_of(replica, found)
    Certificates(home / "certificates").save(replica.tier, certificate)
    return certificate


def pool_of(home: Path, replicas: int = 1) -> tuple[Pool, Standings]:
    """A tier whose engines run as declared, and how it stands."""
    config, metrics = Config(home=home), Metrics()
    made = [fake_replica(config, metrics, number + 1, replicas) for number in range(replicas)]
    for replica in made:
        replica.state = State.READY
        runs(replica)
    pool = Pool(config.tiers[0], made[0].manifest, 2048, made, metrics, max_num_seqs=1)
    return pool, Standings(Certificates(config.certificates), held_to)


def first_of(pool: Pool) -> FakeEngineReplica:
    """Its first replica."""
    first = pool.replicas[0]
    assert isinstance(first, FakeEngineReplica)
    return first


async def answers(request: web.Request) -> web.StreamResponse:
    return web.json_response({"id": "x"})


@pytest.fixture
async def certified(gateway: Gateway) -> Gateway:
    """A gateway whose tier was read back; there is no certificate yet."""
    gateway.handler = answers
    runs(gateway.replica)
    return gateway


async def get(gateway: Gateway, path: str) -> tuple[int, Any]:
    answer = await gateway.post(b"", path=path, method="GET")
    return answer.status, json.loads(answer.body)


async def says(gateway: Gateway) -> str:
    """The header of an answer."""
    answer = await gateway.post()
    assert answer.status == 200, answer.body
    return answer.headers["x-assay-certificate"]


async def told(gateway: Gateway) -> dict[str, Any] | None:
    """The summary in /v1/tiers, the same in both places."""
    _, listed = await get(gateway, "/v1/tiers")
    _, alone = await get(gateway, f"/v1/tiers/{MODEL}")
    (tier,) = listed["data"]
    assert tier["certificate"] == alone["certificate"]
    summary: dict[str, Any] | None = alone["certificate"]
    return summary


async def test_a_tier_that_passed_says_so_everywhere(certified: Gateway, tmp_path: Path) -> None:
    certificate = save(tmp_path, certified.replica)
    assert await says(certified) == "pass"
    summary = await told(certified)
    assert summary is not None
    assert (summary["verdict"], summary["reasons"], summary["exact"]) == ("pass", [], True)
    assert summary["digest"] == certificate.digest
    assert summary["issued"] == "2026-11-21T17:30:00Z"
    decode = certificate.predicate.findings.phases["decode"].overall.kl
    assert summary["kl"]["decode"] == {"value": decode.value, "low": decode.low, "high": decode.high}
    assert summary["kl"].keys() == {"prefill", "decode"}
    _, models = await get(certified, "/v1/models")
    assert {each["certificate"] for each in models["data"]} == {"pass"}
    _, model = await get(certified, f"/v1/models/{MODEL}")
    assert model["certificate"] == "pass"


async def test_without_a_certificate_there_is_none(certified: Gateway) -> None:
    assert await says(certified) == "none"
    assert await told(certified) is None
    _, model = await get(certified, f"/v1/models/{MODEL}")
    assert model["certificate"] == "none"


async def test_a_tier_over_its_budget_fails_and_says_by_what(certified: Gateway, tmp_path: Path) -> None:
    save(tmp_path, certified.replica, findings(0.05))
    assert await says(certified) == "fail"
    summary = await told(certified)
    assert summary is not None
    assert summary["verdict"] == "fail"
    assert any(each.startswith("kl in decode is 0.0") for each in summary["reasons"])
    assert all(", and the budget 0.0" in each for each in summary["reasons"])


async def test_what_could_not_be_judged_is_no_verdict(certified: Gateway, tmp_path: Path) -> None:
    save(tmp_path, certified.replica, findings().model_copy(update={"verdict": Verdict.INCONCLUSIVE}))
    assert await says(certified) == "none"
    summary = await told(certified)
    assert summary is not None
    assert (summary["verdict"], summary["reasons"]) == ("none", ["The measurement is inconclusive."])


async def test_the_whole_certificate_is_what_its_digest_is_of(certified: Gateway, tmp_path: Path) -> None:
    certificate = save(tmp_path, certified.replica)
    for name in (MODEL, f"{MODEL}-Reference"):
        answer = await certified.post(b"", path=f"/v1/tiers/{name}/certificate", method="GET")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert hashlib.sha256(answer.body).hexdigest() == certificate.digest
        assert Certificate.parse(answer.body) == certificate
        jsonschema.Draft202012Validator(certificate_schema()).validate(json.loads(answer.body))


async def test_where_there_is_no_certificate_it_is_not_found(certified: Gateway) -> None:
    answer = await certified.post(b"", path=f"/v1/tiers/{MODEL}/certificate", method="GET")
    error = answer.error
    assert (answer.status, error["code"], error["param"]) == (404, "no_certificate", "model")
    assert f"{MODEL}-Reference has no certificate" in error["message"]
    assert "`assay certify`" in error["message"]
    answer = await certified.post(b"", path="/v1/tiers/nothing/certificate", method="GET")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_the_figures_of_what_was_not_measured_are_no_numbers(certified: Gateway) -> None:
    assert certified.metric("assay_tier_certified") == 0
    exposed = certified.metrics.exposition().decode()
    tier = f'tier="{MODEL}-Reference"'
    assert f"assay_certificate_age_seconds{{{tier}}} NaN" in exposed
    assert f'assay_tier_kl{{phase="decode",{tier}}} NaN' in exposed


async def test_metrics_are_asked_at_each_scrape(certified: Gateway, tmp_path: Path, looks_at_once: None) -> None:
    certificate = save(tmp_path, certified.replica)
    assert certified.metric("assay_tier_certified") == 1
    for phase, found in certificate.predicate.findings.phases.items():
        labels = {"tier": f"{MODEL}-Reference", "phase": phase}
        value = certified.metrics.registry.get_sample_value("assay_tier_kl", labels)
        assert value == found.overall.kl.value
    age = time.time() - certificate.predicate.issued.timestamp()
    assert certified.metric("assay_certificate_age_seconds") == pytest.approx(age, abs=5)
    certified.replica.engine_version = "0.33.0"
    assert certified.metric("assay_tier_certified") == 0
    assert certified.metric("assay_certificate_age_seconds") == pytest.approx(age, abs=5)


async def test_every_path_says_it_and_an_error_too(certified: Gateway, tmp_path: Path) -> None:
    save(tmp_path, certified.replica)
    for path in ("/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert (await certified.post(path=path)).headers["x-assay-certificate"] == "pass", path
    certified.replica.state = State.RESTARTING
    answer = await certified.post()
    assert (answer.status, answer.headers["x-assay-certificate"]) == (503, "pass")


async def test_one_that_appears_while_the_gateway_runs_is_seen_within_a_second(
    certified: Gateway, tmp_path: Path
) -> None:
    assert await says(certified) == "none"
    save(tmp_path, certified.replica)
    began = time.monotonic()
    while await says(certified) != "pass":
        assert time.monotonic() - began < 1.5
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda replica: runs(replica, "0.33.0"), "The engine is vLLM 0.33.0, and 0.32.0 was measured."),
        (
            lambda replica: says_it_has(replica, head=NumberFormat(type="fp32")),
            "The precision is another: head in FP32, and BF16 was measured.",
        ),
        (
            lambda replica: says_it_has(replica, weights=FP8.weights),
            "The precision is another: weights in FP8 E4M3, a scale per channel, and BF16 was measured.",
        ),
        (
            lambda replica: says_it_has(replica, agrees=False, disagreements=("head: declared BF16",)),
            "The engine is not what its checkpoint declares: head: declared BF16.",
        ),
        (lambda replica: setattr(replica, "verified", None), "Nothing was read back from an engine yet."),
    ],
)
async def test_another_engine_voids_it_at_once(
    certified: Gateway, tmp_path: Path, change: Change, reason: str
) -> None:
    save(tmp_path, certified.replica)
    assert await says(certified) == "pass"
    change(certified.replica)
    assert await says(certified) == "none", "no second passes first"
    summary = await told(certified)
    assert summary is not None
    assert (summary["verdict"], summary["reasons"][0]) == ("none", reason)


async def test_an_engine_that_comes_back_the_same_has_passed_again(certified: Gateway, tmp_path: Path) -> None:
    save(tmp_path, certified.replica)
    certified.replica.verified = None
    assert await says(certified) == "none"
    runs(certified.replica)
    assert await says(certified) == "pass"


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("chat_template.jinja", "The chat template is another than was measured."),
        ("model.safetensors", "The weights are others: checkpoint "),
    ],
)
def test_other_files_void_it(tmp_path: Path, field: str, reason: str) -> None:
    pool, standings = pool_of(tmp_path)
    replica = first_of(pool)
    save(tmp_path, replica)
    assert standings.of(pool).has_passed
    entry = replica.manifest.files["tokenizer.json"].model_copy(update={"sha256": "5b" * 32})
    files = replica.manifest.files | {field: entry}
    replica.manifest = replica.manifest.model_copy(update={"files": files})
    standing = Standings(Certificates(tmp_path / "certificates"), held_to).of(pool)
    assert standing.verdict == "none"
    assert any(each.startswith(reason) for each in standing.reasons)


def test_another_budget_in_the_config_voids_it(tmp_path: Path) -> None:
    pool, _ = pool_of(tmp_path)
    save(tmp_path, first_of(pool))
    stricter = Standings(Certificates(tmp_path / "certificates"), lambda tier: Budget(kl=0.001))
    standing = stricter.of(pool)
    assert (standing.verdict, standing.holds) == ("none", False)
    assert standing.reasons == ("It was judged by another budget than the config has now.",)


def test_a_pass_by_a_handful_of_prompts_is_none(tmp_path: Path) -> None:
    pool, standings = pool_of(tmp_path)
    certificate = certificate_of(first_of(pool))
    few = certificate.predicate.pack.model_copy(update={"prompts": 6})
    predicate = certificate.predicate.model_copy(update={"pack": few})
    Certificates(tmp_path / "certificates").save(
        pool.tier, certificate.model_copy(update={"predicate": predicate})
    )
    standing = standings.of(pool)
    assert (standing.verdict, standing.holds) == ("none", False)
    assert standing.reasons[0].startswith("It passed by 6 prompts")


def test_other_hardware_voids_it(tmp_path: Path) -> None:
    pool, standings = pool_of(tmp_path)
    replica = first_of(pool)
    save(tmp_path, replica)
    assert replica.verified is not None
    replica.verified = replica.verified.model_copy(update={"device": "NVIDIA of another world"})
    (reason,) = standings.of(pool).reasons
    assert reason.startswith("The hardware is ")
    assert reason.endswith(f"and {device_class('cpu')} was measured.")


def test_a_checkpoint_that_cannot_be_asked_is_a_reason_and_no_error(tmp_path: Path) -> None:
    pool, standings = pool_of(tmp_path)
    replica = first_of(pool)
    save(tmp_path, replica)
    replica.manifest = replica.manifest.model_copy(update={"files": {}})
    (reason,) = standings.of(pool).reasons
    assert "no tokenizer.json or no chat template" in reason


def test_every_engine_that_answers_counts_and_one_that_was_refused_does_not(tmp_path: Path) -> None:
    pool, standings = pool_of(tmp_path, replicas=3)
    _, second, third = pool.replicas
    save(tmp_path, first_of(pool))
    assert standings.of(pool).has_passed
    third.verified = None
    assert standings.of(pool).has_passed, "it starts again"
    second.engine_version = "0.33.0"
    assert standings.of(pool).reasons == ("The engine is vLLM 0.33.0, and 0.32.0 was measured.",)
    second.state = State.REFUSED
    assert standings.of(pool).has_passed


def test_it_is_made_anew_only_when_something_changed(tmp_path: Path) -> None:
    pool, standings = pool_of(tmp_path)
    replica = first_of(pool)
    certificate = save(tmp_path, replica)
    first = standings.of(pool)
    assert first == Standing("pass", (), certificate, holds=True)
    assert (first.short_digest, first.issued) == (certificate.short_digest, certificate.predicate.issued)
    assert standings.of(pool) is first
    runs(replica)
    assert standings.of(pool) is first, "an engine that says the same again"
    replica.engine_version = "0.33.0"
    assert standings.of(pool) is not first


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def followed(tmp_path: Path, clock: Clock) -> Certificates:
    return Certificates(tmp_path / "certificates", clock)


@pytest.fixture
def replica(tmp_path: Path) -> FakeEngineReplica:
    return first_of(pool_of(tmp_path)[0])


def test_what_is_saved_is_found_again(followed: Certificates, replica: FakeEngineReplica) -> None:
    certificate = certificate_of(replica)
    path = followed.save(replica.tier, certificate)
    assert path == followed.file(replica.tier) == followed.folder / "smollm2-135m-instruct-reference.json"
    assert followed.of(replica.tier) == Certificate.read(path) == certificate
    assert [each.name for each in followed.folder.iterdir()] == [path.name], "no draft is left"


def test_a_save_that_fails_leaves_the_last_one(
    followed: Certificates, replica: FakeEngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = followed.save(replica.tier, certificate_of(replica))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match=r"cannot be written \(No space left on device\)"):
        followed.save(replica.tier, certificate_of(replica, findings(0.05)))
    assert path.read_bytes() == before
    assert [each.name for each in followed.folder.iterdir()] == [path.name]


def test_it_is_looked_at_once_a_second_and_read_when_it_changed(
    followed: Certificates,
    replica: FakeEngineReplica,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[bytes] = []
    parse = Certificate.parse

    def counted(text: bytes) -> Certificate:
        reads.append(text)
        return parse(text)

    monkeypatch.setattr(Certificate, "parse", counted)
    assert followed.of(replica.tier) is None
    followed.save(replica.tier, certificate_of(replica))
    assert followed.of(replica.tier) is None
    clock.now += 1
    first = followed.of(replica.tier)
    assert first is not None
    clock.now += 1
    assert followed.of(replica.tier) is first
    assert len(reads) == 1
    followed.save(replica.tier, certificate_of(replica, findings(0.05)))
    clock.now += 1
    second = followed.of(replica.tier)
    assert second is not None
    assert second.verdict is Verdict.FAIL
    followed.file(replica.tier).unlink()
    clock.now += 1
    assert followed.of(replica.tier) is None
    assert len(reads) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"_type":1}', b"[" * 100_000])
def test_what_is_no_certificate_counts_as_none_and_is_logged_once(
    followed: Certificates,
    replica: FakeEngineReplica,
    clock: Clock,
    damage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = followed.save(replica.tier, certificate_of(replica))
    assert followed.of(replica.tier) is not None
    path.write_bytes(damage)
    for _ in range(3):
        clock.now += 1
        assert followed.of(replica.tier) is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(path) in record.message
    assert "The tier counts as one without a certificate." in record.message
    followed.save(replica.tier, certificate_of(replica))
    clock.now += 1
    assert followed.of(replica.tier) is not None


def test_a_folder_in_its_place_is_no_error_of_callers(
    followed: Certificates, replica: FakeEngineReplica, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    followed.file(replica.tier).mkdir(parents=True)
    for _ in range(3):
        assert followed.of(replica.tier) is None
        clock.now += 1
    (record,) = caplog.records
    assert "It cannot be read (Is a directory)." in record.message


def test_one_that_cannot_be_read_for_a_while_is_read_later(
    followed: Certificates,
    replica: FakeEngineReplica,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    followed.save(replica.tier, certificate_of(replica))

    def busy(path: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", busy)
        assert followed.of(replica.tier) is None
    clock.now += 1
    assert followed.of(replica.tier) is not None
