"""Real checkpoints: what is on the disk is what is quantized here, and what it costs is what it should."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kernels.fakequant import Scheme, dequantize, pack_int4, quantize, unpack_int4
from tests.engines.conftest import CHECKPOINTS, LITE_RECIPE, LLAMA, MODEL, Server, run
from tests.engines.test_0_fakequant import SCHEMES, assert_same_bits
from tiers.catalog import ModelShape
from tiers.conformance.pack import Answer
from tiers.sensitivity.model import ReferenceModel
from tiers.sensitivity.units import Format, Unit, units

CHATS = (
    ("Why is the sky blue?", "The sky appears blue because of a phenomenon called Rayleigh scattering."),
    ("Name three fruits.", "Three fruits that many people like are apples, bananas and oranges."),
    ("What is 12 times 12?", "12 times 12 is 144, because 12 times 10 is 120 and 12 times 2 is 24."),
)


def linears(checkpoint: Path) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What the checkpoint has of each linear layer, and the reference's weight."""
    reference, made = (folder / "model.safetensors" for folder in (CHECKPOINTS / MODEL / "bf16", checkpoint))
    with safe_open(reference, "pt") as weights, safe_open(made, "pt") as tensors:
        for name in (key for key in weights.keys() if "_proj." in key):  # noqa: SIM118  # no mapping
            parts = ("", "_scale", "_packed", "_shape", "_zero_point")
            there = set(tensors.keys())
            yield (
                {part: tensors.get_tensor(name + part) for part in parts if name + part in there},
                weights.get_tensor(name),
            )


def test_turbos_checkpoint_is_our_quantization_of_the_references_weights(assay: Server) -> None:
    count = 0
    for held, weight in linears(CHECKPOINTS / MODEL / "fp8-dynamic"):
        ours = quantize(weight, SCHEMES["FP8 channel"])
        assert_same_bits(ours.values, held[""])
        assert_same_bits(ours.scales.scale, held["_scale"])
        count += 1
    assert count == 210


def test_lites_checkpoint_is_our_quantization_of_the_references_weights_too(assay: Server) -> None:
    """Its recipe rounds to nearest, so all of it is ours to say: scales, zero points, values and their packing."""
    check_int4(CHECKPOINTS / MODEL / LITE_RECIPE)


def check_int4(checkpoint: Path) -> None:
    """Hold a checkpoint of asymmetric INT4 groups, rounded to nearest, against our quantization."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    args = QuantizationArgs.model_validate(config["config_groups"]["group_0"]["weights"])
    kind = QuantizationScheme(targets=["Linear"], weights=args)
    scheme = Scheme("int4", "group", args.group_size or 0, symmetric=False)
    chosen = [*islice(linears(checkpoint), 0, None, 6)]  # of a block's seven, one after the other
    for held, weight in chosen:
        ours = quantize(weight, scheme)
        assert ours.scales.zero_point is not None
        assert_same_bits(ours.scales.scale, held["_scale"])
        assert_same_bits(pack_int4(ours.scales.zero_point.t()).t(), held["_zero_point"])
        assert_same_bits(pack_int4(ours.values), held["_packed"])
        assert_same_bits(unpack_int4(held["_packed"], weight.shape[1]), ours.values)
    assert len(chosen) == 35
    for held, weight in chosen[::7]:  # theirs takes a tenth of a second each
        state = {f"weight{part}": tensor for part, tensor in held.items()}
        theirs = PackedQuantizationCompressor.decompress(state, kind)["weight"]
        assert_same_bits(dequantize(quantize(weight, scheme), scheme), theirs)


@pytest.mark.slow
def test_the_levels_of_the_embedded_model_rise(assay: Server) -> None:
    """Few tokens: that it is FP8, and not noise or nonsense, is what they show."""
    from transformers import AutoTokenizer

    folder = CHECKPOINTS / MODEL / "bf16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = ModelShape.read(folder)
    number = Format.of("fp8", shape)
    answers = []
    for question, answer in CHATS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(answer)["input_ids"]
        answers.append(
            Answer(
                prompt_id=question,
                kind="chat",
                language="en",
                source="written",
                prompt=prompt["input_ids"],
                answer=ids,
            )
        )
    model = ReferenceModel.load(folder)
    model.calibrate([answer.prompt for answer in answers])
    exact = [model.final_states(answer, Unit("nothing"), "prefill") for answer in answers]
    feed_forward, every, cache, _ = units("level", shape, number)
    kl = [
        model.scores(unit, number, phase, answers, exact).kl.mean()  # type: ignore[arg-type]
        for unit, phase in ((feed_forward, "prefill"), (every, "prefill"), (cache, "decode"))
    ]
    assert 0.005 < kl[0] < kl[1] < 0.1
    assert 0.005 < kl[2] < 0.2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_measures_and_goes_on_where_it_was(assay: Server, tmp_path: Path) -> None:
    """On the tiny model, whose divergence means nothing but is told apart all the same."""
    config = assay.log.parent / "config.yaml"
    of = ("sensitivity", LLAMA, "--prompts", "6", "--json", "--config", str(config))
    first = json.loads(run(*of, "--by", "level", "--out", str(tmp_path), check=True).stdout)
    rows = {(row["unit"][0], row["phase"]): row for row in first["rows"]}
    assert len(rows) == 8
    assert all(row["kl"]["low"] > 0 for row in rows.values())
    steps = {(step["unit"][0], step["phase"]): step["kl"]["value"] for step in first["steps"]}
    assert steps["3", "prefill"] == 0, "the cache is not read in prefill"
    assert steps["3", "decode"] != 0
    assert steps["4", "prefill"] != 0
    assert "sensitivity-level-fp8.svg" in {file.name for file in tmp_path.iterdir()}

    folder = next(assay.log.parent.glob(f"sensitivity/{LLAMA}/*/study.json")).parent
    lost, *_ = folder.glob("4-attention-decode-*.npz")
    lost.unlink()
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    assert len(stamps) == 7
    assert json.loads(run(*of, "--by", "level", check=True).stdout)["rows"] == first["rows"]
    assert lost.exists()
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "they were measured again"
