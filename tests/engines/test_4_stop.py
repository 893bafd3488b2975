"""The end: what was accepted is answered, and nothing remains. The last file, for then the server is gone."""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.engines.conftest import LLAMA, MODEL, Server

MESSAGES: Any = [{"role": "user", "content": "Count from one to one hundred in words."}]
STREAMS = 50
TOKENS = 32
"""Of each: together so many that the command begins in the middle of them."""
TIER = f"{LLAMA}-Lite"


async def stream(client: openai.AsyncOpenAI, model: str, first: asyncio.Event) -> tuple[int, str | None]:
    """The tokens of one, and how its last event says that it finished."""
    tokens, finish = 0, None
    chunks = await client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},  # a chunk may have several tokens, and some have no text
        extra_body={"ignore_eos": True},
    )
    async for chunk in chunks:
        first.set()
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return tokens, finish


async def streams(assay: Server, meanwhile: Any) -> None:
    """Have so many answered at once, and more than their engine works on; ``meanwhile`` happens once they run.

    All must be whole.
    """
    async with openai.AsyncOpenAI(
        base_url=f"{assay.url}/v1", api_key="unused", max_retries=0, timeout=180
    ) as client:
        first = asyncio.Event()
        running = [asyncio.create_task(stream(client, TIER, first)) for _ in range(STREAMS - 1)]
        running.append(asyncio.create_task(stream(client, MODEL, asyncio.Event())))
        await first.wait()
        waiting = await asyncio.to_thread(waits, assay)
        assert waiting > STREAMS // 2, "most of them wait in the queue when it begins"
        await meanwhile()
        answers = await asyncio.gather(*running)
    assert [finish for _, finish in answers] == ["length"] * STREAMS
    assert {tokens for tokens, _ in answers} == {TOKENS}


def waits(assay: Server) -> float:
    """Requests in the tier's queue."""
    series = f'assay_requests_waiting{{tier="{TIER}"}} '
    (line,) = (line for line in assay.get("/metrics").splitlines() if line.startswith(series))
    return float(line.removeprefix(series))


async def drain(assay: Server) -> dict[str, Any]:
    """`assay drain` of the tier, by the command."""
    command = [str(Path(sys.executable).with_name("assay")), "drain", TIER, "--json"]
    config = ["--config", str(assay.log.parent / "config.yaml")]
    process = await asyncio.create_subprocess_exec(*command, *config, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    (account,) = json.loads(out)
    return dict(account)


@pytest.mark.timeout(300)
async def test_drain_under_load_starts_the_engine_again_and_loses_no_request(assay: Server) -> None:
    before, engine = assay.get(f"/v1/tiers/{TIER}"), assay.engine("Lite", LLAMA)[0]
    accounts, waited = [], [0.0]

    async def meanwhile() -> None:
        draining = asyncio.create_task(drain(assay))
        while not draining.done():
            await asyncio.sleep(0.5)
            if (await asyncio.to_thread(assay.get, f"/v1/tiers/{TIER}"))["state"] == "restarting":
                waited.append(await asyncio.to_thread(waits, assay))
        accounts.append(await draining)

    await streams(assay, meanwhile)
    after = assay.get(f"/v1/tiers/{TIER}")
    assert accounts == [{"tier": TIER, "done": True, "problem": None, "states": ["ready"]}]
    assert max(waited) > 0, "some waited while there was no engine"
    assert not engine.is_running()
    assert assay.engine("Lite", LLAMA)[0].pid != engine.pid
    assert after["verified"]["agrees"], "what it computes was read back"
    assert after["restarts"] == before["restarts"], "it has not failed"
    assay.remember_processes()


@pytest.mark.timeout(300)
async def test_sigterm_under_load_finishes_what_was_accepted_and_leaves_nothing(assay: Server) -> None:
    assay.remember_processes()

    async def meanwhile() -> None:
        assay.process.send_signal(signal.SIGTERM)

    await streams(assay, meanwhile)
    assert await asyncio.to_thread(assay.process.wait, 60) == 0
    assert [process for process in assay.tree if process.is_running()] == []
    with pytest.raises(openai.APIConnectionError):
        assay.client().models.list()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(assay.url.rsplit(":", 1)[1])))


def test_no_process_of_the_server_remains_anywhere(assay: Server) -> None:
    config = str(assay.log.parent)
    remaining = [p for p in psutil.process_iter(["cmdline"]) if config in " ".join(p.info["cmdline"] or ())]
    assert remaining == []
