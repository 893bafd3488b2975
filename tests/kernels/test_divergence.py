"""Claims of kernels/divergence.py, against float64, of both implementations: Triton's in its interpreter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernels.closeness import assert_close

if TYPE_CHECKING:
    import torch

    from kernels.divergence import Comparison, compare, kl_lower_bound
    from kernels.head import Projected, fp32_logits

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, of infinities, where Triton is interpreted
NAN, INF = float("nan"), float("inf")
V = 5000
"""More than two blocks of Triton's and no multiple of one, nor of a CPU's."""


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Only where these tests run: PyTorch takes longer to load than all that other processes collect."""
    global torch, compare, kl_lower_bound, Projected, fp32_logits
    import torch

    from kernels.divergence import compare, kl_lower_bound
    from kernels.head import Projected, fp32_logits


def exp_of_gpus(x: Any) -> Any:
    """2 to the rounded x log₂ e (PTX's ``ex2.approx``)."""
    import numpy as np

    return np.exp2(x * x.dtype.type(np.log2(np.e)))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """Triton's implementation, on the CPU: Triton is loaded anew for it, and again for what comes after."""

    def of_triton() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]

    before = {name: sys.modules.pop(name) for name in of_triton()}
    import kernels

    path = Path(kernels.__path__[0]) / "divergence_triton.py"
    spec = importlib.util.spec_from_file_location("interpreted_divergence", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        patch.setattr(builder, "create_exp", lambda self, arg: self.unary_op(arg, exp_of_gpus))
        yield module
    for name in of_triton():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(params=["cpu", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `compare` computes with."""
    name: str = request.param
    if name == "triton":
        module = request.getfixturevalue("interpreted")
        monkeypatch.setattr("kernels.divergence._figures", module.figures)
    return name


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compared(p: torch.Tensor, q: torch.Tensor, k: int = 0) -> Comparison:
    return compare(p, q, torch.zeros(len(p), dtype=torch.int64), k)


def exact(p_logits: torch.Tensor, q_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions, in float64."""
    ln_p, ln_q = (each.double().log_softmax(-1) for each in (p_logits, q_logits))
    p, q = ln_p.exp(), ln_q.exp()
    return {
        # Σ q − p is 0; with it no digits are lost where the two are nearly equal.
        "kl": (p * (ln_p - ln_q) + (q - p)).sum(-1),
        "tv": (q - p).abs().sum(-1) / 2,
        "entropy_p": -(p * ln_p).sum(-1),
        "entropy_q": -(q * ln_q).sum(-1),
        "ln_p": ln_p[:, 0],
        "ln_q": ln_q[:, 0],
    }


def check_against_float64(p: torch.Tensor, q: torch.Tensor) -> Comparison:
    found = compared(p, q)
    for name, truth in exact(p, q).items():
        away = (getattr(found, name).double() - truth).abs()
        allowed = 1e-7 + 1e-5 * truth.abs()
        assert (away <= allowed).all(), f"{name}: {away.max()} away from {truth[away.argmax()]}"
    assert found.top_p.tolist() == p.argmax(-1).tolist()
    assert found.top_q.tolist() == q.argmax(-1).tolist()
    return found


def peaky(vocabulary: int = V) -> torch.Tensor:
    """A few tokens have nearly everything, as in the middle of a word."""
    logits = 2 * noise(2, vocabulary)
    logits[:, [11, 12, 17]] = torch.tensor([25.0, 24.0, 22.0])
    return logits


def one_hot(token: int, height: float = 50.0) -> torch.Tensor:
    return torch.zeros(2, V).index_fill(-1, torch.tensor([token]), height)


ADVERSARIAL: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
    "as alike as FP32 tells": lambda: (4 * noise(2, V), 4 * noise(2, V) + 1e-6 * noise(2, V, seed=1)),
    "KL 1e-9": lambda: (4 * noise(2, V), 4 * noise(2, V) + 4.5e-5 * noise(2, V, seed=1)),
    "KL 1e-9, peaky": lambda: (peaky(), peaky() + 4.5e-5 * noise(2, V, seed=1)),
    "BF16": lambda: (4 * noise(2, V), (4 * noise(2, V)).bfloat16()),
    "between alike and apart": lambda: (peaky(), peaky() + 0.1 * noise(2, V, seed=1)),
    "a quantized tier": lambda: (4 * noise(2, V), 4 * noise(2, V) + 0.3 * noise(2, V, seed=1)),
    "far apart": lambda: (4 * noise(2, V), 4 * noise(2, V, seed=1)),
    "50 nats apart": lambda: (4 * noise(2, V), -12 * noise(2, V)),
    "one-hot against flat": lambda: (one_hot(3), 0.01 * noise(2, V)),
    "flat against one-hot": lambda: (0.01 * noise(2, V), one_hot(3)),
    "one-hot against another": lambda: (one_hot(3), one_hot(4999)),
    "flat but for one": lambda: (one_hot(7, 1.0), one_hot(7, 6.0)),
    "nowhere in FP32, and likely": lambda: (one_hot(3, 200.0), one_hot(3, 8.0)),
    "all alike but for one that neither expects": lambda: (peaky(), peaky().index_fill(-1, torch.tensor([9]), 2)),
    "around 10,000": lambda: (peaky() + 1e4, peaky() + 1e4 + 0.002 * noise(2, V, seed=1)),
    "10,000 apart": lambda: (4 * noise(2, V), 4 * noise(2, V) + 1e4),
    "two tokens": lambda: (torch.tensor([[0.0, -50.0]]), torch.tensor([[-50.0, 0.0]])),
    "one token": lambda: (torch.tensor([[3.0]]), torch.tensor([[-8.0]])),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_figures_are_those_of_float64(case: str, implementation: str) -> None:
    check_against_float64(*ADVERSARIAL[case]())


def test_nearly_equal_distributions_over_a_whole_vocabulary(implementation: str) -> None:
    logits = 4 * noise(1, 128_256)
    other = logits + 4.5e-5 * noise(1, 128_256, seed=1)
    found, truth = check_against_float64(logits, other), exact(logits, other)
    assert truth["kl"].max() < 2e-9
    assert_close(found.kl.double(), truth["kl"], rtol=0.01, atol=0)


def test_many_tokens_far_below_the_likeliest_count_with_all_their_digits(implementation: str) -> None:
    """All of them have the same exponent, and an error of it does not average out."""
    p, q = torch.zeros(1, 128_256), torch.zeros(1, 128_256)
    p[:, :2], q[:, :2] = 11.93566, 11.533714
    check_against_float64(p, q)


def test_what_is_compiled_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that may write nowhere."""
    from kernels.divergence_cpu import _compiled

    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert _compiled()(lambda x: x + 1)(1) == 2


def test_kl_of_equal_distributions_is_zero_and_never_below(implementation: str) -> None:
    logits = (4 * noise(3, 500) * 1024).round() / 1024  # so that adding 8 rounds nothing
    found = compared(logits, logits + 8)
    assert found.kl.tolist() == [0.0] * 3
    assert found.tv.tolist() == [0.0] * 3
    assert (compared(logits, logits + 1e-7 * noise(3, 500, seed=1)).kl >= 0).all()


def test_of_several_as_likely_the_first_is_named(implementation: str) -> None:
    logits = torch.full((3, V), -1.0)
    logits[0, [4321, 4999]] = 1.0
    logits[1, [2047, 2048]] = 1.0
    found = compared(logits, -logits, k=3)
    assert found.top_p.tolist() == [4321, 2047, 0]
    assert found.top_q.tolist() == [0, 0, 0]
    assert found.likeliest.tolist() == [[4321, 4999, 0], [2047, 2048, 0], [0, 1, 2]]


def test_tokens_that_are_ruled_out(implementation: str) -> None:
    """By p, by q where p does not expect them or does, and by both."""
    p, q = torch.zeros(4, 4), torch.zeros(4, 4)
    p[0, 3] = q[1, 3] = p[2, 3] = q[2, 3] = -INF
    p[3] = torch.tensor([0.0, 0.0, 0.0, -300.0])
    q[3, 3] = -INF
    found = compare(p, q, torch.full((4,), 3))
    ln = torch.tensor([3.0, 4.0]).log().tolist()
    assert found.kl.tolist() == pytest.approx([ln[1] - ln[0], INF, 0.0, INF], abs=1e-7)
    assert found.tv.tolist() == pytest.approx([0.25, 0.25, 0.0, 0.0], abs=1e-7)
    assert found.ln_p.tolist() == pytest.approx([-INF, -ln[1], -INF, -300 - ln[0]], abs=1e-4)
    assert found.ln_q.tolist() == pytest.approx([-ln[1], -INF, -INF, -INF])
    assert found.entropy_p.tolist() == pytest.approx([ln[0], ln[1], ln[0], ln[0]], rel=1e-6)
    assert found.entropy_q.tolist() == pytest.approx([ln[1], ln[0], ln[0], ln[0]], rel=1e-6)


def test_a_grammar_mask_leaves_what_is_left_exact(implementation: str) -> None:
    logits = 4 * noise(2, V)
    mask = torch.arange(V) % 3 == 0
    p, q = logits.masked_fill(mask, -INF), (logits + 0.3 * noise(2, V, seed=1)).masked_fill(mask, -INF)
    found, left = compared(p, q), exact(p[:, ~mask], q[:, ~mask])
    for name in ("kl", "tv", "entropy_p", "entropy_q"):
        assert_close(getattr(found, name).double(), left[name], rtol=1e-5, atol=1e-7)
    assert found.top_p.tolist() == p.argmax(-1).tolist()


def test_what_is_no_distribution_spoils_its_own_figures_only(implementation: str) -> None:
    broken = [[NAN], [INF], [INF, INF], [INF, *[-INF] * 299], [NAN, -INF], [NAN, INF], [-INF] * 300]
    sound_p, sound_q = noise(1, 300).expand(15, 300), noise(1, 300, seed=1).expand(15, 300)
    p, q = sound_p.clone(), sound_q.clone()
    for row, values in enumerate(broken):
        p[row, : len(values)] = q[row + 7, -len(values) :] = torch.tensor(values)
    found, sound = compared(p, q, k=2), compare(sound_p[:1], sound_q[:1], torch.zeros(1, dtype=torch.int64), 2)
    of_p = {"ln_p", "top_p", "entropy_p", "likeliest", "ln_p_likeliest", "ln_p_rest"}
    of_q = {"ln_q", "top_q", "entropy_q"}
    for name, column in found._asdict().items():
        is_spoilt = torch.zeros(15, dtype=torch.bool)
        is_spoilt[:7] = name not in of_q
        is_spoilt[7:14] = name not in of_p
        is_nothing = column.isnan() if column.is_floating_point() else column == -1
        assert is_nothing[is_spoilt].all(), name
        left = column[~is_spoilt]
        assert_close(left, getattr(sound, name).expand_as(left), what=name)


def test_no_positions_and_one(implementation: str) -> None:
    found = compared(torch.empty(0, V), torch.empty(0, V), k=3)
    assert [tuple(each.shape) for each in found] == [(0,)] * 8 + [(0, 3)] * 3 + [(0,)] * 2
    logits = noise(1, V)
    assert compared(logits, logits).kl.tolist() == [0.0]


def test_eight_thousand_positions_are_each_what_they_are_alone() -> None:
    p, q = noise(8192, 7), noise(8192, 7, seed=1)
    check_against_float64(p, q)


def test_the_likeliest_and_what_is_left_on_both_sides(implementation: str) -> None:
    p, q = 4 * noise(2, V), (4 * noise(2, V) + noise(2, V, seed=1)).bfloat16()
    found = compared(p, q, k=20)
    ln_p, ln_q = (each.double().log_softmax(-1) for each in (p, q))
    top = p.topk(20).indices
    assert found.likeliest.tolist() == top.tolist()
    for ln, ours, rest in (
        (ln_p, found.ln_p_likeliest, found.ln_p_rest),
        (ln_q, found.ln_q_likeliest, found.ln_q_rest),
    ):
        assert_close(ours.double(), ln.gather(-1, top), rtol=1e-6, atol=1e-5)
        others = ln.scatter(-1, top, -INF).logsumexp(-1)
        assert_close(rest.double(), others, rtol=1e-6, atol=1e-5)


def test_of_fewer_tokens_than_asked_for_all_are_named() -> None:
    found = compared(torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1, 3), k=20)
    assert found.likeliest.tolist() == [[1, 2, 0]]
    assert found.ln_p_rest.tolist() == [-INF]


def test_without_k_nothing_is_named_and_all_is_left() -> None:
    found = compared(noise(2, V), noise(2, V))
    assert found.likeliest.shape == (2, 0)
    assert found.ln_p_rest.tolist() == found.ln_q_rest.tolist() == [0.0, 0.0]


def test_hidden_states_with_their_head_are_the_logits_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """And these are never all there at once."""
    hidden, head = noise(40, 16).bfloat16(), noise(700, 16, seed=1).bfloat16()
    given, q = torch.arange(40), noise(40, 700, seed=2)
    made: list[int] = []

    def noted(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        made.append(len(hidden))
        return fp32_logits(hidden, head)

    monkeypatch.setattr("kernels.divergence.fp32_logits", noted)
    monkeypatch.setattr("kernels.head._LOGITS_AT_ONCE", 700 * 15)
    found = compare(Projected(hidden, head), q, given, k=4)
    assert made == [15, 15, 10]
    for ours, whole in zip(found, compare(fp32_logits(hidden, head), q, given, k=4), strict=True):
        assert_close(ours, whole)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p, q, t: (p, q[:, :-1], t), "must be equal"),
        (lambda p, q, t: (p[0], q[0], t), r"must be \[T, V\]"),
        (lambda p, q, t: (p[:, :0], q[:, :0], t), "at least one token"),
        (lambda p, q, t: (p.double(), q, t), "p is torch.float64"),
        (lambda p, q, t: (p, q.long(), t), "q is torch.int64"),
        (lambda p, q, t: (p, q, t[:-1]), "must be integers"),
        (lambda p, q, t: (p, q, t.float()), "must be integers"),
        (lambda p, q, t: (p, q, t + 5), "the vocabulary has 5"),
        (lambda p, q, t: (p, q, t - 1), "tokens from -1"),
        (lambda p, q, t: (p, q, t, -1), "k is -1"),
        (lambda p, q, t: (p, q.to("meta"), t), "on one device"),
        (lambda p, q, t: (Projected(p, q[:, :-1]), q, t), r"must be \[T, H\] and \[V, H\]"),
        (lambda p, q, t: (Projected(p, q), q[:, :-1], t), r"p has shape \(3, 3\)"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(change: Callable[..., tuple[Any, ...]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare(*change(noise(3, 5), noise(3, 5), torch.arange(3)))


@pytest.fixture
def logits() -> torch.Tensor:
    return noise(64, 1000) * 4


@pytest.mark.parametrize("k", [1, 5, 20, 999])
def test_the_bound_is_below_the_exact_value_and_above_zero(logits: torch.Tensor, k: int) -> None:
    other = logits + 0.5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    p, q = torch.log_softmax(logits.double(), -1), torch.log_softmax(other.double(), -1)
    top = p.topk(k).indices
    bound = kl_lower_bound(p.gather(-1, top), q.gather(-1, top))
    assert (bound <= exact(logits, other)["kl"] + 1e-12).all()
    assert (bound > 0).all()


def test_the_bound_over_all_tokens_is_the_exact_value(logits: torch.Tensor) -> None:
    other = logits + 0.5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    p, q = torch.log_softmax(logits.double(), -1), torch.log_softmax(other.double(), -1)
    assert_close(kl_lower_bound(p, q), exact(logits, other)["kl"], rtol=1e-6, atol=1e-9)


def test_padding_a_row_changes_nothing() -> None:
    p, q = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.4, 0.4]]).log()
    pad = torch.tensor([[-torch.inf]])
    assert_close(kl_lower_bound(torch.cat([p, pad], -1), torch.cat([q, pad], -1)), kl_lower_bound(p, q))
