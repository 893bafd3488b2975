"""What breaks is said, contained, and repaired without help."""

import signal
import threading
import time
from typing import Any

import openai
import pytest

from tests.engines.conftest import MODEL, Server, wait_until

MESSAGES: Any = [{"role": "user", "content": "Count from one to one thousand in words."}]


@pytest.mark.timeout(400)
def test_kill_9_of_a_worker_during_a_stream(assay: Server) -> None:
    """The stream ends with an error event, the other tiers answer throughout, the tier comes back by itself."""
    restarts = assay.get(f"/v1/tiers/{MODEL}-Lite")["restarts"]
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
    try:
        assay.worker("Lite").send_signal(signal.SIGKILL)
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

        took = wait_until(assay.is_ready, 240, "the tier is back")
    finally:
        over.set()
        for other in others:
            other.join()
    assert failures == []
    assert min(answers.values()) > 0
    answer = assay.client().chat.completions.create(model=f"{MODEL}-Lite", messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content
    assert assay.get(f"/v1/tiers/{MODEL}-Lite")["restarts"] == restarts + 1
    print(f"back after {took:.0f} s; meanwhile {answers}")


@pytest.mark.timeout(400)
def test_kill_9_of_an_api_server_leaves_no_orphans_and_is_repaired(assay: Server) -> None:
    engine = assay.engine("Turbo")
    engine[0].send_signal(signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in engine), 30, "its worker is gone too")
    wait_until(assay.is_ready, 240, "the tier is back")
    time.sleep(0.1)
    assay.remember_processes()
