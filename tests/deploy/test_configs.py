"""Every config in deploy/ is what its first lines say, by the planner that `assay serve` obeys."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from server.config import Config
from server.config_file import load_config
from tiers.errors import PlacementError
from tiers.hardware import GIB, Machine, find_card
from tiers.placement import check_hardware, together
from tiers.plan import TierPlan
from tiers.tier import Tier, TierKind

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIGS = sorted(DEPLOY.glob("*.yaml"))
BATCH = re.compile(r"(\w+) (\d+)")


class Header(NamedTuple):
    """What the first three lines of a config say."""

    card: str | None
    cards: int
    nodes: int
    serves: tuple[str, ...]
    requests: dict[str, int]

    @property
    def machine(self) -> Machine:
        if self.card is None:
            return Machine("cpu", ram=10 * GIB)  # as README.md says of the embedded model
        return Machine.of(find_card(self.card), self.cards, self.nodes)


def header(path: Path) -> Header:
    hardware, serves, requests = (
        line.removeprefix(f"# {name}: ")
        for line, name in zip(
            path.read_text().splitlines(),
            ("hardware", "serves", "requests of full length at once"),
            strict=False,
        )
    )
    card = re.fullmatch(r"(\d+) × ([\w-]+)(?: in each of (\d+) nodes)?", hardware)
    assert card or hardware == "CPU", hardware
    return Header(
        card=card[2] if card else None,
        cards=int(card[1]) if card else 0,
        nodes=int(card[3] or 1) if card else 1,
        serves=tuple(serves.split(", ")),
        requests={kind: int(count) for kind, count in BATCH.findall(requests)},
    )


def planned(tiers: tuple[Tier, ...], machine: Machine) -> tuple[TierPlan, ...]:
    """All of them, on a machine, or on the nodes of a Ray cluster that are all such."""
    return together(tiers, machine).tiers


def loaded(name: str) -> Config:
    return load_config(DEPLOY / name)


def with_tier(config: Config, kind: TierKind, **resources: object) -> tuple[Tier, ...]:
    """The config's tiers and one more, on the same GPUs."""
    model = config.models[0]
    more = {**model.tiers, kind: type(next(iter(model.tiers.values()))).model_validate(resources)}
    return config.model_copy(update={"models": (model.model_copy(update={"tiers": more}),)}).tiers


def asleep(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    sleeping = {"idle": "sleep", "gpu_memory": None}
    return tuple(replace(tier, resources=tier.resources.model_copy(update=sleeping)) for tier in tiers)


@pytest.fixture(autouse=True)
def _nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint of another size, and no home of somebody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASSAY_HOME", raising=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_hardware_and_takes_as_many_requests_as_it_says(path: Path) -> None:
    said, config = header(path), load_config(path)
    check_hardware(config.tiers, said.machine)
    plans = planned(config.tiers, said.machine)
    assert [plan.problem for plan in plans] == [None] * len(plans)
    assert tuple(plan.tier.kind for plan in plans) == said.serves
    assert {plan.tier.kind.value: plan.concurrent_requests for plan in plans} == said.requests
    assert all(plan.concurrent_requests <= plan.max_num_seqs for plan in plans)


def test_there_is_one_for_each_machine_that_is_asked_for() -> None:
    made_for = {
        (load_config(path).models[0].name.rpartition("-Instruct")[0], *header(path)[:3]) for path in CONFIGS
    }
    assert {
        ("SmolLM2-135M", None, 0, 1),
        ("Llama-3.1-8B", "L4", 1, 1),
        ("Llama-3.1-8B", "H100", 1, 1),
        ("Llama-3.1-8B", "H200", 1, 1),
        ("Llama-3.1-70B", "H200", 2, 1),
        ("Llama-3.1-70B", "H100", 4, 1),
        ("Llama-3.1-405B", "H200", 8, 1),
        ("Llama-3.1-405B", "H100", 8, 2),
    } <= made_for


@pytest.mark.parametrize("card", ["L4", "RTX-4090"])
def test_the_24_gb_config_fits_every_24_gb_card_that_has_fp8(card: str) -> None:
    tiers = loaded("llama-3.1-8b-24gb.yaml").tiers
    check_hardware(tiers, Machine.of(find_card(card), 1))
    assert not together(tiers, Machine.of(find_card(card), 1)).problems


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("llama-3.1-8b-24gb.yaml", "A10"),
        ("llama-3.1-8b-24gb.yaml", "RTX-3090"),
        ("llama-3.1-8b.yaml", "A100-80GB"),
    ],
)
def test_turbo_is_refused_on_a_card_that_multiplies_no_fp8(name: str, card: str) -> None:
    with pytest.raises(PlacementError, match=r"Turbo: fp8-dynamic is not for"):
        check_hardware(loaded(name).tiers, Machine.of(find_card(card), 1))


def test_on_24_gb_two_tiers_awake_have_no_room_for_a_prompt_each() -> None:
    """Which is why they sleep."""
    turbo_and_lite = together(loaded("llama-3.1-8b-24gb.yaml").tiers[1:], Machine.of(find_card("L4"), 1)).tiers
    needed = sum(plan.per_device.fixed + plan.kv_bytes_full_context for plan in turbo_and_lite)
    assert needed > turbo_and_lite[0].room_bytes == int(0.9 * find_card("L4").memory)


@pytest.mark.parametrize("name", ["llama-3.1-70b-2xh200.yaml", "llama-3.1-70b-4xh100.yaml"])
def test_beside_both_of_70b_lite_fits_only_if_all_sleep(name: str) -> None:
    said, config = header(DEPLOY / name), loaded(name)
    room_left = 0.9 - sum(tier.resources.gpu_memory or 0 for tier in config.tiers)
    assert room_left == pytest.approx(0, abs=1e-6)
    three = with_tier(config, TierKind.LITE, gpus=list(range(said.cards)))
    # However the memory is divided: what they hold before the first token of cache is too much together.
    held = sum(plan.per_device.fixed for plan in together(asleep(three), said.machine).tiers)
    assert held > 0.9 * said.machine.smallest.memory
    assert not together(asleep(three), said.machine).problems


@pytest.mark.parametrize(
    ("name", "card", "count"),
    [
        ("llama-3.1-8b.yaml", "L4", 1),
        ("llama-3.1-8b-141gb.yaml", "H100", 1),
        ("llama-3.1-70b-2xh200.yaml", "H100", 2),
        ("llama-3.1-405b-8xh200.yaml", "H100", 8),
    ],
)
def test_a_config_is_refused_on_smaller_hardware_with_what_would_fit(name: str, card: str, count: int) -> None:
    problems = together(loaded(name).tiers, Machine.of(find_card(card), count)).problems
    assert problems
    assert "What would fit" in problems[0]


def test_405b_in_bf16_on_one_node_of_h100_is_sent_to_two() -> None:
    (problem,) = together(loaded("llama-3.1-405b-8xh200.yaml").tiers, Machine.of(find_card("H100"), 8)).problems
    assert "16 × H100 over 2 nodes (tensor 8 × pipeline 2)" in problem


def test_nothing_fits_beside_405b_and_its_other_two_fit_without_it() -> None:
    said, config = header(DEPLOY / "llama-3.1-405b-8xh200.yaml"), loaded("llama-3.1-405b-8xh200.yaml")
    for kind in (TierKind.TURBO, TierKind.LITE):
        both = with_tier(config, kind, gpus=list(range(8)))
        held = sum(plan.per_device.fixed for plan in together(asleep(both), said.machine).tiers)
        assert held > 0.9 * said.machine.smallest.memory
    halves = {TierKind.TURBO: (0, 1, 2, 3), TierKind.LITE: (4, 5, 6, 7)}
    model = config.models[0]
    tiers = {kind: type(model.tiers[TierKind.REFERENCE])(gpus=gpus) for kind, gpus in halves.items()}
    other = config.model_copy(update={"models": (model.model_copy(update={"tiers": tiers}),)})
    assert not together(other.tiers, said.machine).problems


def test_the_operators_guide_lists_them_with_the_same_figures() -> None:
    guide = (DEPLOY / "README.md").read_text()
    rows = re.findall(r"^\| `deploy/([\w.-]+\.yaml)` \|[^|]*\| ([^|]*) \| ([^|]*) \|$", guide, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {path.name for path in CONFIGS}
    for name, serves, requests in rows:
        said, config = header(DEPLOY / name), load_config(DEPLOY / name)
        counts, _, context = requests.partition(" of ")
        assert serves.removesuffix(", by turns") == ", ".join(said.serves)
        assert [int(count) for count in counts.split(", ")] == list(said.requests.values())
        planned_context = {plan.context_length for plan in planned(config.tiers, said.machine)}
        assert planned_context == {int(context.removesuffix(" tokens").replace(",", ""))}
