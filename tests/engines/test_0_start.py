"""Starts that must not succeed, with the real quantization environment behind them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from server.launch.process import free_port
from tests.engines.conftest import ROOT

ASSAY = str(Path(sys.executable).with_name("assay"))


@pytest.mark.parametrize(
    "command",
    [["build", "--config", "deploy/llama-3.1-8b.yaml"], ["serve", "--config", "deploy/llama-3.1-8b.yaml"]],
    ids=lambda command: command[0],
)
def test_llama_without_the_hub_is_a_sentence(tmp_path: Path, command: list[str]) -> None:
    """The README's commands go as far as they can: to the download, or to the memory that there is not."""
    port = ["--port", str(free_port())] if command[0] == "serve" else []
    refused = subprocess.run(
        [ASSAY, *command, *port],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "ASSAY_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused.returncode == 1
    if command[0] == "serve" and "engines need" in refused.stderr:
        assert re.search(r"3 engines need \d+\.\d GiB of memory and \d+\.\d GiB are free", refused.stderr)
        assert not (tmp_path / "checkpoints").exists(), "nothing is downloaded for engines that do not fit"
        return
    assert "meta-llama/Llama-3.1-8B-Instruct cannot be downloaded" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert "Engine" not in refused.stderr
    assert (tmp_path / "checkpoints").exists()
    assert list(tmp_path.rglob("manifest.json")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path: Path, number: signal.Signals) -> None:
    python = ROOT / ".venv-quantize" / "bin" / "python"
    (tmp_path / "c.yaml").write_text(f"quantize_python: {python}")
    build = subprocess.Popen(
        [ASSAY, "build", "Reference", "--config", "c.yaml"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    folder = tmp_path / ".assay" / "checkpoints" / "SmolLM2-135M-Instruct"
    until = time.monotonic() + 60
    while not (folder / "bf16.partial").exists():
        assert time.monotonic() < until, "the build has not begun"
        time.sleep(0.02)
    tree = psutil.Process(build.pid).children(recursive=True)
    build.send_signal(number)
    assert build.wait(30) != 0
    psutil.wait_procs(tree, timeout=15)
    assert [process for process in tree if process.is_running()] == []
    assert not (folder / "bf16").exists()
