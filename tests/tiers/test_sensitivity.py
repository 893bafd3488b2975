"""What each part costs and saves, and that what was measured is not measured again. Nothing here needs PyTorch."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.tiers.samples import make_scores
from tests.tiers.test_recipe import SMOL
from tiers.catalog import CATALOG
from tiers.conformance.extent import QUICK_TOKENS
from tiers.conformance.pack import PACK_NAME, Answer, Origin, Pack
from tiers.conformance.prompts import Prompt, load_prompts
from tiers.conformance.scores import Phase, Scores
from tiers.conformance.statistics import measure
from tiers.errors import ConfigError, PlacementError
from tiers.hardware import GIB
from tiers.manifest import SHORT_DIGEST
from tiers.sensitivity.answers import of_pack
from tiers.sensitivity.findings import Findings, rows_of, steps_of
from tiers.sensitivity.pictures import picture
from tiers.sensitivity.room import bytes_needed, check_room, weights_needed
from tiers.sensitivity.study import KeptAnswers, Study
from tiers.sensitivity.units import BYS, FORMATS, By, Format, FormatName, Unit, check, units

FP8 = Format.of("fp8", SMOL)
ANSWERS = [
    Answer(prompt_id=f"p{n}", kind="chat", language="en", source="greedy", prompt=[n], answer=[7, 8])
    for n in range(3)
]
Measure = Callable[[Unit, Phase, int, int], Scores]


def named(by: By, name: FormatName = "fp8") -> dict[str, Unit]:
    return {unit.name: unit for unit in units(by, SMOL, Format.of(name, SMOL))}


@pytest.mark.parametrize("name", FORMATS)
def test_the_layers_together_are_every_linear_layer_once(name: FormatName) -> None:
    layers, every = named("layer", name), named("part", name)
    names = [linear for unit in layers.values() for linear in unit.linears]
    assert sorted(names) == sorted(layer.name for layer in SMOL.linear_layers())
    both = every["attention"], every["feed-forward"]
    assert sorted(names) == sorted(linear for unit in both for linear in unit.linears)
    assert sum(unit.saves for unit in layers.values()) == sum(unit.saves for unit in both)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_a_part_is_of_every_block(part: str) -> None:
    assert named("part")[part].linears == tuple(
        layer.name for layer in SMOL.linear_layers() if layer.name.endswith(part)
    )
    assert len(named("part")[part].linears) == SMOL.num_hidden_layers


def test_what_is_saved_is_counted_with_scales() -> None:
    weights = 576 * 1536 * 30
    assert named("part")["up_proj"].saves == weights * 2 - (weights + 30 * 1536 * 2)
    # Half a byte each, and a scale of two bytes for each group of 64; the shape beside packed weights is 16 bytes.
    packed = weights // 2 + weights // 64 * 2 + 30 * 16
    assert named("part", "int4")["up_proj"].saves == weights * 2 - packed
    assert named("part")["KV cache"].saves_per_token == SMOL.kv_bytes_per_token // 2


def test_a_head_that_is_the_embedding_too_saves_nothing() -> None:
    llama = CATALOG[0].shape
    tied, own = named("part")["head"], {unit.name: unit for unit in units("part", llama, FP8)}["head"]
    assert tied.saves < 0 < own.saves


def test_each_level_adds_to_the_one_before() -> None:
    one, two, three, four = units("level", SMOL, FP8)
    assert set(one.linears) < set(two.linears) == set(three.linears) == set(four.linears)
    assert [each.kv_cache for each in (one, two, three, four)] == [False, False, True, True]
    assert [each.attention for each in (one, two, three, four)] == [False, False, False, True]
    assert all(each.phases == ("prefill", "decode") for each in (one, two, three, four))


def test_levels_are_of_fp8() -> None:
    check("level", "fp8")
    with pytest.raises(ConfigError, match="leave out --format int4"):
        check("level", "int4")


def test_a_width_that_no_group_divides_is_said_at_once() -> None:
    odd = SMOL.model_copy(update={"intermediate_size": 1000})
    with pytest.raises(ConfigError, match="no group size of"):
        Format.of("int4", odd)


@pytest.mark.parametrize("by", BYS)
def test_no_two_units_have_one_file(by: By, tmp_path: Path) -> None:
    study = study_in(tmp_path)
    chosen = units(by, SMOL, FP8)
    study.complete(chosen, lambda *_: scores(0.01))
    kept = {*study.folder.glob("*.npz")}
    assert len(kept) == sum(len(unit.phases) for unit in chosen)


def study_in(folder: Path, checkpoint: str = "a", answers: list[Answer] | None = None, by: str = "t") -> Study:
    return Study.of(folder, checkpoint, ANSWERS if answers is None else answers, FP8, by)


def scores(kl: float, seed: int = 1) -> Scores:
    return make_scores(kl, prompts=24, answer=8, seed=seed)


def counting(calls: list[str], until: int = 99) -> Measure:
    """Gives scores, and ends as a person would end it when so many units were measured."""

    def measure(unit: Unit, phase: Phase, done: int, of: int) -> Scores:
        if len(calls) == until:
            raise KeyboardInterrupt
        calls.append(f"{unit.name}, {phase}, {done} of {of}")
        return scores(0.01 * len(calls))

    return measure


def test_who_was_interrupted_goes_on_where_it_ended(tmp_path: Path) -> None:
    chosen = units("level", SMOL, FP8)
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        study_in(tmp_path).complete(chosen, counting(first, until=5))
    second: list[str] = []
    found = study_in(tmp_path).complete(chosen, counting(second))
    assert first[-1] == "3 + KV cache, prefill, 4 of 8"
    assert second == [
        "3 + KV cache, decode, 5 of 8",
        "4 + attention, prefill, 6 of 8",
        "4 + attention, decode, 7 of 8",
    ]
    np.testing.assert_array_equal(found["1 feed-forward", "prefill"].kl, scores(0.01).kl)
    third: list[str] = []
    study_in(tmp_path).complete(chosen, counting(third))
    assert third == []


@pytest.mark.parametrize("left", [slice(0, -200), slice(0, 0)], ids=["its beginning", "nothing"])
def test_a_file_that_is_not_whole_is_measured_again(tmp_path: Path, left: slice) -> None:
    chosen = units("level", SMOL, FP8)[:1]
    study = study_in(tmp_path)
    study.complete(chosen, counting([]))
    for file in study.folder.glob("*decode*.npz"):
        file.write_bytes(file.read_bytes()[left])
    (study.folder / ".1-feed-forward-decode-x.npz.0").write_bytes(b"half")
    again: list[str] = []
    study_in(tmp_path).complete(chosen, counting(again))
    assert again == ["1 feed-forward, decode, 1 of 2"]


@pytest.mark.parametrize(
    "other",
    [
        lambda folder: study_in(folder, checkpoint="b"),
        lambda folder: study_in(folder, answers=ANSWERS[:2]),
        lambda folder: study_in(folder, answers=[ANSWERS[0].model_copy(update={"answer": [7, 9]}), *ANSWERS[1:]]),
        lambda folder: study_in(folder, by="another torch"),
        lambda folder: Study.of(folder, "a", ANSWERS, Format.of("int8", SMOL), "t"),
    ],
    ids=["checkpoint", "fewer answers", "another answer", "another library", "format"],
)
def test_what_was_measured_of_something_else_is_not_taken(tmp_path: Path, other: Callable[[Path], Study]) -> None:
    chosen = units("level", SMOL, FP8)[:1]
    study_in(tmp_path).complete(chosen, counting([]))
    again: list[str] = []
    other(tmp_path).complete(chosen, counting(again))
    assert len(again) == 2


def test_a_unit_of_other_layers_is_another_though_its_name_is_the_same(tmp_path: Path) -> None:
    unit = units("layer", SMOL, FP8)[0]
    study_in(tmp_path).complete([unit], counting([]))
    again: list[str] = []
    study_in(tmp_path).complete([replace(unit, linears=unit.linears[:3])], counting(again))
    assert len(again) == 1


def test_an_answer_is_kept_for_its_prompt_alone(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path, "a", 48)
    kept.write(ANSWERS[1])
    assert KeptAnswers(tmp_path, "a", 48).read("p1", [1]) == ANSWERS[1]
    assert kept.read("p1", [1, 2]) is None, "the prompt has changed"
    assert kept.read("p0", [0]) is None
    assert KeptAnswers(tmp_path, "b", 48).read("p1", [1]) is None
    assert KeptAnswers(tmp_path, "a", 64).read("p1", [1]) is None


def pack_in(folder: Path, tokens: list[int], prompts: Sequence[Prompt]) -> Path:
    """A reference pack of checkpoint aaa… that has answers of these tokens."""
    answers = [ANSWERS[0].model_copy(update={"prompt_id": each.id, "answer": tokens}) for each in prompts]
    for answer in answers:
        file = folder / answer.hidden
        file.parent.mkdir(parents=True, exist_ok=True)
        zeros = np.zeros(len(tokens), np.float32)
        of_k = {"top": zeros[:, None].astype(np.int32), "ln_top": zeros[:, None]}
        save_file({**of_k, "ln_rest": zeros, "ln_given": zeros}, file)
    origin = Origin(model="M", checkpoint=DIGEST, tokenizer="t", template="t")
    Pack.write(folder, origin, answers, engine="e", prompts="p", corpus="c", seed=0)
    return folder


DIGEST = "a" * 64


def test_a_pack_that_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    prompts = load_prompts(quick=True)[:2]
    name = f"m-{DIGEST[:SHORT_DIGEST]}"
    whole = pack_in(tmp_path / f"{name}-1", [*range(QUICK_TOKENS + 5)], prompts)
    older, damaged = (pack_in(tmp_path / f"{name}-{n}", [7, 8], prompts) for n in (2, 3))
    contents = older / PACK_NAME
    contents.write_text(contents.read_text().replace('"format": 2', '"format": 1'))
    (damaged / "answers.parquet").write_bytes(b"half")
    os.utime(whole / PACK_NAME, (1, 1))
    notes: list[str] = []
    found = of_pack(tmp_path, DIGEST, prompts, notes.append)
    assert found is not None
    by, answers = found
    assert by == f"the reference pack in {whole}"
    assert [each.answer for each in answers] == [[*range(QUICK_TOKENS)]] * 2
    assert {"of format 1, not 2" in note for note in notes} == {True, False}
    assert any(f"{damaged / 'answers.parquet'} is missing or not what it was" in note for note in notes)

    (whole / PACK_NAME).write_text("{")
    assert of_pack(tmp_path, DIGEST, prompts, notes.append) is None, "then the model answers"
    assert len(notes) == 5
    assert of_pack(tmp_path, DIGEST.replace("a", "b"), prompts, notes.append) is None
    assert len(notes) == 5, "packs of other checkpoints are none of ours"


def test_what_is_needed_is_the_weights_in_fp32_and_what_is_quantized_beside_them() -> None:
    llama = CATALOG[0].shape
    every = units("level", llama, FP8)[1]
    head = next(each for each in units("part", llama, FP8) if each.name == "head")
    nothing = bytes_needed(llama, [Unit("nothing")], 1000)
    assert weights_needed(llama) == 4 * llama.parameters < nothing < 1.1 * weights_needed(llama)
    assert bytes_needed(llama, [every], 1000) > nothing + 4 * llama.linear_weights
    assert bytes_needed(llama, [head], 1000) > nothing + 4 * llama.vocab_size * llama.hidden_size
    assert bytes_needed(llama, [head, every], 1000) == bytes_needed(llama, [every, head], 1000)
    attention = replace(every, attention=True)
    products = 4 * llama.num_attention_heads * 9000**2
    assert bytes_needed(llama, [attention], 9000) > bytes_needed(llama, [Unit("nothing")], 9000) + products


def test_a_model_that_does_not_fit_is_one_sentence_with_both_figures() -> None:
    llama, needed = CATALOG[0].shape, 60 * GIB
    check_room("M", llama, needed, free=needed, gpu_free=None)
    with pytest.raises(PlacementError, match=r"about 60\.0 GiB of memory, 29\.9 GiB .* 24\.0 GiB are free: "):
        check_room("M", llama, needed, free=24 * GIB, gpu_free=None)
    check_room("M", llama, needed, free=40 * GIB, gpu_free=needed)
    with pytest.raises(PlacementError, match=r"about 60\.0 GiB of a GPU, .* 50\.0 GiB are free: stop the engines"):
        check_room("M", llama, needed, free=400 * GIB, gpu_free=50 * GIB)
    with pytest.raises(PlacementError, match=r"30\.9 GiB of memory"):
        check_room("M", llama, needed, free=24 * GIB, gpu_free=80 * GIB)


def levels() -> tuple[tuple[Unit, ...], dict[tuple[str, Phase], Scores]]:
    """KL 0.01, 0.02, and what the KV cache adds to decode alone; the last adds nothing but noise."""
    chosen = units("level", SMOL, FP8)
    base = scores(0.01)
    more = replace(base, kl=base.kl + 0.01 * np.random.default_rng(2).random(len(base)))
    cached = replace(more, kl=more.kl * 1.2)
    noise = replace(cached, kl=cached.kl * np.random.default_rng(3).choice([0.9, 1.1], len(base)))
    prefill, decode = (base, more, more, more), (base, more, cached, noise)
    found: dict[tuple[str, Phase], Scores] = {}
    for unit, first, second in zip(chosen, prefill, decode, strict=True):
        found |= {(unit.name, "prefill"): first, (unit.name, "decode"): second}
    return chosen, found


def test_a_level_is_held_against_the_one_before_prompt_by_prompt() -> None:
    chosen, found = levels()
    rows = {(row.unit, row.phase): row.kl for row in rows_of(chosen, found)}
    steps = {(step.unit[0], step.phase): step for step in steps_of(chosen, found)}
    assert steps["2", "prefill"].rises
    assert steps["3", "prefill"].is_same
    assert steps["3", "decode"].rises
    assert not steps["4", "decode"].rises
    own, paired = rows["2 all linears", "prefill"], steps["2", "prefill"].kl
    assert paired.high - paired.low < (own.high - own.low) / 2


def test_a_row_says_what_it_costs_and_saves() -> None:
    part = units("part", SMOL, FP8)
    found: dict[tuple[str, Phase], Scores] = {(unit.name, unit.phases[0]): scores(0.01) for unit in part}
    rows = {row.unit: row for row in rows_of(part, found)}
    gate, cache, head = rows["gate_proj"], rows["KV cache"], rows["head"]
    assert gate.per_megabyte == pytest.approx(gate.kl.value / (gate.saves / 1e6))
    assert gate.is_of_both
    assert (cache.phase, cache.is_of_both, cache.per_megabyte) == ("decode", False, None)
    assert head.per_megabyte is None


def findings_of(by: By) -> Findings:
    """The same of every unit: of a picture only what stands where is looked at."""
    chosen, same = units(by, SMOL, FP8), scores(0.01)
    found = {(unit.name, phase): same for unit in chosen for phase in unit.phases}
    return Findings(
        model="M",
        checkpoint="a",
        format="fp8",
        format_text="FP8",
        by=by,
        answers_by="nobody",
        prompts=24,
        tokens=192,
        rows=rows_of(chosen, found),
        steps=steps_of(chosen, found) if by == "level" else (),
    )


@pytest.mark.parametrize("by", BYS)
def test_the_picture_names_every_unit(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    if by != "level":  # its steps are of differences
        once = measure(scores(0.01))
        monkeypatch.setattr("tiers.sensitivity.findings.measure", lambda _: once)
    findings = findings_of(by)
    drawn = picture(findings)
    assert all(f">{unit.name}<" in drawn for unit in units(by, SMOL, FP8))
    if by == "level":  # all are drawn alike, and this has two phases besides
        assert drawn == picture(findings), "it is always the same"
    assert Findings.model_validate_json(findings.model_dump_json()) == findings
