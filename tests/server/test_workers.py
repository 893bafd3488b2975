"""Several gateway processes on one port: real ones, with a fake engine behind each."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import series
from server import workers as module
from server.config import Config
from server.engines.fleet import Fleet
from server.keys import KeyFile, Keys
from server.listener import PortTaken, listening_socket
from server.progress import Steps
from server.scrape import CREATED
from server.serve import serve
from server.workers import WorkerFailed, Workers, run_workers
from tests.server import one_of_several
from tests.server.redis_server import redis_server
from tests.server.test_admission import BODY, bearer
from tiers.errors import ConfigError

LASTING = BODY.replace(b"Hi", b"Answer at the end")


class Running:
    """What a test asks of them."""

    def __init__(self, url: str, asked: asyncio.Event, running: "asyncio.Task[None]") -> None:
        self.url = url
        self.asked = asked
        self.running = running

    async def post(self, body: bytes, headers: dict[str, str]) -> tuple[int, int]:
        """The status of an answer, and which process it is from; on a connection of its own."""
        async with (
            aiohttp.ClientSession(headers={"content-type": "application/json"} | headers) as session,
            session.post(f"{self.url}/v1/chat/completions", data=body) as answer,
        ):
            return answer.status, (await answer.json()).get("pid", 0)

    async def metrics(self) -> dict[str, float]:
        """Every series, by its name and labels."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            assert answer.status == 200
            lines = (await answer.text()).splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@asynccontextmanager
async def workers(config: Config, keys: Path, limits: str) -> AsyncIterator[Running]:
    asked, url = asyncio.Event(), asyncio.get_running_loop().create_future()
    main = partial(one_of_several.run, config.home, {"keys": keys, "limits": limits, "workers": config.workers})
    running = asyncio.create_task(run_workers(main, config, asked, asyncio.Event(), url.set_result))
    await asyncio.wait({running, url}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    yield Running(await url, asked, running)
    asked.set()
    await running


async def test_all_that_is_said_of_the_processes_themselves_is_in_the_table(tmp_path: Path) -> None:
    told = await Workers(lambda worker: None, 2, "127.0.0.1", 0, tmp_path)._processes.exposition()
    names = {family.name for family in text_string_to_metric_families(told.decode())}
    assert {name for name in names if not name.endswith(CREATED)} == {each.name for each in series.OF_WORKERS}


@pytest.mark.program
async def test_several_processes_answer_on_one_port_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    free, few = bearer(keys.add("free")), bearer(keys.add("few", requests_per_minute=7))
    with redis_server() as redis:
        config = Config(home=tmp_path, port=0, workers=2, keys=keys.path, limits=redis.url)
        async with workers(config, keys.path, redis.url) as running:

            async def metric(name: str) -> float:
                found = await running.metrics()
                return next(value for series, value in found.items() if series.startswith(name))

            answers = await asyncio.gather(*(running.post(BODY, free) for _ in range(24)))
            assert {status for status, _ in answers} == {200}
            pids = {pid for _, pid in answers}
            assert len(pids) == 2
            for _ in range(4):  # whichever is asked
                assert await metric("assay_requests_total{") == 24
                assert await metric("gen_ai_server_request_duration_seconds_count") == 24
                assert await metric("assay_gateway_workers") == 2
                assert await metric("assay_tier_ready") == 1

            answers = await asyncio.gather(*(running.post(BODY, few) for _ in range(14)))
            assert Counter(status for status, _ in answers) == {200: 7, 429: 7}
            assert await metric("assay_requests_total{") == 31

            gone = min(pids)
            os.kill(gone, signal.SIGKILL)
            while await metric("assay_gateway_workers") == 2:
                await asyncio.sleep(0.2)
            assert await metric("assay_requests_total{") == 31, "it went down with the process"
            while await metric("assay_gateway_workers") == 1:
                assert (await running.post(BODY, free))[1] not in (gone, 0)
                await asyncio.sleep(0.2)
            assert f"(pid {gone}) was ended by SIGKILL; another takes its place" in caplog.text
            assert await metric("assay_gateway_restarts_total") == 1
            while len(now := {(await running.post(BODY, free))[1] for _ in range(8)}) == 1:
                await asyncio.sleep(0.2)
            assert gone not in now

            accepted = [asyncio.create_task(running.post(LASTING, free)) for _ in range(6)]
            while await metric("assay_requests_running") + await metric("assay_requests_waiting") < 6:
                await asyncio.sleep(0.2)
            running.asked.set()
            assert {status for status, _ in await asyncio.gather(*accepted)} == {200}
            await asyncio.wait_for(running.running, 10)
            assert not any(psutil.pid_exists(pid) for pid in now)


@pytest.mark.program
async def test_what_cannot_begin_is_not_begun_again_and_again(tmp_path: Path) -> None:
    config = Config(home=tmp_path, port=0, workers=1)
    never = asyncio.Event()
    with pytest.raises(WorkerFailed, match="1 of 1 ended with code 3 before it could answer"):
        await run_workers(one_of_several.cannot_begin, config, never, never, pytest.fail)


async def test_a_port_that_somebody_has_is_not_shared_with_them(tmp_path: Path) -> None:
    never = asyncio.Event()
    with listening_socket("127.0.0.1", 0) as taken:
        config = Config(home=tmp_path, port=taken.getsockname()[1], workers=2)
        with pytest.raises(PortTaken):
            await run_workers(one_of_several.cannot_begin, config, never, never, pytest.fail)


async def test_nobody_is_killed_while_requests_may_still_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes requests for drain_grace_s more, and only then does drain_timeout_s begin."""
    for name in ("GRACE_S", "LAST_WORDS_S"):
        monkeypatch.setattr(module, name, 0.01)
    asked, did = asyncio.Event(), []
    asked.set()
    began = time.monotonic()

    def note(what: str) -> None:
        did.append((what, time.monotonic() - began))

    stands_for: Any = SimpleNamespace(stop=lambda: note("stop"), kill=lambda: note("kill"))
    config = Config(home=tmp_path, drain_grace_s=0.2, drain_timeout_s=0.05)
    await module._stop(stands_for, config, asked, asyncio.Event())
    assert [what for what, _ in did] == ["stop", "kill"]
    assert did[1][1] > 0.25


async def test_serve_is_one_process_and_says_what_to_run_instead(tmp_path: Path) -> None:
    def announce(fleet: Fleet, url: str, keys: Keys) -> None:
        pytest.fail("it serves")

    with pytest.raises(ConfigError, match="`assay gateway`"):
        await serve(Config(home=tmp_path, workers=2), Steps(), announce, build=False)
