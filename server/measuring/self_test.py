"""`assay certify --self-test`: plants faults, one at a time, in running engines, and sees whether each is found.

Knows the order of things: what is measured before, what is broken, what is measured then.
"""

import math
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from server.config import Config
from server.engines.fleet import Fleet
from server.measuring import checks
from server.measuring.checks import Found
from server.measuring.measure import make_pack, score
from server.measuring.running import only
from server.progress import Steps
from server.serve import running_engines
from tiers.conformance.detection import Detection, detect
from tiers.conformance.faults import BY_NAME, FAULTS, Fault, FaultName
from tiers.conformance.pack import Pack
from tiers.conformance.prompts import Kind, Prompt, load_prompts
from tiers.conformance.scores import PHASES, Phase, Scores
from tiers.errors import ConfigError
from tiers.tier import TierKind

REPEATS = 3
TOKENS = 16
SHORT: tuple[Kind, ...] = ("chat", "knowledge", "reasoning", "code")
OF_EACH, EVERY = 6, 4
"""So many prompts of each of these kinds, of all their languages. Tests count answers, of which a prompt has two:
with half as many the subtlest faults are not found."""
LONG_PROMPTS, LONG_CONTEXT = 12, 4096
"""For what shows far from a text's beginning."""
AT_ONCE = 8
_NEIGHBOURS = (AT_ONCE, 2 * AT_ONCE, AT_ONCE // 2)
"""Sequences at once when the unbroken engine is measured again: callers have other neighbours each time, too."""

ByPhase = dict[Phase, Scores]
Outcome = Literal["caught", "MISSED", "sound", "FALSE ALARM", "not applicable"]
GOOD: tuple[Outcome, ...] = ("caught", "sound", "not applicable")


class Trial(BaseModel):
    """One measurement of an engine, broken or not, and what it showed."""

    model_config = ConfigDict(frozen=True)

    name: FaultName | Literal["unbroken"]
    tier: str
    planted: str
    outcome: Outcome
    metric: str | None = None
    """By which it was found first."""
    phase: Phase | None = None
    tokens: int | None = None
    """Looked at until it was."""
    p_value: float | None = None
    """Of all tokens; None where nothing is left to chance."""
    factor: float | None = None
    """How many times what it was the metric is; None where it was 0."""
    seconds: float


async def self_test(
    config: Config, steps: Steps, *, repeats: int = REPEATS, names: Collection[FaultName] = tuple(BY_NAME)
) -> list[Trial]:
    """Start every model's engines for it, and try the named faults on each model's Turbo.

    Args:
        config: whose models; each needs a Reference and a Turbo, and a Lite to be taken for Turbo.
        steps: shows how far it is.
        repeats: how often the unbroken engine is measured again, each of which must raise no alarm.
        names: which faults.

    Raises:
        AssayError: an engine cannot be started, measured or broken.
    """
    wanted = [tier for tier in config.tiers if tier.kind is not TierKind.REFERENCE]
    trials: list[Trial] = []
    async with running_engines(only(config, wanted), steps, takes_faults=True) as fleet:
        for model in dict.fromkeys(tier.model for tier in wanted):
            with tempfile.TemporaryDirectory(prefix="assay-self-test-") as folder:
                tested = _Tested(fleet, model, Path(folder), steps)
                trials += await tested.run(repeats, [fault for fault in FAULTS if fault.name in names])
    return trials


class _Tested:
    """One model's Turbo, and its Lite in its place."""

    def __init__(self, fleet: Fleet, model: str, folder: Path, steps: Steps) -> None:
        """
        Raises:
            ConfigError: there is no Turbo.
        """
        pools = {pool.tier.kind: pool for pool in fleet.pools if pool.tier.model == model}
        if TierKind.TURBO not in pools:
            raise ConfigError(f"The self-test breaks the Turbo of {model}, and it is not configured.")
        self._pools = pools
        self._reference, self._turbo = pools[TierKind.REFERENCE], pools[TierKind.TURBO]
        self._engine, self._name = self._turbo.replicas[0].engine, self._turbo.tier.name
        self._folder, self._steps = folder, steps
        self._packs: dict[bool, Pack] = {}
        self._unbroken: dict[bool, ByPhase] = {}
        self._prompts: dict[str, Prompt] = {}

    async def run(self, repeats: int, faults: Sequence[Fault]) -> list[Trial]:
        """The unbroken engine again and again, each fault, and the mended engine once more."""
        trials = [await self._sound(at_once) for at_once in _take(_NEIGHBOURS, repeats)]
        trials += [await self._broken(fault) for fault in faults]
        trials.append(await self._sound(AT_ONCE, "mended after all of them"))
        return trials

    async def _pack(self, is_long: bool) -> Pack:
        if is_long not in self._packs:
            if is_long:
                context = min(LONG_CONTEXT, self._turbo.context_length)
                prompts = _of_kind("long_context", load_prompts(context_length=context))[:LONG_PROMPTS]
            else:
                every = load_prompts()
                prompts = [each for kind in SHORT for each in _of_kind(kind, every)[::EVERY][:OF_EACH]]
            self._prompts |= {prompt.id: prompt for prompt in prompts}
            reference = self._reference
            with self._steps.step(f"{reference.tier.name} answers") as step:
                self._packs[is_long] = await make_pack(
                    reference.replicas[0].engine,
                    reference.tier.name,
                    reference.tier.checkpoint,
                    prompts,
                    (),
                    self._folder / ("long" if is_long else "short"),
                    tokens=TOKENS,
                    fingerprint="",
                    say=step.detail,
                )
        return self._packs[is_long]

    async def _walk(self, kind: TierKind, is_long: bool, name: str, at_once: int = AT_ONCE) -> ByPhase:
        pack, engine = await self._pack(is_long), self._pools[kind].replicas[0].engine
        with self._steps.step(f"Walking {name}") as step:
            return {
                phase: await score(
                    engine, pack, self._reference.tier.checkpoint, phase, say=step.detail, at_once=at_once
                )
                for phase in PHASES
            }

    async def _before(self, is_long: bool) -> ByPhase:
        """The unbroken engine's, which all else is held against."""
        if is_long not in self._unbroken:
            name = f"{self._name}, unbroken{', long' if is_long else ''}"
            self._unbroken[is_long] = await self._walk(TierKind.TURBO, is_long, name)
        return self._unbroken[is_long]

    async def _sound(self, at_once: int, how: str = "") -> Trial:
        """Everything that a fault is found by, on the unbroken engine."""
        how = how or f"nothing, {at_once} sequences at once"
        before = await self._before(is_long=False)
        began = time.monotonic()
        now = await self._walk(TierKind.TURBO, is_long=False, name=f"{self._name}, {how}", at_once=at_once)
        found: Detection | Found | None = detect(before, now)
        for fault in FAULTS:
            if fault.check != "divergence" and found is None:
                found = await self._check(fault)
        outcome: Outcome = "sound" if found is None else "FALSE ALARM"
        return self._trial("unbroken", how, outcome, found, began)

    async def _broken(self, fault: Fault) -> Trial:
        if fault.is_planted:
            is_long = fault.name == "rope-unscaled"
            began = time.monotonic()
            try:
                # First, to know whether it can be there at all.
                if not await self._engine.plant(fault.name):
                    outcome: Outcome = "not applicable" if fault.may_lack else "MISSED"
                    return self._trial(fault.name, fault.planted, outcome, None, began)
                await self._engine.plant(None)
                await self._before(is_long)
                began = time.monotonic()
                await self._engine.plant(fault.name)
                found = await self._look_for(fault, TierKind.TURBO, is_long)
            finally:
                await self._engine.plant(None)
        elif TierKind.LITE in self._pools:
            await self._before(is_long=False)
            began = time.monotonic()
            found = await self._look_for(fault, TierKind.LITE, is_long=False)
        else:
            return self._trial(fault.name, fault.planted, "not applicable", None, time.monotonic())
        return self._trial(fault.name, fault.planted, "MISSED" if found is None else "caught", found, began)

    async def _look_for(self, fault: Fault, kind: TierKind, is_long: bool) -> Detection | Found | None:
        if fault.check != "divergence":
            return await self._check(fault)
        return detect(await self._before(is_long), await self._walk(kind, is_long, fault.name))

    async def _check(self, fault: Fault) -> Found | None:
        pack = await self._pack(is_long=False)
        match fault.check:
            case "rendering":
                return await checks.rendering(self._engine, self._name, pack, self._prompts)
            case "nucleus":
                return await checks.nucleus(self._engine, self._name, pack)
            case _:
                return await checks.end(self._engine, self._name, pack, self._reference.tier.checkpoint)

    def _trial(
        self,
        name: FaultName | Literal["unbroken"],
        planted: str,
        outcome: Outcome,
        found: Detection | Found | None,
        began: float,
    ) -> Trial:
        chance = found if isinstance(found, Detection) else None
        return Trial(
            name=name,
            tier=self._name,
            planted=planted,
            outcome=outcome,
            metric=found.metric if found else None,
            phase=chance.phase if chance else None,
            tokens=found.tokens if found else None,
            p_value=chance.p_value if chance else None,
            factor=chance.factor if chance and math.isfinite(chance.factor) else None,
            seconds=time.monotonic() - began,
        )


def _of_kind(kind: Kind, prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


def _take(values: Sequence[int], count: int) -> list[int]:
    """So many of them, from the beginning again after the last."""
    return [values[number % len(values)] for number in range(count)]
