"""The order of a self-test: what is measured before, what is broken then, and that all of it is mended."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.commands.self_test import self_test_command, trials_table
from server.config import Config
from server.engines.failures import EngineNotStarted
from server.measuring import checks
from server.measuring import self_test as module
from server.measuring.checks import Found
from server.measuring.self_test import Trial, self_test
from server.progress import Steps
from tests.tiers.test_detection import again, measured
from tiers.conformance.faults import BY_NAME, FAULTS
from tiers.errors import ConfigError
from tiers.tier import TierKind

BEFORE = measured()
MISSED = "logits-scaled"
"""By the engines here, on demand."""


class Turbo:
    """An engine that is farther from the reference while something is planted in it."""

    def __init__(self, *, hides: str = "", has_no: str = "rope-unscaled", drifts: bool = False) -> None:
        self.planted: str | None = None
        self.history: list[str | None] = []
        self.hides, self.has_no, self.drifts = hides, has_no, drifts
        self.walked = 0

    async def plant(self, fault: str | None) -> int:
        self.planted = fault
        self.history.append(fault)
        return int(fault is not None and fault != self.has_no)

    def scores(self, phase: Any) -> Any:
        self.walked += 1
        broken = self.planted not in (None, self.hides) or (self.drifts and self.walked > 2)
        return again(BEFORE, self.walked, factor=3 if broken else 1)[phase]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts engines in place of real ones: a Turbo, and a Lite that is broken for a Turbo."""

    def put(turbo: Turbo, kinds: tuple[TierKind, ...] = tuple(TierKind)) -> None:
        lite = Turbo()
        lite.planted = "what makes it Lite"
        engine = {TierKind.REFERENCE: Turbo(), TierKind.TURBO: turbo, TierKind.LITE: lite}
        pools = [
            SimpleNamespace(
                tier=SimpleNamespace(
                    kind=kind, model="SmolLM2-135M-Instruct", name=f"Smol-{kind}", checkpoint=Path()
                ),
                replicas=[SimpleNamespace(engine=engine[kind])],
                manifest=None,
                context_length=2048,
            )
            for kind in kinds
        ]

        @asynccontextmanager
        async def running(config: Config, steps: Steps, *, takes_faults: bool) -> AsyncIterator[Any]:
            assert takes_faults
            yield SimpleNamespace(pools=pools)

        async def make_pack(*args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(answers=())

        async def score(engine: Turbo, pack: Any, checkpoint: Path, phase: Any, **kwargs: Any) -> Any:
            return engine.scores(phase)

        def check(fault: str) -> Any:
            async def checked(engine: Turbo, *args: Any) -> Found | None:
                return Found(fault, 7) if engine.planted == fault != engine.hides else None

            return checked

        monkeypatch.setattr(module, "running_engines", running)
        monkeypatch.setattr(module, "make_pack", make_pack)
        monkeypatch.setattr(module, "score", score)
        for fault in FAULTS:
            if fault.check != "divergence":
                monkeypatch.setattr(checks, fault.check, check(fault.name))

    return put


async def run(**how: Any) -> list[Trial]:
    return await self_test(Config(), Steps(), **how)


async def test_each_fault_is_planted_alone_found_and_mended(engines: Any) -> None:
    turbo = Turbo()
    engines(turbo)
    trials = {trial.name: trial for trial in await run(repeats=2)}
    expected = dict.fromkeys(BY_NAME, "caught") | {"rope-unscaled": "not applicable", "unbroken": "sound"}
    assert {name: trial.outcome for name, trial in trials.items()} == expected
    assert turbo.history[1::2] == [None] * (len(turbo.history) // 2), "nothing is left when the next comes"
    assert {*turbo.history} - {None} == {fault.name for fault in FAULTS if fault.is_planted}
    assert (trials["template"].metric, trials["template"].tokens) == ("template", 7)
    assert trials["layer-dropped"].p_value is not None


async def test_the_unbroken_engine_is_measured_as_often_as_asked_and_once_mended(engines: Any) -> None:
    engines(Turbo())
    sound = [trial for trial in await run(repeats=5, names=["template"]) if trial.name == "unbroken"]
    assert [trial.outcome for trial in sound] == ["sound"] * 6
    assert len({trial.planted for trial in sound}) == 4, "with one, two and four times as many neighbours"


async def test_a_fault_that_shows_nowhere_is_missed(engines: Any) -> None:
    for hidden in (MISSED, "template"):
        engines(Turbo(hides=hidden))
        trials = await run(repeats=0, names=[MISSED, "template", "layer-dropped"])
        assert [trial.name for trial in trials if trial.outcome == "MISSED"] == [hidden]


async def test_an_engine_that_drifts_by_itself_is_a_false_alarm(engines: Any) -> None:
    engines(Turbo(drifts=True))
    trials = await run(repeats=2, names=[])
    assert [trial.outcome for trial in trials] == ["FALSE ALARM"] * 3


async def test_an_engine_is_mended_even_when_measuring_fails(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turbo = Turbo()
    engines(turbo)

    def fails(before: Any, now: Any) -> None:
        if turbo.planted:
            raise EngineNotStarted("gone")

    monkeypatch.setattr(module, "detect", fails)
    with pytest.raises(EngineNotStarted):
        await run(repeats=1)
    assert turbo.planted is None


async def test_without_a_lite_nothing_can_be_taken_for_turbo(engines: Any) -> None:
    engines(Turbo(), kinds=(TierKind.REFERENCE, TierKind.TURBO))
    trials = await run(repeats=0, names=["lite-as-turbo"])
    assert trials[0].outcome == "not applicable"
    engines(Turbo(), kinds=(TierKind.REFERENCE, TierKind.LITE))
    with pytest.raises(ConfigError, match="breaks the Turbo"):
        await run()


def test_the_command_fails_if_a_fault_is_missed(
    engines: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FAULTS", [each for each in FAULTS if each.name in (MISSED, "template")])
    engines(Turbo())
    assert self_test_command(Config(), repeats=1) == 0
    assert "caught" in capsys.readouterr().out
    engines(Turbo(hides=MISSED))
    assert self_test_command(Config(), repeats=1, as_json=True) == 1
    assert '"MISSED"' in capsys.readouterr().out
    engines(Turbo(drifts=True))
    assert self_test_command(Config(), repeats=2) == 1


def test_the_table_says_by_what_and_after_how_much() -> None:
    trial = Trial(
        name="kv-scale",
        tier="Smol-Turbo",
        planted="keys [scaled]",
        outcome="caught",
        metric="kl",
        phase="decode",
        tokens=1024,
        p_value=3e-9,
        factor=2.5,
        seconds=1,
    )
    table = trials_table([trial, trial.model_copy(update={"outcome": "MISSED", "p_value": None})])
    columns = {str(column.header): [*column.cells] for column in table.columns}
    assert columns["by"][0] == "kl in decode"
    assert columns["after tokens"][0] == "1,024"
    assert columns["p"] == ["3e-09", ""]
    assert "red" in str(columns["outcome"][1])
