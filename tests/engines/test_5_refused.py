"""Checkpoints that are not what they say. These tests start servers of their own, after that of the others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from server.launch.process import free_port
from tests.engines.conftest import MODEL, Certified, Server, wait_for, wait_until
from tests.engines.forging import BUILT, LITE, TURBO, config_of, home_with_reference, is_read
from tiers.conformance.certificate import Certificate
from tiers.conformance.extent import QUICK

ASSAY = str(Path(sys.executable).with_name("assay"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the reference of the other tests, and room for what a test forges."""
    return home_with_reference(tmp_path)


@pytest.fixture(scope="module")
def forged(forged_under_way: Server) -> Server:
    """A server whose Turbo is the Lite checkpoint, with a manifest that says Turbo and fits the files."""
    return wait_for(forged_under_way, lambda: is_read(forged_under_way), "both engines have been read")


def serve(home: Path, *tiers: str) -> list[str]:
    config = home / "config.yaml"
    config.write_text(config_of(home, free_port(), *tiers))
    return [ASSAY, "serve", "--no-build", "--config", str(config)]


def _as_if_by_enough_prompts(file: Path) -> Certificate:
    """Six prompts pass no gate, and two dozen would take minutes."""
    measured = Certificate.read(file)
    pack = measured.predicate.pack.model_copy(update={"prompts": QUICK})
    return measured.model_copy(update={"predicate": measured.predicate.model_copy(update={"pack": pack})})


def _certificate(server: Server) -> str:
    tiers = server.get("/v1/tiers")["data"]
    summary = next(tier["certificate"] for tier in tiers if tier["tier"] == "Reference")
    return str(summary["verdict"]) if summary else "none"


@pytest.mark.timeout(300)
def test_a_lite_checkpoint_under_turbos_name_is_refused_and_the_others_serve(
    forged: Server, certified: Certified
) -> None:
    tier = forged.get(f"/v1/tiers/{MODEL}-Turbo")
    assert tier["state"] == "refused"
    assert tier["declared"]["weights"]["type"] == "fp8_e4m3"
    assert tier["verified"]["agrees"] is False
    assert tier["verified"]["weights"]["type"] == "int4"
    with pytest.raises(openai.InternalServerError) as refusal:
        forged.client().chat.completions.create(
            model=f"{MODEL}-Turbo", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
        )
    assert refusal.value.code == "tier_not_verified"
    assert "weights: declared FP8 E4M3" in str(refusal.value)
    # What was measured elsewhere of the same checkpoint, engine and hardware holds here.
    with pytest.raises(openai.InternalServerError) as uncertified:
        forged.client().completions.create(model=MODEL, prompt="Hi", max_tokens=2)
    assert uncertified.value.code == "tier_not_certified"
    folder = forged.log.parent / "certificates"
    folder.mkdir()
    _as_if_by_enough_prompts(certified.file("Reference")).write(folder / certified.file("Reference").name)
    wait_until(lambda: _certificate(forged) == "pass", 5, "the certificate is seen")
    answer = forged.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert answer.choices[0].message.content
    assert f"{MODEL}-Turbo is not served" in forged.log.read_text()
    table = subprocess.run(
        [ASSAY, "tiers", "--url", forged.url], capture_output=True, text=True, check=True
    ).stdout
    assert "refused" in table
    assert "weights: declared FP8 E4M3" in table
    engines = psutil.Process(forged.process.pid).children()
    assert len(engines) == 1, "the engine that computes something else was ended"


def test_a_checkpoint_of_another_recipe_is_not_silently_replaced(home: Path) -> None:
    shutil.copytree(BUILT / LITE, home / "checkpoints" / MODEL / TURBO)
    command = serve(home, "Reference", "Turbo")
    done = subprocess.run([*command[:2], *command[3:]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{MODEL}-Turbo is not served" in done.stderr
    assert f"holds a {LITE} checkpoint" in done.stderr


def test_one_flipped_byte_is_refused_even_when_size_and_time_are_as_before(home: Path) -> None:
    weights = home / "checkpoints" / MODEL / "bf16" / "model.safetensors"
    command = serve(home, "Reference")
    build = [ASSAY, "build", *command[3:]]
    first = subprocess.run(build, capture_output=True, text=True, timeout=60, check=True)
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert first.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{MODEL}-Reference is not served: {weights} is damaged, its digest has changed" in done.stderr
    assert "Engine" not in done.stderr
