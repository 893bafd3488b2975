"""A caller's view: chat completions from each real tier, through the official client."""

import json
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

from tests.engines.conftest import ALL_TIERS, MODEL, ROOT, TIERS, Server, wait_until
from tiers.engine import installed_backend

on_cpu = pytest.mark.skipif(installed_backend() != "cpu", reason="of vLLM's CPU build")
pytestmark = pytest.mark.timeout(1200)
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
COUNT: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_answers_with_logprobs(assay: Server, tier: str) -> None:
    answer = assay.client().chat.completions.create(
        model=f"{MODEL}-{tier}", messages=QUESTION, max_tokens=24, temperature=0, logprobs=True, top_logprobs=5
    )
    choice = answer.choices[0]
    assert choice.message.content
    assert choice.message.content.strip()
    assert choice.logprobs is not None
    assert choice.logprobs.content
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 5
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs), abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(choice.logprobs.content)


def test_the_reference_knows_the_capital_of_france(assay: Server) -> None:
    answer = assay.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_streams_with_logprobs(assay: Server, tier: str) -> None:
    stream = assay.client().chat.completions.create(
        model=f"{MODEL}-{tier}",
        messages=QUESTION,
        max_tokens=16,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, logprobs, finish, usage = "", 0, None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            logprobs += len(choice.logprobs.content or []) if choice.logprobs else 0
            finish = choice.finish_reason or finish
    assert text.strip()
    assert finish in ("stop", "length")
    assert usage is not None
    assert usage.completion_tokens == logprobs > 0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_says_what_answered(assay: Server, tier: str, stream: bool) -> None:
    raw = assay.client().chat.completions.with_raw_response.create(
        model=f"{MODEL}-{tier}",
        messages=QUESTION,
        max_tokens=2,
        stream=stream,
        extra_headers={"x-request-id": "caller-7"},
    )
    listed = assay.get(f"/v1/tiers/{MODEL}-{tier}")
    assert raw.headers["x-assay-tier"] == tier
    assert raw.headers["x-assay-precision"] == listed["precision"]
    assert raw.headers["x-assay-checkpoint"] == listed["checkpoint"]["digest"][:12]
    assert raw.headers["x-request-id"] == "caller-7"


def test_the_plain_name_is_the_reference(assay: Server) -> None:
    headers = [
        assay.client()
        .chat.completions.with_raw_response.create(model=name, messages=QUESTION, max_tokens=1)
        .headers["x-assay-checkpoint"]
        for name in (MODEL, f"{MODEL}-Reference")
    ]
    assert headers[0] == headers[1]


def test_the_tiers_compute_different_distributions(assay: Server) -> None:
    """Three names in front of one engine would pass every test above."""
    first = {}
    for tier in TIERS:
        answer = assay.client().chat.completions.create(
            model=f"{MODEL}-{tier}", messages=COUNT, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        first[tier] = {top.token: top.logprob for top in logprobs.content[0].top_logprobs}
    for tier in ("Turbo", "Lite"):
        shared = first["Reference"].keys() & first[tier].keys()
        assert max(abs(first["Reference"][token] - first[tier][token]) for token in shared) > 0.01


def test_an_unknown_model_is_refused_and_never_another_tier(assay: Server) -> None:
    for name in (f"{MODEL}-Lite-2", f"{MODEL}-turbo", "gpt-4o", ""):
        with pytest.raises(openai.NotFoundError) as refusal:
            assay.client().chat.completions.create(model=name, messages=QUESTION)
        assert refusal.value.code == "model_not_found"
        assert "x-assay-tier" not in refusal.value.response.headers


def test_what_the_engine_refuses_comes_in_openais_envelope(assay: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        assay.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=100_000)
    body = refusal.value.body
    assert isinstance(body, dict)
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["code"] is None or isinstance(body["code"], str)
    assert refusal.value.response.headers["x-assay-tier"] == "Reference"


def test_a_client_that_leaves_mid_stream_frees_the_engine(assay: Server) -> None:
    left = assay.metric("assay_clients_left_total", "Lite")
    stream = assay.client().chat.completions.create(
        model=f"{MODEL}-Lite", messages=COUNT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert assay.metric("assay_requests_running", "Lite") == 1
    stream.close()
    wait_until(lambda: assay.metric("assay_requests_running", "Lite") == 0, 2, "the slot is free")
    assert assay.metric("assay_clients_left_total", "Lite") == left + 1
    wait_until(lambda: assay.running_in_engine("Lite") == 0, 2, "the engine works on nothing")


def test_a_client_that_leaves_before_the_answer_frees_the_engine(assay: Server) -> None:
    client = assay.client().with_options(timeout=1)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(
            model=f"{MODEL}-Lite", messages=COUNT, max_tokens=1500, extra_body={"ignore_eos": True}
        )
    wait_until(lambda: assay.running_in_engine("Lite") == 0, 3, "the engine works on nothing")


def test_the_tiers_answer_at_the_same_time(assay: Server) -> None:
    texts: dict[str, str | None] = {}

    def ask(tier: str) -> None:
        answer = assay.client().chat.completions.create(model=f"{MODEL}-{tier}", messages=COUNT, max_tokens=16)
        texts[tier] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(tier,)) for tier in TIERS for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(texts[tier] for tier in TIERS)


def test_engines_answer_nobody_but_the_gateway(assay: Server) -> None:
    port = assay.engine_port("Turbo")
    for path in ("/v1/models", "/metrics", "/tokenize", "/invocations", "/version", "/docs"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10)
        assert refusal.value.code == 401, path


def test_vllm_counts_its_queue_under_the_first_of_an_engines_names(assay: Server) -> None:
    """By which deploy/kubernetes scales engines: of the Reference tier that is the model's plain name."""
    for tier, name in (("Reference", MODEL), ("Turbo", f"{MODEL}-Turbo")):
        key = assay.engine(tier)[0].environ()["VLLM_API_KEY"]
        headers = {"Authorization": f"Bearer {key}"}
        url = f"http://127.0.0.1:{assay.engine_port(tier)}/metrics"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        (waiting,) = (line for line in lines if line.startswith("vllm:num_requests_waiting{"))
        assert f'model_name="{name}"' in waiting


def test_engines_listen_on_loopback_only(assay: Server) -> None:
    processes = psutil.Process(assay.process.pid).children(recursive=True)
    listening = [c.laddr for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= len(ALL_TIERS)
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_the_key_of_an_engine_is_not_in_its_arguments(assay: Server) -> None:
    api_server = assay.engine("Lite")[0]
    assert api_server.environ()["VLLM_API_KEY"] not in " ".join(api_server.cmdline())


@on_cpu
def test_lite_does_not_quantize_its_activations(assay: Server) -> None:
    """vLLM would, on CPUs with AMX, and W4A16 would be W4A8 without anyone being told."""
    assert assay.engine("Lite")[0].environ()["VLLM_CPU_INT4_W4A8"] == "0"


def test_the_curl_line_that_serve_prints_works(assay: Server) -> None:
    wait_until(lambda: "curl " in assay.log.read_text(), 10, "the line is printed")
    line = next(line for line in assay.log.read_text().splitlines() if line.startswith("curl "))
    done = subprocess.run(["bash", "-c", f"{line} --silent --fail"], capture_output=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("tier", "precision"), [("Reference", "bf16"), ("Turbo", "fp8"), ("Lite", "int4")])
def test_a_pinned_precision_is_kept_or_refused(assay: Server, tier: str, precision: str) -> None:
    """Through the official client, in the request's body."""

    def ask(pin: str) -> Any:
        return assay.client().chat.completions.with_raw_response.create(
            model=f"{MODEL}-{tier}", messages=QUESTION, max_tokens=2, extra_body={"precision": pin}
        )

    assert ask(precision).headers["x-assay-precision"] == precision
    for other in {"bf16", "fp8", "int4"} - {precision}:
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(other)
        assert refusal.value.code == "precision_not_available"
        assert refusal.value.param == "precision"
        assert f"{MODEL}-" in refusal.value.message


def test_seeded_prompts_that_are_read_in_pieces_end_no_engine(assay: Server) -> None:
    """Together they are longer than one step: vLLM's CPU build ended over the draw after a piece."""

    def ask(number: int) -> int:
        answer = assay.client().completions.create(
            model=f"{MODEL}-Reference",
            prompt=f"{number} " + "one two three " * 450,
            max_tokens=2,
            temperature=1,
            seed=5,
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    process = assay.engine("Reference")[0]
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(ask, range(4)))
    assert sum(lengths) > 2 * 2048
    assert assay.engine("Reference")[0] == process, "it is the engine of before"
