"""A keeper goes on, whatever it meets: without one its tier stays dead."""

import asyncio
from pathlib import Path

import pytest

from server.config import Config
from server.engines import keeper
from server.engines.failures import EngineNotStarted
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.engines.replica import Replica
from server.engines.state import State
from server.launch.launch import Launched
from server.launch.process import LocalProcess
from server.metrics import Metrics
from tests.server.conftest import FakeEngineReplica, fake_replica
from tests.server.engines.drained import until
from tiers.tier import Tier


class Troubled(FakeEngineReplica):
    """One that errs in ways which nobody has foreseen, as often as the test wants."""

    bad_starts = bad_ends = starts = 0

    async def start(self, say: object = None) -> None:
        self.starts += 1
        self.failed.clear()
        if self.bad_starts:
            self.bad_starts -= 1
            raise RuntimeError("unforeseen")
        self.state = State.READY

    async def clear_away(self, backoff_s: float) -> None:
        self.state = State.RESTARTING
        if self.bad_ends:
            self.bad_ends -= 1
            raise RuntimeError("unforeseen")

    async def until_it_fails(self) -> None:
        await self.failed.wait()


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(keeper, "LONGEST_BACKOFF_S", 0.01)


@pytest.fixture
def troubled(tmp_path: Path) -> Troubled:
    replica = fake_replica(Config(home=tmp_path), Metrics())
    replica.__class__ = Troubled
    assert isinstance(replica, Troubled)
    return replica


async def test_a_replica_more_that_fails_in_an_unforeseen_way_is_tried_again(
    troubled: Troubled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(troubled.tier, troubled.manifest, 2048, (), Metrics(), max_num_seqs=4)
    fleet = Fleet([pool])
    troubled.bad_starts = 2
    fleet.add(pool, troubled)
    await until(lambda: troubled.state is State.READY)
    assert troubled.starts == 3
    assert "unforeseen" in caplog.text
    assert "no engine has come up; trying again" in caplog.text
    assert troubled.restarts == 0, "waiting for room on a cluster is no engine that was lost"
    troubled.failed.set()
    await until(lambda: troubled.starts == 4)
    assert troubled.restarts == 1
    assert "the engine ended; trying again" in caplog.text
    await fleet.stop()


async def test_what_cannot_be_cleared_away_is_not_started_beside_and_tried_again(troubled: Troubled) -> None:
    troubled.state = State.READY
    troubled.bad_ends = 2
    keeping = asyncio.create_task(keeper.keep(troubled))
    troubled.failed.set()
    await until(lambda: troubled.restarts == 1)
    assert (troubled.state, troubled.bad_ends, troubled.starts) == (State.READY, 0, 1)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


class Begins:
    """Starts what runs until it is ended, and remembers it."""

    def __init__(self) -> None:
        self.begun: list[LocalProcess] = []

    async def begin(self, tier: Tier, log: Path) -> Launched:
        self.begun.append(await LocalProcess.start(["sleep", "1000"], {}, log))
        return Launched("http://127.0.0.1:9", "key", self.begun[-1])


async def test_an_engine_whose_address_cannot_be_written_is_ended_as_any_that_fails(tmp_path: Path) -> None:
    """A disk is full: each further try would leave one engine more."""
    fake, launch = fake_replica(Config(home=tmp_path), Metrics()), Begins()
    (tmp_path / "full").touch()
    replica = Replica(
        fake.tier,
        fake.manifest,
        2048,
        launch=launch,
        checkpoints=None,
        logs=tmp_path,
        metrics=Metrics(),
        start_timeout_s=5,
        address_file=tmp_path / "full" / "address.json",
    )
    with pytest.raises(EngineNotStarted, match=r"cannot be written to .*full/address.json \(File exists\)"):
        await replica.start()
    (process,) = launch.begun
    assert process.exit_code is not None
