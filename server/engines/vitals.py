"""Whether an engine still works: from what is heard of it, and from requests for one token. Knows no processes."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from enum import Enum, auto

import aiohttp

from server.engines.engine import Engine
from server.engines.patience import LONGEST_REST_S, Patience

log = logging.getLogger("assay.vitals")

LOOK_S = 1.0
"""How often a probe that waits looks whether the engine works on something else."""


class Finding(Enum):
    """What a probe found."""

    WORKS = auto()
    ERRS = auto()
    HANGS = auto()


class Vitals:
    """What is known of one engine's health."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._heard_at = self._probed_at = time.monotonic()
        self._errors = 0
        self._rest_s = patience.eject_s
        self._rested_until = -math.inf

    def heard(self) -> None:
        """Something came that only a working engine sends: part of an answer. Cheap, for every chunk."""
        self._heard_at = time.monotonic()

    def answered(self) -> None:
        """A caller's request was answered well."""
        self._errors = 0
        self.heard()

    def begin(self) -> None:
        """The engine has just started: what was before does not count."""
        self.answered()

    def erred(self) -> float | None:
        """A request was answered with an error of the engine's. How long it is to rest, if it was one too many."""
        self._errors += 1
        if self._errors < self._patience.eject_after_errors:
            return None
        now = time.monotonic()
        again = now - self._rested_until < LONGEST_REST_S
        longest = max(LONGEST_REST_S, self._patience.eject_s)
        self._rest_s = min(2 * self._rest_s, longest) if again else self._patience.eject_s
        self._rested_until = now + self._rest_s
        self._errors = 0
        return self._rest_s

    async def until_it_hangs(
        self, engine: Engine, model: str, is_up: Callable[[], bool], erred: Callable[[], None]
    ) -> None:
        """Return once the engine hangs: silent for ``probe_every_s``, and then at a probe.

        Probes only while ``is_up()``: an engine that sleeps, wakes or starts has no need to answer. One that
        answers a probe with an error has ``erred``, as with a caller's request.
        """
        while True:
            quiet_s = time.monotonic() - max(self._heard_at, self._probed_at)
            if quiet_s < self._patience.probe_every_s:
                await asyncio.sleep(self._patience.probe_every_s - quiet_s)
            elif not is_up():
                self._probed_at = time.monotonic()  # then the next one
            else:
                finding = await self.probe(engine, model)
                if finding is Finding.ERRS:
                    erred()
                if finding is Finding.HANGS and is_up():
                    log.warning("%s: the engine hangs", engine.name)
                    return

    async def probe(self, engine: Engine, model: str) -> Finding:
        """Ask for one token by the way that callers' requests go: API server, scheduler, every worker.

        In vLLM's scheduler this request waits its turn. While ``max_num_seqs`` others run it is not begun; while
        prompts before it are computed, they may take all of each step, for as many steps as they are long. A
        healthy engine may so leave it waiting for minutes, and time alone does not tell it from one that hangs.
        But whatever keeps the probe waiting makes every step count: a token generated, a prompt done, or a further
        piece of one, which takes a further part of the KV cache. So an engine hangs if, for ``probe_timeout_s``,
        neither the probe is answered, nor anything else heard, nor these counts move; all three come from the
        engine's core and its workers by way of its API server, and stop with any of them.

        Only time in which the gateway itself ran counts: after a pause of its own, an answer may lie unread.
        """
        asked_at = time.monotonic()
        waited_s = 0.0
        before: tuple[bytes, ...] = ()
        look_s = min(LOOK_S, self._patience.probe_timeout_s / 4)
        asking = asyncio.create_task(engine.one_token(model))
        try:
            while waited_s < self._patience.probe_timeout_s:
                began = time.monotonic()
                await asyncio.wait({asking}, timeout=min(look_s, self._patience.probe_timeout_s - waited_s))
                if asking.done():
                    return self._read(asking)
                work = await engine.work_done(look_s)
                if work and before and work != before:
                    self.heard()
                if self._heard_at > asked_at:
                    return Finding.WORKS
                before = work or before
                waited_s += min(time.monotonic() - began, 2 * look_s)
            return Finding.HANGS
        finally:
            self._probed_at = time.monotonic()
            if not asking.cancel():
                asking.exception()  # taken note of, whether or not it was still wanted

    def _read(self, asking: "asyncio.Task[int]") -> Finding:
        try:
            status = asking.result()
        except aiohttp.ClientError:
            return Finding.ERRS
        if status != 200:
            return Finding.ERRS
        self.heard()
        return Finding.WORKS
