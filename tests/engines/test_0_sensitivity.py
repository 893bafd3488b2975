"""A model whose parts are quantized one by one: each phase feels what it should. Needs Transformers, no engine."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tiers.catalog import ModelShape
from tiers.conformance.pack import Answer
from tiers.conformance.scores import PHASES
from tiers.manifest import Manifest
from tiers.sensitivity import program
from tiers.sensitivity.model import Reading, ReferenceModel
from tiers.sensitivity.study import Request
from tiers.sensitivity.units import Format, Unit, units

VOCABULARY = 300
QUESTION = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template."""
TEXT = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(4)).tolist()
ANSWER = Answer(prompt_id="one", kind="chat", language="en", source="greedy", prompt=TEXT[:14], answer=TEXT[14:])
NOTHING = Unit("nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand weights, as a checkpoint has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> ReferenceModel:
    made = ReferenceModel.load(folder)
    made.calibrate([TEXT, TEXT[5:]])
    return made


def unit(folder: Path, name: str, by: Any = "part") -> tuple[Unit, Format]:
    shape = ModelShape.read(folder)
    number = Format.of("fp8", shape)
    return next(each for each in units(by, shape, number) if each.name.endswith(name)), number


def test_what_is_not_quantized_is_transformers_own(folder: Path, model: ReferenceModel) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        exact = own.model(torch.tensor([TEXT])).last_hidden_state[0, 13:-1]
    for phase in PHASES:
        torch.testing.assert_close(model.final_states(ANSWER, NOTHING, phase), exact, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_decoded_together_are_as_if_each_came_alone(folder: Path, model: ReferenceModel) -> None:
    cache, _ = unit(folder, "KV cache")
    together = model.final_states(ANSWER, cache, "decode")
    reading = Reading(model.scales, from_cache=True)
    with torch.inference_mode():
        states, kept = model._read(ANSWER.prompt, Reading(model.scales))
        alone = [states[-1:]]
        for token in ANSWER.answer[:-1]:
            states, kept = model._read([token], reading, kept)
            alone.append(states)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_cache_moves_decode_alone_and_the_product_prefill(folder: Path, model: ReferenceModel) -> None:
    exact = model.final_states(ANSWER, NOTHING, "prefill")

    def off(name: str, phase: Any) -> float:
        states = model.final_states(ANSWER, unit(folder, name)[0], phase)
        return float((states - exact)[1:].norm() / exact.norm())

    rounding = 1e-5
    assert off("KV cache", "prefill") < rounding < 1e-3 < off("KV cache", "decode")
    assert off("attention product", "prefill") > 1e-3


def test_linear_layers_compute_a_token_alike_in_both_phases(folder: Path, model: ReferenceModel) -> None:
    every, number = unit(folder, "2 all linears", "level")
    with model.quantized(every, number):
        prefill, decode = (model.final_states(ANSWER, every, phase) for phase in PHASES)
    exact = model.final_states(ANSWER, NOTHING, "prefill")
    # FP8 makes much of what FP32 rounds: a value between two is one or the other. Most tokens meet none.
    apart = (prefill - decode).norm(dim=-1) / exact.norm(dim=-1)
    assert apart.median() < 1e-4
    assert (prefill - exact).norm() / exact.norm() > 1e-2


def test_afterwards_nothing_is_quantized(folder: Path, model: ReferenceModel) -> None:
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    exact = model.final_states(ANSWER, NOTHING, "prefill")
    every, number = unit(folder, "2 all linears", "level")
    changed = "model.layers.1.mlp.up_proj.weight"

    def broken_off() -> None:
        with model.quantized(every, number):
            assert not torch.equal(model.model.get_parameter(changed), before[changed])
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        broken_off()
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.named_parameters())
    assert torch.equal(model.final_states(ANSWER, NOTHING, "prefill"), exact)


def test_only_what_is_named_is_quantized(folder: Path, model: ReferenceModel) -> None:
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    layer, number = unit(folder, "layer 1", "layer")
    with model.quantized(layer, number):
        changed = [name for name, w in model.model.named_parameters() if not torch.equal(w, before[name])]
    assert changed == [f"{name}.weight" for name in layer.linears]


def test_the_head_is_quantized_where_it_is_a_head(folder: Path, model: ReferenceModel) -> None:
    head, number = unit(folder, "head")
    exact = [model.final_states(ANSWER, NOTHING, "prefill")]
    cost = model.scores(head, number, "prefill", [ANSWER], exact)
    none = model.scores(NOTHING, number, "prefill", [ANSWER], exact)
    assert cost.kl.mean() > 1e-5 > 1e-9 > none.kl.mean()
    assert cost.token.tolist() == ANSWER.answer


def test_in_decode_the_first_token_is_the_prompts(folder: Path, model: ReferenceModel) -> None:
    cache, number = unit(folder, "KV cache")
    exact = [model.final_states(ANSWER, NOTHING, "prefill")]
    scores = model.scores(cache, number, "decode", [ANSWER], exact)
    assert scores.position.tolist() == list(range(1, len(ANSWER.answer)))


@pytest.fixture
def told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs the program where a library prints and no model may be loaded; its events, in which nothing else is."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    request = Request(
        model="Tiny",
        checkpoint=folder,
        packs=tmp_path,
        folder=tmp_path,
        out=tmp_path,
        format="fp8",
        by="part",
        prompts=6,
        context_length=8192,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))

    def talking(checkpoint: Path) -> PreTrainedTokenizerFast:
        print("a library's line")
        os.write(1, b"and one of C\n")
        return tokenizer

    def no_model(checkpoint: Path) -> None:
        pytest.fail("it was loaded")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", talking)
    monkeypatch.setattr(ReferenceModel, "load", no_model)
    monkeypatch.setattr(Manifest, "read", lambda checkpoint: SimpleNamespace(digest="a" * 64))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    before = os.dup(1)

    def run(template: str | None = None, **changed: Any) -> list[dict[str, Any]]:
        tokenizer.chat_template = template
        monkeypatch.setattr(sys, "argv", ["", request.model_copy(update=changed).model_dump_json()])
        with (tmp_path / "events").open("w+b") as events:
            os.dup2(events.fileno(), 1)
            assert program.main() == 1
            return [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]

    yield run
    os.dup2(before, 1)
    os.close(before)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": 5000}, "prompts can be measured, not 5000"),
        ({"context_length": 100}, "A context of 100 tokens has no room"),
        ({}, "has no chat template"),
    ],
)
def test_what_is_refused_is_so_before_the_model_is_loaded(
    told: Callable[..., Any], changed: dict[str, Any], said: str
) -> None:
    (event,) = told(**changed)
    assert event["event"] == "error"
    assert said in event["text"]


def test_a_model_for_which_there_is_no_memory_is_not_loaded(
    told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "free_ram", lambda: 1 << 28)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (event,) = told(QUESTION)
    assert "and 0.2 GiB are free: free memory" in event["text"]
    monkeypatch.setattr(program, "free_ram", lambda: 1 << 36)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 29, 1 << 36))
    (event,) = told(QUESTION)
    assert "and 0.5 GiB are free: stop the engines on that GPU" in event["text"]
