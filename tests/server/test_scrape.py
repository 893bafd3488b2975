"""What several gateway processes count, put together."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

import server.scrape
from server.metrics import Metrics
from server.scrape import Gathering, gauges_of, tell
from server.series import ERROR, MODEL, OPERATION, PROVIDER_NAME
from server.worker import ScrapeFailed, Worker
from tests.server.conftest import running_gateway

TIER = {"tier": "T"}
CALL = ("chat", "assay", "T")


class Several:
    """Processes as far as scraping goes: each with metrics and a socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gathering = Gathering(CollectorRegistry(), gauges_of(Metrics().registry))
        self.servers: dict[int, asyncio.Server] = {}

    async def join(self, process: int) -> Metrics:
        metrics = Metrics()
        metrics.requests.labels("T", "200", "")
        metrics.connections_refused.labels("x")
        socket = self.folder / f"{process}.sock"
        self.servers[process] = await tell(socket, metrics.scrape)
        self.gathering.joined(process, socket)
        return metrics

    async def value(self, name: str, labels: dict[str, str] = TIER) -> float:
        text = (await self.gathering.exposition()).decode()
        return next(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        )


@pytest.fixture
async def several(tmp_path: Path) -> AsyncIterator[Several]:
    made = Several(tmp_path)
    yield made
    for each in made.servers.values():
        each.close()


def test_every_gauge_says_what_several_processes_make_of_it() -> None:
    assert "assay_tier_ready" in gauges_of(Metrics().registry)
    silent = CollectorRegistry()
    Gauge("assay_silent", "Says nothing.", registry=silent)
    with pytest.raises(KeyError):
        gauges_of(silent)


async def test_what_is_counted_is_added_and_what_is_true_of_a_tier_is_not(several: Several) -> None:
    for each, ready, kl, running in (
        (await several.join(1), 1, math.nan, 3),
        (await several.join(2), 0, 0.02, 4),
        (await several.join(3), 1, 0.01, 0),
    ):
        each.requests.labels("T", "200", "").inc(2)
        each.duration.labels(*CALL, "").observe(running)
        each.ready.labels("T").set(ready)
        each.kl.labels("T", "decode").set(kl)
        each.running.labels("T").set(running)
        each.certified.labels("T").set(math.nan)
    assert await several.value("assay_requests_total", TIER | {"status": "200", "code": ""}) == 6
    spread = dict(zip((OPERATION, PROVIDER_NAME, MODEL, ERROR), (*CALL, ""), strict=True))
    assert await several.value("gen_ai_server_request_duration_seconds_sum", spread) == 7
    assert await several.value("gen_ai_server_request_duration_seconds_bucket", spread | {"le": "5.12"}) == 3
    assert await several.value("assay_requests_running") == 7
    assert await several.value("assay_tier_ready") == 0, "one of them cannot answer"
    assert await several.value("assay_tier_kl", TIER | {"phase": "decode"}) == 0.02
    assert math.isnan(await several.value("assay_tier_certified"))
    assert await several.value("assay_gateway_workers", {}) == 3


async def test_one_process_alone_is_told_as_it_tells_itself(several: Several) -> None:
    metrics = await several.join(1)
    metrics.requests.labels("T", "200", "").inc()
    metrics.declare("T", _Pool())
    own, together = metrics.exposition(), await several.gathering.exposition()
    assert set(own.splitlines()) <= set(together.splitlines())


class _Pool:
    expected = 1
    ready = running = drained = requests_at_once = 0
    engine_version: str | None = None
    is_asleep = is_verified = False


async def test_what_an_ended_process_counted_stays_and_what_was_true_of_it_goes(several: Several) -> None:
    first, second = await several.join(1), await several.join(2)
    labels = TIER | {"status": "200", "code": ""}
    for each in (first, second):
        each.requests.labels("T", "200", "").inc(5)
        each.running.labels("T").set(1)
    since = await several.value("assay_requests_created", labels)
    assert await several.value("assay_requests_total", labels) == 10
    several.servers.pop(1).close()
    several.gathering.left(1)
    assert await several.value("assay_requests_total", labels) == 10
    assert await several.value("assay_requests_running") == 1
    third = await several.join(3)
    third.requests.labels("T", "200", "").inc()
    assert await several.value("assay_requests_total", labels) == 11
    assert await several.value("assay_requests_created", labels) == since
    several.gathering.left(3)
    several.gathering.left(2)
    assert await several.value("assay_requests_total", labels) == 11
    assert await several.value("assay_gateway_workers", {}) == 0


async def test_one_that_does_not_answer_is_left_out_and_its_counts_are_not(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.scrape, "PATIENCE_S", 0.05)
    first, second = await several.join(1), await several.join(2)
    for each in (first, second):
        each.requests.labels("T", "200", "").inc(5)
        each.running.labels("T").set(1)
    await several.gathering.exposition()

    async def hang() -> bytes:
        await asyncio.sleep(0.2)
        return b""

    several.servers[1].close()
    several.servers[1] = await tell(several.folder / "1.sock", hang)
    assert await several.value("assay_requests_total", TIER | {"status": "200", "code": ""}) == 10
    assert await several.value("assay_requests_running") == 1
    assert await several.value("assay_gateway_workers", {}) == 1


async def test_the_sockets_are_their_owners_alone(several: Several) -> None:
    await several.join(1)
    assert (several.folder / "1.sock").stat().st_mode & 0o777 == 0o600


async def test_a_process_that_cannot_ask_the_others_does_not_answer_for_itself_alone(tmp_path: Path) -> None:
    ready: Any = None
    worker = Worker(1, 2, "127.0.0.1", 0, tmp_path, 0, ready)
    with pytest.raises(ScrapeFailed):
        await worker.scrape()
    async with running_gateway(tmp_path, scrape=worker.scrape) as gateway:
        answer = await gateway.post(path="/metrics", method="GET")
    assert answer.status == 503
    assert b"metrics_unavailable" in answer.body
