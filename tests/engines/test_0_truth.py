"""A layer at a time, the reference's answers in FP32 are the whole model's. Needs Transformers, no engine."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from server.measuring.measure import LONGEST_PASSAGE
from tests.tiny_llama import CONFIG
from tiers.catalog import ModelShape
from tiers.conformance.extent import Asked, Extent
from tiers.conformance.layers import Chats, LlamaByLayers
from tiers.conformance.pack import Answer, Origin, Pack
from tiers.conformance.room import ALL_TOKENS, FEW_TOKENS, LONGEST
from tiers.conformance.truth import write_truth

VOCABULARY = 500
ORIGIN = Origin(model="Tiny", checkpoint="a" * 64, tokenizer="b" * 64, template="c" * 64)


def checkpoint(folder: Path, *, tied: bool) -> Path:
    """A Llama with all that the tiny one has, `llama3` RoPE scaling too, but its vocabulary; in several files."""
    torch.manual_seed(3)
    kept = {name: value for name, value in CONFIG.items() if not name.endswith("token_id")}
    kept |= {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig.from_dict(kept | {"initializer_range": 0.1}))
    model.bfloat16().save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def answers() -> list[Answer]:
    """Two to the first prompt; a passage; one where positions are far apart; one of a single token."""
    asked = [(tokens(40, 1), "greedy", 5), (tokens(40, 1), "sampled", 9), ([7], "written", 64)]
    asked += [(tokens(600, 2), "greedy", 20), (tokens(3, 4), "greedy", 1)]
    usual = {"kind": "chat", "language": "en"}
    return [
        Answer.model_validate(
            usual
            | {"prompt_id": f"p{len(prompt)}", "source": source, "prompt": prompt, "answer": tokens(count, number)}
        )
        for number, (prompt, source, count) in enumerate(asked, 10)
    ]


def pack_of(folder: Path, given: list[Answer]) -> Pack:
    """One of these answers, whatever its hidden states are."""
    for each in given:
        count, file = len(each.answer), folder / each.hidden
        file.parent.mkdir(parents=True, exist_ok=True)
        likeliest = {"top": torch.zeros(count, 1, dtype=torch.int32), "ln_top": torch.zeros(count, 1)}
        save_file(likeliest | {"ln_rest": torch.zeros(count), "ln_given": torch.zeros(count)}, file)
    return Pack.write(folder, ORIGIN, given, engine="f", prompts="d" * 64, corpus="e" * 64, seed=5)


@torch.inference_mode()
def whole_model(folder: Path, answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """The final states that predict an answer's tokens, and their log-probabilities."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = model.model(torch.tensor([answer.prompt]), use_cache=True)
    states = [read.last_hidden_state[0, -1:]]
    if rest := answer.answer[:-1]:
        further = model.model(torch.tensor([rest]), past_key_values=read.past_key_values, use_cache=True)
        states.append(further.last_hidden_state[0])
    hidden = torch.cat(states)
    own = torch.tensor(answer.answer).unsqueeze(-1)
    return hidden, model.lm_head(hidden).log_softmax(-1).gather(-1, own).squeeze(-1)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied"])
def test_a_layer_at_a_time_is_bit_for_bit_the_whole_model(
    tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, given = checkpoint(tmp_path / "model", tied=tied), answers()
    first = write_truth(pack_of(tmp_path / "some", given[:2]), reference, tmp_path / "first")
    made = write_truth(pack_of(tmp_path / "all", given), reference, tmp_path / "made", first)
    assert made.answers == tuple(given)
    for each in given:
        kept, (hidden, ln_p) = load_file(made.folder / each.hidden), whole_model(reference, each)
        assert torch.equal(kept["hidden"], hidden), each.hidden
        torch.testing.assert_close(kept["ln_given"], ln_p, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out.split("\n")[:5] == [*(f"layer {n} of 4" for n in (1, 2, 3, 4)), "layer 1 of 4"]


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=4, vocab_size=VOCABULARY
    )
    with torch.device("meta"):
        whole = LlamaForCausalLM(config).bfloat16()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    weights = {name: torch.full(each.shape, 0.01, dtype=each.dtype) for name, each in whole.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    del weights
    model, held = LlamaByLayers(tmp_path), list[int]()
    model.read([Chats(model.embed([1, 2, 3]), [])], lambda layer: held.append(psutil.Process().memory_info().rss))
    shape = ModelShape.read(tmp_path)
    assert len(held) == shape.num_hidden_layers
    layer = shape.linear_weights // shape.num_hidden_layers * 4
    assert max(held[2:]) - held[2] < layer, "more than one was kept, of ten"


@pytest.mark.parametrize(("prompts", "told"), [(24, FEW_TOKENS), (None, ALL_TOKENS)])
def test_what_is_said_of_a_llamas_tokens_is_what_they_are(
    llama_tokenizer: Any, prompts: int | None, told: int
) -> None:
    extent = Extent.of(Asked(prompts=prompts), 131_072)
    read = [
        llama_tokenizer.apply_chat_template(
            list(each.messages), tools=list(each.tools) or None, add_generation_prompt=True, return_dict=False
        )
        for each in extent.prompts
    ]
    passages = [llama_tokenizer.encode(each.text)[: LONGEST_PASSAGE + 1] for each in extent.passages]
    tokens = sum(map(len, read)) + 2 * extent.tokens * len(read) + sum(map(len, passages))
    assert 0.98 * told < tokens <= told
    assert 0.98 * LONGEST < max(map(len, read)) + extent.tokens <= LONGEST
