"""What breaks is said, contained, and repaired without help."""

import signal
import threading
import time
from typing import Any

import openai
import pytest

from tests.engines.conftest import LLAMA, MODEL, Server, wait_until

MESSAGES: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kill_9_of_a_worker_during_a_stream_and_of_an_api_server(assay: Server) -> None:
    """The stream ends with an error event, the other tiers answer throughout, both tiers come back by themselves.

    The API server is of the other model, and ended at the same time: two engines start together, and not one
    after another.
    """
    restarts = [assay.get(f"/v1/tiers/{tier}")["restarts"] for tier in (f"{MODEL}-Lite", f"{LLAMA}-Turbo")]
    answers, failures, over = {"Reference": 0, "Turbo": 0}, [], threading.Event()

    def keep_asking(tier: str) -> None:
        while not over.is_set():
            try:
                assay.client().chat.completions.create(model=f"{MODEL}-{tier}", messages=MESSAGES, max_tokens=4)
                answers[tier] += 1
                time.sleep(2)  # leave the new engine something of two cores
            except openai.OpenAIError as error:
                failures.append((tier, repr(error)))

    stream = assay.client().chat.completions.create(
        model=f"{MODEL}-Lite", messages=MESSAGES, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    for _ in range(5):
        next(chunks)
    others = [threading.Thread(target=keep_asking, args=(tier,)) for tier in answers]
    for other in others:
        other.start()
    beside = assay.engine("Turbo", LLAMA)
    try:
        assay.worker("Lite").send_signal(signal.SIGKILL)
        beside[0].send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError) as broken:
            for _ in chunks:
                pass
        assert broken.value.code == "engine_failed"

        with pytest.raises(openai.InternalServerError) as refusal:
            assay.client().chat.completions.create(model=f"{MODEL}-Lite", messages=MESSAGES)
        assert refusal.value.status_code == 503
        assert refusal.value.code == "tier_unavailable"
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        with pytest.raises(OSError, match="503"):
            assay.get("/readyz")
        wait_until(lambda: not any(process.is_running() for process in beside), 30, "no orphan is left")

        took = wait_until(assay.is_ready, 300, "both tiers are back")
    finally:
        over.set()
        for other in others:
            other.join()
    assert failures == []
    assert min(answers.values()) > 0
    for tier, before in zip((f"{MODEL}-Lite", f"{LLAMA}-Turbo"), restarts, strict=True):
        answer = assay.client().chat.completions.create(model=tier, messages=MESSAGES, max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        assert assay.get(f"/v1/tiers/{tier}")["restarts"] == before + 1
    print(f"back after {took:.0f} s; meanwhile {answers}")
    assay.remember_processes()
