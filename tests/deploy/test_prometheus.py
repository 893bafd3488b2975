"""The rules and the scraping, by Prometheus' own tools and by what a gateway says when it is scraped."""

import asyncio
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from server import series
from server.engines.state import State
from server.errors import Refusal
from server.launch.process import free_port
from server.shared_limits import LimitsUnreachable
from tests.deploy import asked
from tests.deploy.asked import ROOT, Asked, Scrape, asked_in
from tests.deploy.cluster import rendered
from tests.programs import program
from tests.server.conftest import Gateway, running_gateway
from tests.server.test_metrics import CHUNK, DONE, STREAM, stream, usage_event

PROMETHEUS = ROOT / "deploy" / "prometheus"
GUIDE = ROOT / "deploy" / "README.md"
TRIALS = sorted(Path(__file__).parent.glob("*.test.yml"))
ALERTS = [rule for rule in asked.rules() if "alert" in rule]


def promtool(*arguments: str, folder: Path = ROOT) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
async def lively(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway that has answered, refused, woken and been left: every series has something to say."""
    async with running_gateway(tmp_path) as gateway:
        gateway.handler = stream(CHUNK, usage_event(3), DONE)
        await gateway.post(STREAM)
        await gateway.post(b"nothing")
        gateway.metrics.waking.labels(gateway.replica.tier.name).observe(1)
        gateway.metrics.connections_refused.labels("headers_timeout").inc()
        gateway.replica.engine_version = "0.32.0"
        yield gateway


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", str(asked.RULES), str(asked.POD_RULES))


@pytest.mark.program
@pytest.mark.parametrize("file", TRIALS, ids=lambda file: file.name)
def test_every_alert_fires_when_it_should_and_not_otherwise(file: Path) -> None:
    promtool("test", "rules", str(file))


def test_every_alert_is_tried_both_ways() -> None:
    tests = [test for file in TRIALS for test in yaml.safe_load(file.read_text())["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    alerts = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts, "seen to fire"
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts, "seen to be silent"


def test_promtool_accepts_what_is_scraped(tmp_path: Path) -> None:
    key = tmp_path / "engine_key"
    key.write_text("key")
    text = (PROMETHEUS / "prometheus.yml").read_text()
    assert "/run/secrets/engine_key" in text
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/engine_key", str(key)))
    (tmp_path / "rules.yml").write_text(asked.RULES.read_text())
    promtool("check", "config", "prometheus.yml", folder=tmp_path)


def test_the_rules_know_the_jobs_by_the_names_that_they_are_scraped_under() -> None:
    jobs = {
        each["job_name"] for each in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    }
    named = set(re.findall(r'job="([^"]+)"', asked.RULES.read_text()))
    assert named == jobs, "where prometheus.yml scrapes"
    monitors = [each for each in rendered("prometheus-operator") if each["kind"] == "ServiceMonitor"]
    endpoints = [endpoint for each in monitors for endpoint in each["spec"]["endpoints"]]
    relabelled = [
        [one["replacement"] for one in each.get("relabelings", ()) if one.get("targetLabel") == "job"]
        for each in endpoints
    ]
    assert sorted(relabelled) == sorted([job] for job in named), "where its operator does"


def kinds(kind: type[Refusal] = Refusal) -> Iterator[type[Refusal]]:
    yield kind
    for each in kind.__subclasses__():
        yield from kinds(each)


def test_the_codes_that_rules_name_are_those_of_errors() -> None:
    codes = {each.code for each in kinds()}
    assert LimitsUnreachable.code in codes, "whose module a gateway without Redis does not read"
    named = {
        code
        for match in re.findall(r'code(?:=|!=|!~|=~)"([^"]+)"', "".join(asked.rule_queries().values()))
        for code in match.strip("|").split("|")
    }
    assert named, "or the expression above finds none"
    assert named <= codes


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert {"summary", "description", "runbook_url"} <= set(rule["annotations"])
    anchor = rule["annotations"]["runbook_url"].partition("#")[2]
    assert anchor == rule["alert"].lower()
    assert rule["labels"]["severity"] in ("page", "ticket")
    headings = re.findall(r"^#+ (.+)$", GUIDE.read_text(), flags=re.MULTILINE)
    assert rule["alert"] in headings, "no paragraph says what to do"


def test_the_guide_lists_every_series_as_it_is_defined() -> None:
    kinds = {series.Count: "counter", series.Level: "gauge", series.Spread: "histogram"}
    for each in (*series.SERIES, *series.OF_WORKERS):
        name = each.name + "_total" * isinstance(each, series.Count)
        labels = ", ".join(f"`{label}`" for label in each.labels)
        assert f"| `{name}` | {kinds[type(each)]} | {labels} | {each.says} |\n" in GUIDE.read_text(), name


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("rate(a{x='1'}[5m])", {Asked("a", frozenset("x"))}),
        ("sum by (y) (a{x=~'1'} offset 1h) > 0", {Asked("a", frozenset("xy"))}),
        ("max_over_time(sum(a:b)[1h:5m])", {Asked("a:b", frozenset())}),
        ("a / on(z) -(b)", {Asked("a", frozenset("z")), Asked("b", frozenset("z"))}),
        ("sum by (t) (label_replace(a, 't', '$1', 'm', '(.*)'))", {Asked("a", frozenset("m"))}),
        (
            "histogram_quantile(0.9, sum by (le) (rate(c_bucket[1m]))) or vector(1)",
            {Asked("c_bucket", frozenset({"le"}))},
        ),
        ("absent(up{job='g'} == 1)", {Asked("up", frozenset({"job"}))}),
    ],
)
def test_a_query_is_read_by_what_it_selects_and_groups_by(query: str, expected: set[Asked]) -> None:
    assert asked_in(query) == expected


def test_nothing_that_looks_like_a_metric_is_overlooked() -> None:
    for where, query in asked.every_query().items():
        assert set(asked.METRIC.findall(query)) <= {each.name for each in asked_in(query)}, where


async def test_every_series_of_the_gateways_that_anything_asks_for_is_in_a_scrape(lively: Gateway) -> None:
    wanted = asked.asked_by_all(asked.OURS)
    assert len(wanted) > 20
    assert Scrape(lively.metrics.exposition().decode()).missing(wanted) == []


async def test_a_series_or_a_label_that_is_not_there_is_found(lively: Gateway) -> None:
    scrape = Scrape(lively.metrics.exposition().decode())
    assert scrape.missing(asked_in("assay_nothing")) == ["there is no assay_nothing"]
    assert scrape.missing(asked_in("sum by (model) (assay_slots)")) == ["assay_slots has no label model"]


@contextmanager
def prometheus(folder: Path, *jobs: dict[str, Any]) -> Iterator[str]:
    """Debian's, with our configuration, but that it scrapes these every half second."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"] = list(jobs)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load(asked.RULES.read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    port = free_port()
    program("promtool")  # of the same package
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, query: str) -> list[Any]:
    """The vector that Prometheus answers with."""
    data = urllib.parse.urlencode({"query": query}).encode()
    with urllib.request.urlopen(f"{url}/api/v1/query", data=data, timeout=10) as answer:
        told = json.load(answer)
    assert told["status"] == "success", told
    return list(told["data"]["result"])


async def until(url: str, query: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if await asyncio.to_thread(ask, url, query):
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    pytest.fail(f"not within {seconds} s: {query}")


def as_prometheus_says(relabelling: dict[str, Any]) -> dict[str, Any]:
    """What the operator makes of one of a ServiceMonitor's."""
    return {re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name): of for name, of in relabelling.items()}


def engines_on_kubernetes() -> dict[str, Any]:
    """What the operator makes of the engines' ServiceMonitor where a pod is ready, at port 1, and one loads."""
    monitors = [each for each in rendered("prometheus-operator") if each["kind"] == "ServiceMonitor"]
    (monitor,) = (each for each in monitors if each["metadata"]["name"] == "assay-engine")
    (endpoint,) = monitor["spec"]["endpoints"]
    told = "__meta_kubernetes_pod_ready"
    pods = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {told: ready}} for port, ready in ((1, "true"), (2, "false"))
    ]
    relabellings = [as_prometheus_says(each) for each in endpoint["relabelings"]]
    return {"job_name": "of the operator", "static_configs": pods, "relabel_configs": relabellings}


@pytest.mark.program
async def test_a_real_prometheus_answers_whatever_the_dashboard_and_the_rules_ask(
    lively: Gateway, tmp_path: Path
) -> None:
    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=lively.metrics.exposition(), content_type="text/plain")

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    gateway = {"job_name": "assay-gateway", "static_configs": [{"targets": [f"{host}:{port}"]}]}
    with prometheus(tmp_path, gateway, engines_on_kubernetes()) as url:
        await until(url, "gen_ai_client_token_usage_sum > 0", 20)
        await lively.post(STREAM)
        lively.replica.state = State.RESTARTING
        await until(url, "rate(gen_ai_client_token_usage_sum[5m]) > 0 and on() assay:requests_counted:rate5m", 20)
        await until(url, 'ALERTS{alertname="AssayTierDown"}', 20)
        answers = {}
        for where, query in asked.every_query().items():
            answers[where] = await asyncio.to_thread(ask, url, query)
        engines = await asyncio.to_thread(ask, url, 'up{job="assay-engine"}')
    await runner.cleanup()
    for where, labels in asked.legends().items():
        assert all(labels - {"namespace"} <= set(each["metric"]) for each in answers[where]), where
    silent = {where for where in asked.panel_queries() if not answers[where]}
    of_engines = {where for where, query in asked.panel_queries().items() if "vllm:" in query}
    assert silent <= of_engines, "every panel on the gateway has something to show"
    assert [each["metric"]["instance"] for each in engines] == ["127.0.0.1:1"], "nor is one asked that loads"
