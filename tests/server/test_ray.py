"""Ray as the gateway sees it, without a cluster; tests/engines/test_8_ray.py has one."""

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from server.config import Config
from server.config_file import load_config
from server.engines.failures import EngineNotStarted
from server.launch.cluster import HEAD_LOST, Cluster, RayConfig
from server.launch.process import free_port, tethered
from server.launch.ray import RayLaunch
from tests.server.test_launch import WAITS, none_remains
from tiers.bundles import Bundles
from tiers.errors import ConfigError
from tiers.tier import Tier


async def test_without_the_package_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'assay\[ray\]'"):
        await Cluster.join(RayConfig(), "cpu")


async def test_where_nobody_listens_it_is_one_sentence_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"no Ray cluster to join at ray.address '{address}'"):
        await Cluster.join(RayConfig(address=address), "cpu")
    assert "ray" not in sys.modules  # which takes a second to load


def test_an_address_of_rays_client_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ray: {address: 'ray://head:10001'}")
    with pytest.raises(ConfigError, match=r"ray\.address: .*ray start --address"):
        load_config(tmp_path / "c.yaml")


def test_what_is_tethered_twice_ends_with_the_outer_tether(tmp_path: Path) -> None:
    """Ray ends an actor's children by SIGKILL, and leaves to themselves what those have started."""
    log = tmp_path / "log"
    command = tethered(tethered([sys.executable, "-c", WAITS], orphaned_s=0))
    with log.open("wb") as output:
        outer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
    while not log.read_text().startswith("up"):
        assert outer.poll() is None, "it has ended by itself"
    children = [psutil.Process(int(pid)) for pid in log.read_text().split()[1:]]
    outer.kill()
    outer.wait()
    assert none_remains(children)


class SlowHead:
    """A cluster whose head takes its time, or errs; as much of Ray as a launch asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.may_answer = threading.Event()
        self.exceptions = SimpleNamespace(RayError=RayError)
        ways = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda *_: None)
        groups = SimpleNamespace(placement_group=self._set_aside, remove_placement_group=self._give_back)
        for name, module in ("placement_group", groups), ("scheduling_strategies", ways):
            patch.setitem(sys.modules, f"ray.util.{name}", module)
        for name in ("ray", "ray.util"):
            patch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))

    def _set_aside(self, bundles: object, strategy: str) -> object:
        self.calls.append("asked")
        if not self.may_answer.wait(1):
            self.calls.append("nobody else was answered meanwhile")
        if self.error:
            raise self.error
        return SimpleNamespace(wait=lambda timeout_s: True)

    def _give_back(self, group: object) -> None:
        self.calls.append("given back")

    def remote(self, actor: object) -> object:
        raise RayError("the head is gone")

    def launch(self, tier: Tier) -> RayLaunch:
        cluster = Cluster(self, RayConfig(), "cpu", "127.0.0.1", ())  # type: ignore[arg-type]
        return RayLaunch(cluster, Bundles(({"CPU": 1},), "PACK"), "cpu")


async def test_a_head_that_is_lost_keeps_nobody_from_stopping(
    head: SlowHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the end of the process: no thread of the loop's own is held up."""
    monkeypatch.setattr("server.launch.ray.GIVE_BACK_S", 0.02)
    executor = ThreadPoolExecutor()
    asyncio.get_running_loop().set_default_executor(executor)
    tier = Config(home=tmp_path).tiers[0]
    beginning = asyncio.create_task(head.launch(tier).begin(tier, tmp_path / "log"))
    while not head.calls:
        await asyncio.sleep(0.001)
    beginning.cancel()
    await asyncio.wait({beginning}, timeout=0.5)
    assert beginning.cancelled()
    assert not executor._threads
    head.may_answer.set()
    while head.calls != ["asked", "given back"]:
        await asyncio.sleep(0.001)


async def test_only_the_gateway_outlives_its_head_and_not_what_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("server.launch.cluster._join", lambda *_: seen.append(os.environ.get(HEAD_LOST)))
    monkeypatch.delenv(HEAD_LOST, raising=False)
    await Cluster.join(RayConfig(), "cpu")
    assert int(seen[0] or 0) > 30 * 24 * 3600
    assert HEAD_LOST not in os.environ
    monkeypatch.setenv(HEAD_LOST, "7")
    await Cluster.join(RayConfig(), "cpu")
    assert (seen[1], os.environ[HEAD_LOST]) == ("7", "7"), "an operator has the last word"


class RayError(Exception):
    """Ray's own."""


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> SlowHead:
    return SlowHead(monkeypatch)


async def test_while_rays_head_takes_its_time_others_are_answered(head: SlowHead, tmp_path: Path) -> None:
    tier = Config(home=tmp_path).tiers[0]
    beginning = asyncio.create_task(head.launch(tier).begin(tier, tmp_path / "log"))
    while not head.calls:
        await asyncio.sleep(0.001)
    assert not beginning.done(), "here one is"
    beginning.cancel()
    await asyncio.sleep(0.01)
    head.may_answer.set()
    await asyncio.gather(beginning, return_exceptions=True)
    assert head.calls == ["asked", "given back"], "what was set aside for one who has left"


async def test_an_error_of_rays_is_an_engine_that_was_not_started(head: SlowHead, tmp_path: Path) -> None:
    tier = Config(home=tmp_path).tiers[0]
    head.may_answer.set()
    with pytest.raises(EngineNotStarted, match="the head is gone"):
        await head.launch(tier).begin(tier, tmp_path / "log")
    assert head.calls == ["asked", "given back"]
    head.error = RayError("no room is given")
    with pytest.raises(EngineNotStarted, match="no room is given"):
        await head.launch(tier).begin(tier, tmp_path / "log")
