"""What does not fit is refused before it is started, with what would."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.config import Config
from server.config_file import load_config
from server.model_config import ModelConfig
from tiers.catalog import find_member
from tiers.errors import PlacementError, SourceError
from tiers.hardware import Gpu, Machine, find_card
from tiers.manifest import Manifest, describe_files
from tiers.placement import alone, place, together
from tiers.plan import TierPlan
from tiers.recipe import find_recipe
from tiers.source import Source
from tiers.tier import Resources, Tier

LLAMA = Path(__file__).parents[2] / "deploy" / "llama-3.1-8b.yaml"
GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
CPU = Machine("cpu", ram=16 * GIB)
TWO_GPUS = Machine("cuda", gpus=(Gpu("small", 24 * GIB, (8, 9)), Gpu("large", 80 * GIB, (9, 0))))


def three(folder: Path, *resources: Mapping[str, object]) -> tuple[Tier, ...]:
    """The embedded model's tiers, with checkpoints where there are none."""
    each = resources or ({}, {}, {})
    return tuple(
        replace(tier, checkpoint=folder / tier.recipe.name, resources=Resources.model_validate(own))
        for tier, own in zip(Config().tiers, each, strict=True)
    )


def llama(size: str, **resources: object) -> tuple[Tier, ...]:
    """The three tiers of a model of the catalog, of which nothing is here."""
    member = find_member(f"Llama-3.1-{size}-Instruct")
    tiers = Config(home=Path("/nowhere"), models=(ModelConfig(name=member.name, source=member.ids[0]),)).tiers
    return tuple(replace(tier, resources=Resources.model_validate(resources)) for tier in tiers)


def checkpoint(tier: Tier, *, size: int = 0, config: Mapping[str, Any] = CONFIG) -> Tier:
    """The tier with a finished checkpoint of that size, as far as placement looks."""
    tier.checkpoint.mkdir(parents=True)
    (tier.checkpoint / "config.json").write_text(json.dumps(config))
    Manifest(
        model=tier.model,
        recipe=tier.recipe.name,
        recipe_text="",
        precision=tier.recipe.precision,
        source=tier.source,
        provenance="made by a test",
        seed=0,
        bits_per_weight=16,
        versions={},
        created=datetime.now(UTC),
        files=describe_files(tier.checkpoint),
    ).write(tier.checkpoint)
    with (tier.checkpoint / "model.safetensors").open("wb") as file:
        file.truncate(size)  # sparse
    return tier


def planned(size: str, card: str, count: int = 8, nodes: int = 1) -> dict[str, TierPlan]:
    plan = alone(llama(size), Machine.of(find_card(card), count, nodes))
    return {str(tier.tier.kind): tier for tier in plan.tiers}


@pytest.mark.parametrize("card", ["H100", "H200"])
@pytest.mark.parametrize(
    ("size", "kv_kib", "reference", "turbo", "lite"),
    [("8B", 128, 16.1, 9.1, 5.7), ("70B", 320, 141.1, 72.7, 39.5), ("405B", 504, 811.7, 410.1, 215.5)],
)
def test_llamas_figures_are_the_known_ones(
    size: str, card: str, kv_kib: int, reference: float, turbo: float, lite: float
) -> None:
    plans = planned(size, card)
    assert [round(plan.weights_bytes / 1e9, 1) for plan in plans.values()] == [reference, turbo, lite]
    assert {plan.kv_bytes_per_token for plan in plans.values()} == {kv_kib * 1024}
    assert {plan.kv_bytes_full_context for plan in plans.values()} == {kv_kib * 1024 * 131072}


@pytest.mark.parametrize(
    ("size", "card", "gpus", "requests"),
    [
        ("8B", "H100", [1, 1, 1], [3, 3, 3]),
        ("8B", "H200", [1, 1, 1], [6, 7, 7]),
        ("70B", "H100", [4, 2, 2], [3, 1, 2]),
        ("70B", "H200", [2, 1, 1], [2, 1, 2]),
        ("405B", "H200", [8, 4, 4], [3, 1, 4]),
    ],
)
def test_each_tier_gets_the_fewest_gpus_that_hold_a_full_length_request(
    size: str, card: str, gpus: list[int], requests: list[int]
) -> None:
    plans = planned(size, card).values()
    assert [plan.gpus for plan in plans] == gpus
    assert [plan.tensor_parallel for plan in plans] == gpus
    assert [plan.concurrent_requests for plan in plans] == requests


def test_405b_in_bf16_on_eight_80_gb_cards_is_refused_with_what_would_do() -> None:
    plans = planned("405B", "H100")
    assert plans["Reference"].concurrent_requests == 0
    assert plans["Reference"].problem == (
        "each of its 8 GPUs needs 108.8 GiB (94.5 weights, 7.9 KV cache for 131072 tokens, 6.5 activations and "
        "the engine's own) and its share is 71.7 GiB."
    )
    assert plans["Reference"].remedies == (
        "16 × H100 over 2 nodes (tensor 8 × pipeline 2)",
        "8 × H200 (tensor 8)",
        "the Turbo tier here (tensor 8)",
    )
    assert (plans["Turbo"].gpus, plans["Turbo"].concurrent_requests) == (8, 2)
    assert (plans["Lite"].gpus, plans["Lite"].problem) == (8, None)


def test_405b_in_bf16_goes_over_two_nodes_by_pipeline() -> None:
    plan = planned("405B", "H100", nodes=2)["Reference"]
    assert (plan.gpus, plan.tensor_parallel, plan.pipeline_parallel) == (16, 8, 2)
    assert plan.problem is None
    assert plan.per_device.weights == pytest.approx(811.7e9 / 16, rel=0.01)


def test_a_shorter_context_is_offered_where_only_the_cache_is_too_small() -> None:
    plan = planned("8B", "RTX-4090", count=1)["Reference"]
    (context,) = [remedy for remedy in plan.remedies if remedy.startswith("a context of")]
    length = int(context.split()[3])
    card = Machine.of(find_card("RTX-4090"), 1)
    fits = alone((replace(plan.tier, context_length=length),), card)
    assert fits.problems == ()
    assert fits.tiers[0].concurrent_requests == 1
    assert alone((replace(plan.tier, context_length=length + 1024),), card).problems


def test_every_remedy_in_hardware_is_one() -> None:
    plan = planned("70B", "L40S", count=2)["Reference"]
    assert plan.remedies[:2] == ("8 × L40S (tensor 8)", "2 × H200 (tensor 2)")
    assert planned("70B", "L40S")["Reference"].problem is None
    assert planned("70B", "H200", count=2)["Reference"].problem is None
    assert planned("70B", "H100-NVL", count=2)["Reference"].problem, "a smaller one would not do"


def test_fp8_is_refused_on_cards_without_fp8_units() -> None:
    plans = planned("8B", "A100-80GB")
    assert plans["Reference"].problem is None
    assert "fp8-dynamic is not for A100-80GB" in str(plans["Turbo"].problem)
    assert "needs a GPU of compute capability 8.9, and this one has 8.0" in str(plans["Turbo"].problem)
    assert plans["Lite"].problem is None


@pytest.mark.parametrize(("card", "fits"), [("H100", True), ("A100-40GB", False), ("L4", False)])
def test_the_llama_config_fits_one_80_gb_card_and_no_smaller(card: str, fits: bool) -> None:
    plan = together(load_config(LLAMA).tiers, Machine.of(find_card(card), 1))
    assert (plan.problems == ()) is fits
    if fits:
        assert [tier.concurrent_requests for tier in plan.tiers] == [3, 2, 2]


def test_three_tiers_may_have_a_gpu_each() -> None:
    tiers = tuple(replace(tier, resources=Resources(gpus=(gpu,))) for gpu, tier in enumerate(llama("8B")))
    plans = place(tiers, Machine.of(find_card("H100"), 3))
    assert [plan.tier.resources.gpu_memory for plan in plans] == [0.9] * 3
    assert [plan.concurrent_requests for plan in plans] == [3, 3, 3]


def test_a_configured_pipeline_halves_what_each_gpu_holds() -> None:
    tiers = llama("70B", gpus=(0, 1, 2, 3), pipeline_parallel=2, gpu_memory=0.3)
    (plan, *_) = together(tiers, Machine.of(find_card("H200"), 4)).tiers
    assert (plan.tensor_parallel, plan.pipeline_parallel) == (2, 2)
    assert plan.per_device.weights == pytest.approx(141.1e9 / 4, rel=0.01)
    assert plan.per_device.kv_per_token == 320 * 1024 // 4


def test_too_little_ram_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"3 engines need 30\d\d\.\d GiB of memory and 16\.0 GiB are free"):
        place(three(tmp_path, *[{"kv_cache_gib": 1000}] * 3), CPU)


def test_on_the_cpu_three_small_engines_share_the_memory(tmp_path: Path) -> None:
    plans = place(three(tmp_path), CPU)
    assert [plan.gpus for plan in plans] == [0, 0, 0]
    assert [plan.concurrent_requests for plan in plans] == [5, 5, 5], "1 GiB of KV cache each, 22.5 KiB a token"
    turbo = plans[1]
    assert turbo.per_device.weights > 4 * 106e6, "FP8 weights are held once more, in FP32"


def test_replicas_on_the_cpu_take_the_memory_of_all(tmp_path: Path) -> None:
    (one,) = place(three(tmp_path)[:1], CPU)
    tier = replace(three(tmp_path)[0], resources=Resources(replicas=2))
    (two,) = place((tier,), CPU)
    assert (one.replicas, one.concurrent_requests) == (1, 5)
    assert (two.replicas, two.concurrent_requests) == (2, 10)
    assert two.per_device == one.per_device
    assert (one.max_num_seqs, two.max_num_seqs) == (128, 128), "of one engine: vLLM's default on CPUs"
    each = one.per_device.fixed + one.kv_cache_bytes
    with pytest.raises(PlacementError, match=r"2 engines need .* serve fewer tiers or replicas"):
        place((tier,), Machine("cpu", ram=2 * each - 1))
    assert place((tier,), Machine("cpu", ram=2 * each))


def test_replicas_are_dealt_the_gpus_and_each_has_a_degree_of_its_own() -> None:
    tiers = llama("70B", gpus=(0, 1, 2, 3), replicas=2)
    plan = together(tiers[1:2], Machine.of(find_card("H100"), 4))
    (turbo,) = plan.tiers
    assert plan.problems == ()
    assert (turbo.replicas, turbo.gpus, turbo.tensor_parallel) == (2, 2, 2)
    assert turbo.concurrent_requests == 2 * planned("70B", "H100", 2)["Turbo"].concurrent_requests
    assert turbo.max_num_seqs == 1024
    assert [engine.resources.gpus for engine in turbo.tier.engines()] == [(0, 1), (2, 3)]
    assert {engine.resources.gpu_memory for engine in turbo.tier.engines()} == {0.9}


def test_a_tier_that_does_not_fit_twice_is_told_what_one_engine_would_need() -> None:
    tiers = llama("70B", gpus=(0, 1), replicas=2)
    (reference, *_) = together(tiers[:1], Machine.of(find_card("H100"), 2)).tiers
    assert "its GPU needs" in str(reference.problem)
    assert reference.remedies[0] == "4 × H100 (tensor 4)"
    assert [plan.replicas for plan in alone(tiers, Machine.of(find_card("H100"), 8)).tiers] == [1, 1, 1]


def test_replicas_without_gpus_of_their_own_are_refused_on_gpus() -> None:
    tiers = llama("8B", replicas=2)
    with pytest.raises(PlacementError, match="2 replicas need as many gpus or a multiple, and gpus names 1"):
        together(tiers[:1], Machine.of(find_card("H100"), 2))


def test_sleeping_replicas_share_each_gpu_with_the_others_there() -> None:
    tiers = llama("8B", gpus=(0, 1), replicas=2, idle="sleep")
    plans = place(tiers, Machine.of(find_card("H100"), 2))
    assert [plan.tier.resources.gpu_memory for plan in plans] == [0.9] * 3


def test_one_model_alone_on_the_cpu_takes_all_memory_for_its_cache() -> None:
    plan = alone(llama("8B"), Machine("cpu", ram=40 * GIB))
    reference, turbo, lite = plan.tiers
    assert (reference.concurrent_requests, lite.concurrent_requests) == (1, 2)
    assert "it needs 52.9 GiB" in str(turbo.problem)
    assert turbo.remedies == ("the Lite tier here", "a context of 24576 tokens")


def test_weights_that_have_moved_are_not_placements_to_find(tmp_path: Path) -> None:
    """The check of the checkpoint names what is missing; here it counts nothing."""
    tier = checkpoint(three(tmp_path)[0])
    (tier.checkpoint / "model.safetensors").unlink()
    (tier.checkpoint / "model.safetensors").symlink_to(tmp_path / "gone" / "model.safetensors")
    assert place((tier,), CPU)


def test_tiers_on_one_gpu_share_what_is_left(tmp_path: Path) -> None:
    plans = place(three(tmp_path, {"gpu_memory": 0.5}, {}, {}), TWO_GPUS)
    assert [plan.tier.resources.gpu_memory for plan in plans] == [0.5, 0.2, 0.2]


def test_a_tier_on_two_gpus_takes_the_smaller_share() -> None:
    tiers = tuple(
        replace(tier, resources=Resources(gpus=gpus))
        for tier, gpus in zip(llama("8B"), ((0, 1), (0,), (0,)), strict=True)
    )
    plan = together(tiers, TWO_GPUS)
    assert [each.tier.resources.gpu_memory for each in plan.tiers] == [0.3, 0.3, 0.3]
    assert plan.tiers[0].room_bytes == int(0.3 * 24 * GIB), "the smaller GPU counts"


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        (({"gpus": [2]}, {}, {}), "GPU 2 of .*-Reference does not exist; this machine has 2"),
        (({"gpu_memory": 0.6}, {"gpu_memory": 0.5}, {"gpus": [1]}), r"GPU 0.*adds up to 1\.10"),
        (({"gpu_memory": 0.9}, {}, {"gpus": [1]}), "can have together"),
        (({"gpus": [0, 1]}, {}, {}), "9 attention heads cannot be dealt out to 2 GPUs"),
    ],
)
def test_what_does_not_fit_a_gpu_is_refused(
    tmp_path: Path, resources: tuple[dict[str, object], ...], sentence: str
) -> None:
    with pytest.raises(PlacementError, match=sentence):
        place(three(tmp_path, *resources), TWO_GPUS)


def test_groups_are_not_cut_by_tensor_parallelism(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 192}
    recipe = find_recipe("w4a16-gptq")
    tier = replace(three(tmp_path)[2], recipe=recipe, source=Source.parse("./m"), model="mine")
    tier = checkpoint(replace(tier, resources=Resources(gpus=(0, 1))), config=CONFIG | sizes)
    with pytest.raises(
        PlacementError, match=r"groups of 64 do not divide a part of .*down_proj on each of 2 GPUs"
    ):
        place((tier,), TWO_GPUS)


def test_a_context_beyond_the_model_or_its_cache_is_refused(tmp_path: Path) -> None:
    tier = three(tmp_path)[0]
    assert place((tier,), CPU)[0].context_length == 8192
    with pytest.raises(PlacementError, match="beyond the model's own 8192"):
        place((replace(tier, context_length=9000),), CPU)
    with pytest.raises(PlacementError, match=r"one request of 8192 tokens needs 0\.2 GiB .* kv_cache_gib is 0\.1"):
        place((replace(tier, resources=Resources(kv_cache_gib=0.1)),), CPU)


def test_a_finished_checkpoint_is_counted_as_it_lies_there(tmp_path: Path) -> None:
    tier = checkpoint(three(tmp_path)[0], size=16 * GIB)
    (plan,) = place((replace(tier, resources=Resources(gpus=(1,), gpu_memory=0.7)),), TWO_GPUS)
    assert plan.weights_bytes == 16 * GIB
    with pytest.raises(PlacementError, match=r"its GPU needs 17\.9 GiB .* its share is 16\.8 GiB"):
        place((replace(tier, resources=Resources(gpus=(0,), gpu_memory=0.7)),), TWO_GPUS)


def test_a_checkpoint_of_another_source_counts_nothing(tmp_path: Path) -> None:
    """It will be built again; what it was must not stop that."""
    tier = checkpoint(three(tmp_path)[0], size=16 * GIB)
    now = replace(tier, source=Source(kind="hub", id="meta-llama/Llama-3.1-8B"))
    (plan,) = place((replace(now, resources=Resources(gpus=(1,))),), TWO_GPUS)
    assert plan.weights_bytes == 16_060_522_496


def test_a_model_that_nobody_has_seen_yet_is_not_refused(tmp_path: Path) -> None:
    tier = replace(three(tmp_path)[0], model="mine", source=Source(kind="hub", id="me/mine"))
    (plan,) = place((tier,), CPU)
    assert not plan.is_known
    assert plan.context_length == 0


def test_a_folder_is_planned_from_its_config_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tier = replace(three(tmp_path)[0], model="mine", source=Source.parse(str(tmp_path)))
    assert place((tier,), CPU)[0].kv_bytes_per_token == 22.5 * 1024


def test_a_checkpoint_that_only_bears_the_name_does_not_start(tmp_path: Path) -> None:
    tier = checkpoint(three(tmp_path)[0], config=CONFIG | {"num_hidden_layers": 31})
    with pytest.raises(SourceError, match="does not describe SmolLM2-135M-Instruct: num_hidden_layers is 31"):
        place((tier,), CPU)


def test_tiers_that_sleep_may_each_use_what_all_have(tmp_path: Path) -> None:
    sleeping = {"idle": "sleep"}
    plans = place(three(tmp_path, sleeping, sleeping, {"gpu_memory": 0.3}), TWO_GPUS)
    assert [plan.tier.resources.gpu_memory for plan in plans] == [0.6, 0.6, 0.3]
    plans = place(three(tmp_path, {"gpu_memory": 0.5, **sleeping}, sleeping, {}), TWO_GPUS)
    assert [plan.tier.resources.gpu_memory for plan in plans] == [0.5, 0.5, 0.4]
    with pytest.raises(PlacementError, match=r"adds up to 1\.00"):
        place(three(tmp_path, {"gpu_memory": 0.5, **sleeping}, {"gpu_memory": 0.5}, {"gpus": [1]}), TWO_GPUS)


def test_a_checkpoint_that_will_be_built_again_counts_as_none(tmp_path: Path) -> None:
    tier = checkpoint(three(tmp_path)[0], size=10 << 30)
    assert place((tier,), CPU)[0].per_device.weights > 9 << 30
    (tier.checkpoint / "manifest.json").write_text('{"format": 1}')
    assert place((tier,), CPU)[0].per_device.weights < 1 << 30


def test_a_recipe_that_the_hardware_does_not_compute_is_refused_before_anything_is_known_of_the_model() -> None:
    tier = Config(models=(ModelConfig(name="M", source="./nowhere"),)).tiers[1]
    block = replace(tier, recipe=find_recipe("fp8-block"), checkpoint=Path("/nowhere"))
    with pytest.raises(PlacementError, match="fp8-block is not for CPUs: vLLM's block product"):
        place((block,), CPU)
    old = Machine("cuda", gpus=(Gpu("A100", 80 * GIB, (8, 0)),))
    with pytest.raises(PlacementError, match=r"not for A100: it needs a GPU of compute capability 8\.9"):
        place((tier,), old)
