"""What a replica asks of a Ray cluster, and what is refused before Ray is asked."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.tiers.test_engine import option
from tests.tiers.test_engine import tier as embedded
from tests.tiers.test_placement import llama
from tiers.bundles import Bundles, on_cluster
from tiers.engine import engine_command
from tiers.errors import ConfigError, PlacementError
from tiers.hardware import GIB, Machine, find_card
from tiers.placement import together
from tiers.tier import Resources

H100S = Machine.of(find_card("H100"))
SMALL, LARGE = Machine("cpu", ram=4 * GIB), Machine("cpu", ram=64 * GIB)


def asked(nodes: Sequence[Machine], size: str, **resources: object) -> Bundles:
    """By the reference of a Llama on these nodes, which must have room for it."""
    (tier, *_) = llama(size, launch="ray", **resources)
    plan = on_cluster(tier, nodes)
    assert plan.problem is None
    return Bundles.of(plan, nodes)


def test_an_engine_on_one_node_is_one_bundle_that_ray_cannot_tear_apart() -> None:
    bundles = asked([H100S], "70B", gpus=(0, 1, 2, 3))
    assert bundles == Bundles(({"CPU": 1, "GPU": 4},), "STRICT_PACK")
    assert not bundles.over_nodes


def test_an_engine_on_cpus_takes_its_memory_so_that_a_node_is_not_filled_twice_over() -> None:
    tier = replace(embedded(launch="ray", cpus=4, kv_cache_gib=2), checkpoint=Path("/nowhere"))
    plan = on_cluster(tier, [SMALL, LARGE])
    (bundle,) = Bundles.of(plan, [SMALL, LARGE]).each
    assert bundle["CPU"] == 4
    assert bundle["memory"] == plan.per_device.fixed + 2 * GIB
    assert plan.room_bytes == LARGE.ram


def test_405b_in_bf16_is_a_bundle_a_gpu_over_two_nodes() -> None:
    """As vLLM's executor wants them; the first one also has a CPU, for the process that answers."""
    bundles = asked([H100S, H100S], "405B", gpus=tuple(range(16)), pipeline_parallel=2)
    assert bundles.over_nodes
    assert bundles.strategy == "PACK"
    assert [bundle["GPU"] for bundle in bundles.each] == [1] * 16
    assert bundles.each[0]["CPU"] == 1
    assert str(bundles) == "16 GPUs and 1 CPU"


def test_a_layer_is_not_spread_over_nodes() -> None:
    with pytest.raises(PlacementError, match="no node has more than 8: cut the layers into stages"):
        asked([H100S, H100S], "405B", gpus=tuple(range(16)))


def test_too_few_nodes_are_counted() -> None:
    with pytest.raises(PlacementError, match="2 stages of 8 GPUs take 2 nodes of 8, and these 1 have room for 1"):
        asked([H100S], "405B", gpus=tuple(range(16)), pipeline_parallel=2)


def test_over_nodes_is_for_gpus_only() -> None:
    tier = embedded(launch="ray", gpus=(0, 1), pipeline_parallel=2)
    with pytest.raises(PlacementError, match="vLLM's Ray executor places its workers by GPU"):
        on_cluster(tier, [LARGE, LARGE])
    with pytest.raises(ConfigError, match="vLLM's Ray executor places its workers by GPU"):
        engine_command(tier, "cpu", 1, "k", over_nodes=True)


def test_what_fits_no_node_says_so() -> None:
    (tier, *_) = llama("70B", launch="ray", gpus=(0,))
    plan = on_cluster(tier, [H100S, H100S])
    assert plan.problem is not None
    assert "its GPU needs" in plan.problem


def test_engines_over_nodes_are_started_by_vllms_ray_executor() -> None:
    (tier, *_) = llama("405B", launch="ray", gpus=tuple(range(16)), pipeline_parallel=2)
    command = engine_command(tier, "cuda", 1, "k", host="10.0.0.7", over_nodes=True)
    assert option(command, "distributed-executor-backend") == "ray"
    assert option(command, "tensor-parallel-size") == "8"
    assert option(command, "pipeline-parallel-size") == "2"
    assert option(command, "host") == "10.0.0.7"
    alone = engine_command(tier, "cuda", 1, "k")
    assert not any(argument.startswith("--distributed-executor-backend") for argument in alone.arguments)


def test_every_replica_has_all_the_gpus_that_are_written() -> None:
    (tier, *_) = llama("70B", launch="ray", gpus=(0, 1), replicas=3)
    assert [engine.resources.tensor_parallel for engine in (tier, *tier.engines())] == [2] * 4
    assert [engine.resources.replicas for engine in tier.engines()] == [1] * 3


def test_tiers_on_ray_take_nothing_of_this_machine() -> None:
    here, elsewhere = embedded(kv_cache_gib=1), embedded(launch="ray", kv_cache_gib=100)
    elsewhere = replace(elsewhere, model="Other")
    machine = Machine("cpu", ram=8 * GIB)
    assert together((here, elsewhere), machine).problems != ()
    plan = together((elsewhere, here), machine, [Machine("cpu", ram=200 * GIB)])
    assert plan.problems == ()
    assert [each.name for each in plan.tiers] == [elsewhere.name, here.name]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_replicas": 3}, "max_replicas is for launch: ray"),
        ({"launch": "ray", "replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than replicas 3"),
        ({"launch": "ray", "idle": "sleep"}, "not for launch: ray"),
        ({"launch": "ray", "gpus": (0, 1, 2), "pipeline_parallel": 2}, "3 gpus cannot be cut into 2"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Resources.model_validate(fields)


def test_the_sum_is_for_people() -> None:
    bundles = Bundles(({"CPU": 2, "memory": math.ceil(3.1 * GIB)},), "STRICT_PACK")
    assert str(bundles) == "2 CPUs and 3.1 GiB of memory"
