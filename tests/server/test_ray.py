"""Ray as the gateway sees it, without a cluster; tests/engines/test_8_ray.py has one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server.config_file import load_config
from server.launch.cluster import Cluster, RayConfig
from server.launch.process import free_port, tethered
from tests.server.test_launch import WAITS, none_remains
from tiers.errors import ConfigError


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
