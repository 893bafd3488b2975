"""What is planted in a model is there, is gone when it is mended, and never gets into an engine that serves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tiers.conformance.faults import FAULTS, LOGITS_SCALE
from tiers.probe.faults import Faults
from tiers.probe.planting import Front
from tiers.probe.reading import MAY_PLANT
from tiers.probe.routes import ProbeRoutes
from tiers.probe.worker import ProbeWorker

LAYERS = 4


class Linear(nn.Module):
    """FP8 values as vLLM holds them, [K, N], with a scale a channel, [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(6, 8).clamp(-2, 2) * 200
        self.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(8, 1) + 0.1, requires_grad=False)
        self.fp8_values_in_fp32 = self.weight.t().float().contiguous()

    @property
    def values(self) -> torch.Tensor:
        return self.fp8_values_in_fp32 * self.weight_scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.down_proj = Linear()

    def forward(self, positions: Any, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return hidden + 1, residual + 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.model.start_layer, self.model.end_layer = 0, LAYERS  # type: ignore[assignment]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Draw(nn.Module):
    def forward(self, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        return k, p


def runner() -> Any:
    torch.manual_seed(1)
    model = Model()
    sampler = SimpleNamespace(topk_topp_sampler=Draw())
    return SimpleNamespace(get_model=lambda: model, sampler=sampler)


def linear(model: Any, block: int) -> Linear:
    found = model.model.layers[block].mlp.down_proj
    assert isinstance(found, Linear)
    return found


def computed(of: Any) -> list[Any]:
    """Everything that the toy computes."""
    model, one = of.get_model(), torch.ones(2)
    parts = [part.clone() for block in range(LAYERS) for part in (linear(model, block).values,)]
    parts += [block(None, one, one)[0] for block in model.model.layers]
    return [*parts, model.compute_logits(one), of.sampler.topk_topp_sampler(None, None, 3, 0.5)[1]]


def same(one: list[Any], other: list[Any]) -> list[bool]:
    return [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("layer-dropped", [LAYERS + LAYERS // 2]),
        ("scales-swapped", [LAYERS // 2 - 1, LAYERS // 2]),
        ("rounded-twice", [0, 1, 2, 3]),
        ("logits-scaled", [2 * LAYERS]),
        ("top-p-ignored", [2 * LAYERS + 1]),
    ],
)
def test_a_fault_breaks_its_part_alone_and_mending_leaves_nothing(name: str, changed: list[int]) -> None:
    of = runner()
    faults, before = Faults(of), computed(of)
    assert faults.plant(name) > 0
    assert [at for at, equal in enumerate(same(before, computed(of))) if not equal] == changed
    assert faults.plant(None) == 0
    assert all(same(before, computed(of)))
    assert "forward" not in vars(of.get_model().model.layers[LAYERS // 2])


def test_only_one_is_planted_at_a_time() -> None:
    of = runner()
    faults, before = Faults(of), computed(of)
    faults.plant("layer-dropped")
    faults.plant("logits-scaled")
    assert same(before, computed(of)).count(False) == 1


def test_weights_rounded_twice_are_near_and_are_what_their_scales_say() -> None:
    of = runner()
    layer = linear(of.get_model(), 0)
    before = layer.values.clone()
    Faults(of).plant("rounded-twice")
    assert torch.equal(layer.weight_scale.log2(), layer.weight_scale.log2().round())
    assert torch.equal(layer.fp8_values_in_fp32, layer.weight.t().float())
    error = (layer.values - before).abs() / before.abs().clamp(min=1e-6)
    assert 0 < error.mean() < 2**-4


def test_logits_are_scaled_where_there_are_any() -> None:
    of = runner()
    Faults(of).plant("logits-scaled")
    assert of.get_model().compute_logits(torch.ones(3)).tolist() == pytest.approx([LOGITS_SCALE] * 3)


@pytest.mark.parametrize("name", ["rope-unscaled", "positions-shifted", "kv-scale"])
def test_what_a_model_has_not_is_broken_nowhere(name: str) -> None:
    assert Faults(runner()).plant(name) == 0


def test_a_fault_that_cannot_be_planted_leaves_nothing_behind() -> None:
    of = runner()
    before = computed(of)
    second = linear(of.get_model(), LAYERS // 2)
    second.weight_scale = nn.Parameter(torch.ones(3, 1), requires_grad=False)
    second.fp8_values_in_fp32 = torch.zeros(3, 1)
    before = computed(of)
    with pytest.raises(ValueError, match="does not fit"):
        Faults(of).plant("scales-swapped")
    assert all(same(before, computed(of)))


def test_every_fault_is_somebodys_to_plant() -> None:
    workers = set(Faults(runner())._plants)
    fronts = {"template", "end-mistaken"}
    assert workers | fronts == {fault.name for fault in FAULTS if fault.is_planted}
    assert not workers & fronts


@pytest.mark.parametrize("value", [None, "0", "true", ""])
def test_an_engine_that_serves_is_not_broken(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(MAY_PLANT, raising=False)
    if value is not None:
        monkeypatch.setenv(MAY_PLANT, value)
    worker = ProbeWorker()
    worker.model_runner = runner()
    before = computed(worker.model_runner)
    assert "not started with" in worker.assay_plant("layer-dropped")["problem"]
    assert all(same(before, computed(worker.model_runner)))
    assert routes() == [], "nor does it have a route for it"


def test_an_engine_of_the_self_test_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAY_PLANT, "1")
    worker = ProbeWorker()
    worker.model_runner = runner()
    assert worker.assay_plant("layer-dropped") == {"planted": 1}
    assert "could not be planted" in worker.assay_plant("nothing-known")["problem"], "it must not raise"
    assert worker.assay_plant(None) == {"planted": 0}
    assert len(routes()) == 1


def routes() -> list[Any]:
    from fastapi import FastAPI

    app = FastAPI()
    ProbeRoutes().attach_router(app)
    return [route for route in app.routes if "fault" in getattr(route, "path", "")]


class Core:
    """vLLM's client of its core, with one worker."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.input_processor = SimpleNamespace(
            renderer=Renderer(), generation_config_fields={"eos_token_id": [5, 7], "top_p": 0.9}
        )

    async def collective_rpc(self, method: str, **given: Any) -> list[dict[str, Any]]:
        assert (method, given["timeout"]) == ("assay_plant", None)
        (fault,) = given["args"]
        self.asked.append(fault)
        return [{"planted": 0 if fault is None else 2}]


class Renderer:
    def get_eos_token_id(self) -> int:
        return 7


async def test_what_stands_before_the_model_is_broken_there() -> None:
    core = Core()
    state = SimpleNamespace(assay_engine=core, online_renderer=SimpleNamespace(chat_template=None))
    front, processor = Front(state), core.input_processor
    assert await front.plant("template") == 1
    assert "[INST]" in state.online_renderer.chat_template
    assert await front.plant("end-mistaken") == 2
    assert state.online_renderer.chat_template is None
    assert processor.renderer.get_eos_token_id() == 8
    assert processor.generation_config_fields == {"eos_token_id": 8, "top_p": 0.9}
    assert await front.plant("kv-scale") == 2
    assert processor.renderer.get_eos_token_id() == 7
    assert processor.generation_config_fields["eos_token_id"] == [5, 7]
    assert await front.plant(None) == 0
    assert core.asked == [None, None, "kv-scale", None], "and the model is mended by whatever comes next"
