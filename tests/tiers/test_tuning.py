"""Tuning brings a quantized model's distribution nearer to the reference's, and stays on the grid."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.divergence import kl_divergence
from kernels.fakequant import to_fp8
from tiers.calibration import Conversation
from tiers.recipe import Tuning
from tiers.tuning import tune

VOCABULARY, WIDTH, GROUP = 40, 32, 16
TUNING = Tuning(steps=30, batch=4, learning_rate=0.05)
TEXT = [
    Conversation(row.tolist(), answer_start=3)
    for row in torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
]


class Trunk(nn.Module):
    """An embedding and two linear layers, in the shape that Transformers gives a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        x = self.embedding(input_ids)
        return SimpleNamespace(last_hidden_state=x + 4 * self.second(torch.tanh(3 * self.first(x))))


class Model(nn.Module):
    """A trunk whose head is tied to its embedding."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.model = Trunk()

    def get_output_embeddings(self) -> Any:
        return self.model.embedding


def reference() -> Any:
    torch.manual_seed(0)
    return Model()


def quantized(kind: str) -> Any:
    """The reference as llm-compressor's oneshot leaves it: the grid beside the weight, which may be off it."""
    model = reference()
    for layer in (model.model.first, model.model.second):
        weights = SimpleNamespace(type="int" if kind == "int4" else "float", num_bits=4 if kind == "int4" else 8)
        layer.quantization_scheme = SimpleNamespace(
            weights=weights, input_activations=None if kind == "int4" else SimpleNamespace()
        )
        groups = layer.weight.detach().view(WIDTH, -1, GROUP if kind == "int4" else WIDTH)
        layer.weight_scale = groups.abs().amax(-1) / (7.5 if kind == "int4" else 448)
        layer.weight_zero_point = torch.ones(WIDTH, 2, dtype=torch.int8) if kind == "int4" else None
        layer.weight.data = on_grid(layer)
    return model


def points(layer: Any) -> Tensor:
    grouped: Tensor = layer.weight.detach().view(*layer.weight_scale.shape, -1) / layer.weight_scale.unsqueeze(-1)
    return grouped.float()


def on_grid(layer: Any) -> Tensor:
    if layer.quantization_scheme.weights.type == "float":
        nearest = to_fp8(points(layer))
    else:
        nearest = points(layer).round().clamp(-9, 6)  # with a zero point of 1
    whole: Tensor = (nearest * layer.weight_scale.unsqueeze(-1)).view(WIDTH, WIDTH)
    return whole


@torch.no_grad()
def divergence(model: Any) -> float:
    ids = torch.tensor([each.tokens for each in TEXT])
    p, q = ((m.model(ids, False).last_hidden_state @ m.get_output_embeddings().weight.T)[:, 2:-1]
            for m in (reference(), model))  # fmt: skip
    return kl_divergence(p.flatten(0, 1), q.flatten(0, 1)).mean().item()


def tuned(kind: str, **changes: Any) -> Any:
    model = quantized(kind)
    tune(model, reference(), TEXT, TUNING.model_copy(update=changes), say=lambda text: None)
    return model


def test_the_distribution_comes_nearer_to_the_references() -> None:
    assert divergence(tuned("int4")) < 0.7 * divergence(quantized("int4"))


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_every_weight_stays_on_its_grid_and_everything_else_as_it_was(kind: str) -> None:
    before, after = quantized(kind), tuned(kind)
    for name in ("first", "second"):
        old, new = getattr(before.model, name), getattr(after.model, name)
        assert isinstance(new, nn.Linear)
        assert not torch.equal(new.weight, old.weight)
        assert torch.allclose(new.weight, on_grid(new), rtol=1e-6)
        assert torch.equal(vars(new)["weight_scale"], old.weight_scale)
    assert torch.equal(after.model.embedding.weight, before.model.embedding.weight)


def test_no_steps_change_nothing() -> None:
    before, after = quantized("int4"), tuned("int4", steps=0)
    assert torch.allclose(after.model.first.weight, before.model.first.weight, rtol=1e-6)


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = tuned("int4"), tuned("int4"), tuned("int4", seed=1)
    assert torch.equal(one.model.first.weight, two.model.first.weight)
    assert not torch.equal(one.model.first.weight, other.model.first.weight)


def test_the_reference_is_left_alone() -> None:
    untouched = reference()
    kept = copy.deepcopy(untouched.state_dict())
    tune(quantized("int4"), untouched, TEXT, TUNING, say=lambda text: None)
    assert all(torch.equal(value, kept[name]) for name, value in untouched.state_dict().items())
